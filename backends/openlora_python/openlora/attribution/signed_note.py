"""Signed notes, as c2sp.org/signed-note has them: a text and signature lines `— name base64(key id ‖ signature)`."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from ..errors import InvalidArgument, ReceiptInvalid

ED25519 = 0x01
COSIGNATURE_V1 = 0x04

_MAX_BYTES = 1 << 20
_MAX_SIGNATURES = 64
_NAME = re.compile(r"[^\s+]+")
_LINE = re.compile(r"\u2014 (?P<name>[^\s+]+) (?P<signature>[A-Za-z0-9+/]+={0,2})")
_VERIFIER = re.compile(r"(?P<name>[^\s+]+)\+(?P<id>[0-9a-f]{8})\+(?P<key>[A-Za-z0-9+/]+={0,2})")


@dataclass(frozen=True)
class NoteSignature:
    """One signature line. Name and key id say whose it is, if anybody's that one knows."""

    name: str
    key_id: bytes  # 4 bytes
    signature: bytes

    @property
    def line(self) -> str:
        """The line with its newline."""
        return f"\u2014 {self.name} {base64.b64encode(self.key_id + self.signature).decode()}\n"


@dataclass(frozen=True)
class SignedNote:
    """A text, which ends in a newline, and its signatures, in their order."""

    text: str
    signatures: tuple[NoteSignature, ...]

    def __str__(self) -> str:
        return self.text + "\n" + "".join([one.line for one in self.signatures])


@dataclass(frozen=True)
class NoteKey:
    """A key by which notes are known: its name, its type (ED25519 or COSIGNATURE_V1) and 32 bytes of Ed25519."""

    name: str
    kind: int
    public: bytes

    def __post_init__(self) -> None:
        if _NAME.fullmatch(self.name) is None:
            raise InvalidArgument(f"{self.name!r}: no spaces and no '+' in a key's name", field="name")
        if self.kind not in (ED25519, COSIGNATURE_V1) or len(self.public) != 32:
            raise InvalidArgument("wants an Ed25519 key for notes (type 1) or cosignatures (type 4)", field="vkey")

    @property
    def key_id(self) -> bytes:
        """SHA-256(name ‖ newline ‖ type ‖ key)[:4]."""
        return hashlib.sha256(self.name.encode() + b"\n" + bytes((self.kind,)) + self.public).digest()[:4]

    @property
    def vkey(self) -> str:
        """`name+hex id+base64(type ‖ key)`: one line for whoever shall trust it."""
        return f"{self.name}+{self.key_id.hex()}+{base64.b64encode(bytes((self.kind,)) + self.public).decode()}"

    @classmethod
    def parse(cls, vkey: str) -> NoteKey:
        """A key from its vkey. InvalidArgument: not one, or its id is another key's."""
        found = _VERIFIER.fullmatch(vkey)
        if found is None:
            raise InvalidArgument(f"{vkey[:80]!r} is not a verifier key (name+id+base64)", field="vkey")
        key = _base64(found["key"])
        made = cls(found["name"], key[0], key[1:])
        if made.key_id.hex() != found["id"]:
            raise InvalidArgument(f"{vkey!r}: the key's id is {made.key_id.hex()}", field="vkey")
        return made

    def signatures_of(self, note: SignedNote) -> list[bytes]:
        """The signatures of a note that claim to be of this key, not checked yet."""
        wanted = (self.name, self.key_id)
        return [one.signature for one in note.signatures if (one.name, one.key_id) == wanted]

    def is_signed(self, message: bytes, signature: bytes) -> bool:
        """Whether an Ed25519 signature over these bytes is this key's."""
        try:
            Ed25519PublicKey.from_public_bytes(self.public).verify(signature, message)
        except (InvalidSignature, ValueError):
            return False
        return True


def sign_note(text: str, key: Ed25519PrivateKey, name: str) -> SignedNote:
    """A note signed with a plain Ed25519 key."""
    public = NoteKey(name, ED25519, key.public_key().public_bytes_raw())
    return SignedNote(text, (NoteSignature(name, public.key_id, key.sign(text.encode())),))


def parse_note(content: str | bytes) -> SignedNote:
    """A note from a stranger, in exactly the form of the specification. ReceiptInvalid: it is something else."""
    if len(content) > _MAX_BYTES:
        raise ReceiptInvalid(f"{len(content)} bytes; a note has at most {_MAX_BYTES}", field="note")
    try:
        text = content.decode() if isinstance(content, bytes) else content
    except UnicodeDecodeError as error:
        raise ReceiptInvalid(f"not UTF-8: {error}", field="note") from error
    if any(character < " " and character != "\n" for character in text):
        raise ReceiptInvalid("control characters in a note", field="note")
    body, separator, lines = text.rpartition("\n\n")
    if not separator or not lines.endswith("\n"):
        raise ReceiptInvalid("no text, empty line and signature lines", field="note")
    return SignedNote(body + "\n", parse_signature_lines(lines))


def parse_signature_lines(lines: str) -> tuple[NoteSignature, ...]:
    """Signature lines, each with its newline. ReceiptInvalid: not that, none, or too many."""
    found = [_LINE.fullmatch(line) for line in lines.removesuffix("\n").split("\n")]
    if not lines.endswith("\n") or not all(found) or len(found) > _MAX_SIGNATURES:
        raise ReceiptInvalid(f"wants 1 to {_MAX_SIGNATURES} lines '\u2014 name base64'", field="note")
    return tuple(_signature(one["name"], one["signature"]) for one in found)


def parse_base64(text: str, field: str) -> bytes:
    """Standard base64 in its one canonical form. ReceiptInvalid: another form."""
    try:
        return _base64(text)
    except InvalidArgument as error:
        raise ReceiptInvalid(error.message, field=field) from error


def _signature(name: str, encoded: str) -> NoteSignature:
    content = parse_base64(encoded, "note")
    if len(content) < 5:
        raise ReceiptInvalid(f"a signature of {len(content)} bytes", field="note")
    return NoteSignature(name, content[:4], content[4:])


def _base64(text: str) -> bytes:
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidArgument(f"{text[:80]!r} is not base64: {error}", field="base64") from error
    if base64.b64encode(content).decode() != text:  # stray bits in the last character
        raise InvalidArgument(f"{text[:80]!r} is not base64 in its canonical form", field="base64")
    return content
