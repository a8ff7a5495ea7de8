"""Checkpoints (c2sp.org/tlog-checkpoint): what a log says its tree is, signed; and witnesses' cosignatures on them.

The note's text is three lines: origin, size, base64 root. Extension lines are allowed by the specification but nobody
can audit them; our logs write none and our readers take none.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..errors import ReceiptInvalid
from .log_key import LogKey
from .merkle_tree import EMPTY_ROOT, HASH_BYTES
from .signed_note import (
    COSIGNATURE_V1,
    ED25519,
    NoteKey,
    NoteSignature,
    SignedNote,
    parse_base64,
    parse_note,
    sign_note,
)

_SIZE = re.compile(r"0|[1-9][0-9]{0,18}")
_TIME_BYTES = 8
_SIGNATURE_BYTES = 64


@dataclass(frozen=True)
class Checkpoint:
    """A tree's size and root, by the log of this origin."""

    origin: str
    size: int
    root: bytes

    @property
    def text(self) -> str:
        """The three lines that are signed."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"


@dataclass(frozen=True)
class Cosignature:
    """A witness's word that it saw the checkpoint, consistent with all that it saw before."""

    witness: NoteKey
    time: int  # seconds since 1970, by the witness's clock


def checkpoint_key(key: LogKey) -> NoteKey:
    """The key that signs a log's checkpoints, as notes know it."""
    return NoteKey(key.origin, ED25519, key.checkpoint_key)


def sign_checkpoint(checkpoint: Checkpoint, key: Ed25519PrivateKey) -> SignedNote:
    """The note of a checkpoint. Persist that it was signed before anybody gets it."""
    return sign_note(checkpoint.text, key, checkpoint.origin)


def parse_checkpoint(note: SignedNote) -> Checkpoint:
    """What the text says, whoever signed it. ReceiptInvalid: not a checkpoint's three lines."""
    lines = note.text.removesuffix("\n").split("\n")
    if len(lines) != 3 or not lines[0] or _SIZE.fullmatch(lines[1]) is None:
        raise ReceiptInvalid("wants the lines origin, size and root, and no others", field="checkpoint")
    root = parse_base64(lines[2], "checkpoint")
    size = int(lines[1])
    if len(root) != HASH_BYTES or size >= 1 << 63:
        raise ReceiptInvalid(f"no root of a tree of {size} leaves", field="checkpoint")
    return Checkpoint(lines[0], size, root)


def verify_checkpoint(note: SignedNote | str | bytes, key: LogKey) -> Checkpoint:
    """The checkpoint, if the log's key signed it. ReceiptInvalid: it did not, or one of its signatures is wrong."""
    note = note if isinstance(note, SignedNote) else parse_note(note)
    checkpoint = parse_checkpoint(note)
    if checkpoint.origin != key.origin:
        raise ReceiptInvalid(f"of {checkpoint.origin!r}, not of {key.origin!r}", field="checkpoint")
    if checkpoint.size == 0 and checkpoint.root != EMPTY_ROOT:
        raise ReceiptInvalid("not the root of no leaves", field="checkpoint")
    known = checkpoint_key(key)
    signatures = known.signatures_of(note)
    if not signatures:
        raise ReceiptInvalid("not signed by the log", field="checkpoint")
    if not all(known.is_signed(note.text.encode(), one) for one in signatures):
        raise ReceiptInvalid("the log's signature is wrong", field="checkpoint")
    return checkpoint


def cosign(note: SignedNote, key: Ed25519PrivateKey, name: str, time: int) -> NoteSignature:
    """A witness's cosignature/v1 at a time in seconds since 1970 (c2sp.org/tlog-cosignature, Ed25519)."""
    public = NoteKey(name, COSIGNATURE_V1, key.public_key().public_bytes_raw())
    signature = key.sign(_cosigned(note.text, time))
    return NoteSignature(name, public.key_id, time.to_bytes(_TIME_BYTES, "big") + signature)


def verify_cosignatures(note: SignedNote, witnesses: Sequence[NoteKey]) -> tuple[Cosignature, ...]:
    """Those of the known witnesses that cosigned, each once. ReceiptInvalid: a known one's signature is wrong."""
    found = {}
    for witness in witnesses:
        for signature in witness.signatures_of(note):
            time = int.from_bytes(signature[:_TIME_BYTES], "big")
            whole = len(signature) == _TIME_BYTES + _SIGNATURE_BYTES and 0 < time < 1 << 63
            if not whole or not witness.is_signed(_cosigned(note.text, time), signature[_TIME_BYTES:]):
                raise ReceiptInvalid(f"the cosignature of {witness.name} is wrong", field="checkpoint")
            found[witness.public] = Cosignature(witness, time)
    return tuple(found.values())


def _cosigned(text: str, time: int) -> bytes:
    return f"cosignature/v1\ntime {time}\n{text}".encode()
