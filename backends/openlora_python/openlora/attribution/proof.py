"""The proof of one receipt in one file (c2sp.org/tlog-proof): receipt, place in the tree, and the signed checkpoint.

    c2sp.org/tlog-proof@v1
    extra <base64 of the receipt's JSON>
    index <number>
    <base64 hash>, one a line, from the leaf's sibling up
    <empty line>
    <checkpoint: a signed note, with the cosignatures it got>

Imports no part of the server. As with a receipt alone, a proof that brings its own key proves nothing: without a pinned
key the best answer is "consistent, log unknown".
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ReceiptInvalid
from .checkpoint import Checkpoint, Cosignature, verify_checkpoint, verify_cosignatures
from .log_key import LogKey
from .merkle_tree import HASH_BYTES, verify_inclusion
from .receipt import encode_leaf, leaf_hash
from .receipt_json import parse_receipt_document
from .signed_note import NoteKey, SignedNote, parse_base64, parse_note
from .verify import Verification, verify_receipt

HEADER = "c2sp.org/tlog-proof@v1"

_MAX_HASHES = 63
_MAX_BYTES = 64 << 20
_INDEX = re.compile(r"index (0|[1-9][0-9]{0,18})")


@dataclass(frozen=True)
class ReceiptProof:
    """What a proof file says; `verify_proof` says whether it is so."""

    document: dict[str, Any]  # the receipt's JSON
    index: int
    hashes: tuple[bytes, ...]
    note: SignedNote

    def __str__(self) -> str:
        extra = json.dumps(self.document, separators=(",", ":")).encode()
        lines = [HEADER, f"extra {base64.b64encode(extra).decode()}", f"index {self.index}"]
        lines += [base64.b64encode(one).decode() for one in self.hashes]
        return "\n".join(lines) + "\n\n" + str(self.note)


@dataclass(frozen=True)
class ProofVerification:
    """A receipt that verifies and is in the tree of a checkpoint that its log signed."""

    receipt: Verification
    checkpoint: Checkpoint
    cosignatures: tuple[Cosignature, ...]  # of the witnesses that the verifier knows


def is_proof(content: bytes) -> bool:
    """Whether a file is meant as a proof, rather than as the JSON of a receipt."""
    return content.startswith(HEADER.encode())


def parse_proof(content: bytes) -> ReceiptProof:
    """A proof file from a stranger. ReceiptInvalid: it is something else."""
    if len(content) > _MAX_BYTES:
        raise ReceiptInvalid(f"{len(content)} bytes; a proof has at most {_MAX_BYTES}", field="proof")
    try:
        head, separator, note = content.decode().partition("\n\n")
    except UnicodeDecodeError as error:
        raise ReceiptInvalid(f"not UTF-8: {error}", field="proof") from error
    lines = head.split("\n")
    if not separator or len(lines) < 3 or lines[0] != HEADER or not lines[1].startswith("extra "):
        raise ReceiptInvalid(f"wants the lines {HEADER}, extra and index, and a checkpoint", field="proof")
    index = _INDEX.fullmatch(lines[2])
    if index is None or len(lines) - 3 > _MAX_HASHES:
        raise ReceiptInvalid(f"wants an index and at most {_MAX_HASHES} hashes", field="proof")
    document = parse_receipt_document(parse_base64(lines[1].removeprefix("extra "), "extra"))
    hashes = tuple(parse_base64(line, "proof") for line in lines[3:])
    if any(len(one) != HASH_BYTES for one in hashes):
        raise ReceiptInvalid(f"a hash has {HASH_BYTES} bytes", field="proof")
    return ReceiptProof(document, int(index[1]), hashes, parse_note(note))


def verify_proof(
    proof: ReceiptProof,
    pinned: LogKey | None,
    witnesses: Sequence[NoteKey] = (),
    prompt: str | None = None,
    output: str | None = None,
) -> ProofVerification:
    """Check the receipt (as `verify_receipt`), its place in the tree, the log's checkpoint and known cosignatures.

    ReceiptInvalid names the first thing that is wrong. How many witnesses are enough is the caller's to say.
    """
    receipt = verify_receipt(proof.document, pinned, prompt, output)
    if receipt.receipt.seq != proof.index:
        raise ReceiptInvalid(f"{proof.index}, but the receipt is number {receipt.receipt.seq}", field="index")
    checkpoint = verify_checkpoint(proof.note, receipt.log)
    leaf = leaf_hash(encode_leaf(receipt.receipt))
    if not verify_inclusion(leaf, proof.index, checkpoint.size, proof.hashes, checkpoint.root):
        raise ReceiptInvalid(f"the receipt is not in the tree of {checkpoint.size}", field="proof")
    return ProofVerification(receipt, checkpoint, verify_cosignatures(proof.note, witnesses))
