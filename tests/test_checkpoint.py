"""Signed notes, checkpoints and cosignatures: the specification's own example, and every other form refused."""

from __future__ import annotations

import base64
import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from openlora.attribution.checkpoint import (
    Checkpoint,
    cosign,
    sign_checkpoint,
    verify_checkpoint,
    verify_cosignatures,
)
from openlora.attribution.log_key import LogKey
from openlora.attribution.merkle_tree import EMPTY_ROOT
from openlora.attribution.signed_note import COSIGNATURE_V1, ED25519, NoteKey, NoteSignature, SignedNote, parse_note
from openlora.errors import InvalidArgument, ReceiptInvalid

# The example of c2sp.org/signed-note.
VKEY = "example.com/foo+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k"
NOTE = (
    "This is an example message.\n\n\u2014 example.com/foo Uw2QOkn8srV1yJGh2VYRlL1Tnagv1YEq6TfXppzi2ONncAlTgK7Ztg1ERYNZ"
    "XsYjOBH3mFXmRKuwHjG1Yu72IneyaQM=\n"
)

PRIVATE = Ed25519PrivateKey.from_private_bytes(b"\x01" * 32)
OTHER = Ed25519PrivateKey.from_private_bytes(b"\x02" * 32)
LOG = LogKey(
    "example.org/log", "0x7E5F4552091A69125d5DfCb7b8C2659029395Bdf", PRIVATE.public_key().public_bytes_raw(), bytes(32)
)
ROOT = hashlib.sha256(b"a root").digest()
CHECKPOINT = Checkpoint("example.org/log", 7, ROOT)
SIGNED = sign_checkpoint(CHECKPOINT, PRIVATE)


def test_the_example_of_the_specification() -> None:
    key, note = NoteKey.parse(VKEY), parse_note(NOTE)
    assert (key.name, key.kind, key.vkey) == ("example.com/foo", ED25519, VKEY)
    assert str(note) == NOTE and note.text == "This is an example message.\n"
    (signature,) = key.signatures_of(note)
    assert key.is_signed(note.text.encode(), signature)
    assert not key.is_signed(note.text.encode() + b"\n", signature)


def test_a_checkpoint_is_three_lines_under_the_logs_key() -> None:
    assert SIGNED.text == f"example.org/log\n7\n{base64.b64encode(ROOT).decode()}\n"
    (signature,) = SIGNED.signatures
    public = PRIVATE.public_key()
    assert signature.key_id == hashlib.sha256(b"example.org/log\n\x01" + public.public_bytes_raw()).digest()[:4]
    public.verify(signature.signature, SIGNED.text.encode())
    assert verify_checkpoint(str(SIGNED), LOG) == verify_checkpoint(str(SIGNED).encode(), LOG) == CHECKPOINT
    empty = sign_checkpoint(Checkpoint(LOG.origin, 0, EMPTY_ROOT), PRIVATE)
    assert verify_checkpoint(empty, LOG).size == 0


@pytest.mark.parametrize(
    "text",
    [
        "example.org/log\n07\n{root}\n",
        "example.org/log\n-7\n{root}\n",
        "example.org/log\n+7\n{root}\n",
        "example.org/log\n 7\n{root}\n",
        "example.org/log\n7.0\n{root}\n",
        "example.org/log\n\u0667\n{root}\n",
        "example.org/log\n9223372036854775808\n{root}\n",
        "example.org/log\n7\n{root}\nextension\n",
        "example.org/log\n7\n\n{root}\n",
        "example.org/log\n7\n",
        "\n7\n{root}\n",
        "example.org/other\n7\n{root}\n",
        "example.org/log\n7\n{short}\n",
        "example.org/log\n7\n{stray}\n",
        "example.org/log\n7\n{root} \n",
        "example.org/log\r\n7\n{root}\n",
        "example.org/log\n0\n{root}\n",
        "7\nexample.org/log\n{root}\n",
    ],
)
def test_any_other_text_is_no_checkpoint_though_it_is_signed(text: str) -> None:
    root = base64.b64encode(ROOT).decode()
    stray = root[:-2] + chr(ord(root[-2]) + 1) + "="  # another last character, the same bytes for a lenient decoder
    text = text.format(root=root, short=base64.b64encode(ROOT[:31]).decode(), stray=stray)
    signature = SIGNED.signatures[0]
    note = f"{text}\n{NoteSignature(signature.name, signature.key_id, PRIVATE.sign(text.encode())).line}"
    with pytest.raises(ReceiptInvalid):
        verify_checkpoint(note, LOG)


def test_the_logs_own_signature_must_be_there_and_right() -> None:
    own = SIGNED.signatures[0]
    stranger = sign_checkpoint(CHECKPOINT, OTHER).signatures[0]
    assert verify_checkpoint(SignedNote(SIGNED.text, (stranger, own)), LOG) == CHECKPOINT
    forged = NoteSignature(own.name, own.key_id, OTHER.sign(SIGNED.text.encode()))
    for signatures in ((stranger,), (forged,), (own, forged), (NoteSignature("other", own.key_id, own.signature),)):
        with pytest.raises(ReceiptInvalid):
            verify_checkpoint(SignedNote(SIGNED.text, signatures), LOG)


@pytest.mark.parametrize(
    "change",
    [
        lambda note: note.rstrip("\n"),
        lambda note: note + "\n",
        lambda note: note.replace("\n\n", "\n"),
        lambda note: note.replace("\u2014 ", "- "),
        lambda note: note.replace("\u2014 ", "\u2014  "),
        lambda note: note.replace("=\n", "\n"),
        lambda note: note.replace("example message", "example\tmessage"),
        lambda note: note + "trailing\n",
        lambda note: note + "\u2014 name AAAA\n",
        lambda note: note + "\u2014 name+x " + note.split(" ")[-1],
        lambda note: note + 64 * note.split("\n\n")[1],
        lambda note: "x" * (1 << 20) + note,
        lambda note: "",
        lambda note: note.encode() + b"\xff",
    ],
)
def test_notes_of_another_form_are_refused(change) -> None:
    parse_note(NOTE)
    with pytest.raises(ReceiptInvalid):
        parse_note(change(NOTE))


@pytest.mark.parametrize(
    "vkey", ["", VKEY + "A", VKEY.replace("530d903a", "530d903b"), VKEY.replace("foo", "fo o"), "x+00000000+AA=="]
)
def test_other_lines_are_no_verifier_keys(vkey: str) -> None:
    with pytest.raises(InvalidArgument):
        NoteKey.parse(vkey)


def test_a_cosignature_is_over_time_and_text() -> None:
    witness = NoteKey("witness.example", COSIGNATURE_V1, OTHER.public_key().public_bytes_raw())
    cosignature = cosign(SIGNED, OTHER, "witness.example", 1_700_000_000)
    message = f"cosignature/v1\ntime 1700000000\n{SIGNED.text}".encode()
    OTHER.public_key().verify(cosignature.signature[8:], message)
    assert cosignature.key_id == hashlib.sha256(b"witness.example\n\x04" + witness.public).digest()[:4]
    note = SignedNote(SIGNED.text, (*SIGNED.signatures, cosignature, cosignature))
    (found,) = verify_cosignatures(note, [witness])
    assert (found.witness, found.time) == (witness, 1_700_000_000)
    assert verify_checkpoint(str(note), LOG) == CHECKPOINT
    unknown = NoteKey("witness.example", COSIGNATURE_V1, PRIVATE.public_key().public_bytes_raw())
    assert verify_cosignatures(note, [unknown]) == ()
    later = (1_700_000_001).to_bytes(8, "big") + cosignature.signature[8:]
    for wrong in (later, cosignature.signature[:-1], bytes(8) + cosignature.signature[8:], b"x"):
        mutated = NoteSignature("witness.example", witness.key_id, wrong)
        with pytest.raises(ReceiptInvalid, match="witness"):
            verify_cosignatures(SignedNote(SIGNED.text, (*SIGNED.signatures, mutated)), [witness])
