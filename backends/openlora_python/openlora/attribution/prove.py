"""Making proof files from a log, and getting witnesses to cosign its checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import InvalidArgument, ReceiptInvalid, Unavailable
from .checkpoint import verify_checkpoint
from .checkpointer import release
from .log import ReceiptLog
from .merkle_tree import MerkleTree
from .proof import ReceiptProof
from .signed_note import SignedNote, parse_note
from .witness_client import WitnessClient


def prove(log: ReceiptLog, seq: int, *, with_salts: bool = False) -> ReceiptProof:
    """The proof of a receipt under the newest cosigned checkpoint that covers it, else under the newest one.

    InvalidArgument: no such receipt. Unavailable: no checkpoint covers it yet; a running server signs one in a second.
    """
    document = log.receipt_json(seq, with_salts=with_salts)
    for note in (cosigned_note(log), newest_note(log)):
        if note is not None and (checkpoint := verify_checkpoint(note, log.key)).size > seq:
            hashes = MerkleTree(log.leaf_hashes(0, checkpoint.size)).inclusion_proof(seq)
            return ReceiptProof(document, seq, tuple(hashes), note)
    raise Unavailable(f"no checkpoint covers receipt {seq} yet: a running server signs one about every second")


def newest_note(log: ReceiptLog) -> SignedNote | None:
    """The newest checkpoint that the log signed."""
    newest = log.newest_checkpoint()
    return parse_note(newest.note) if newest is not None else None


def cosigned_note(log: ReceiptLog) -> SignedNote | None:
    """The newest checkpoint that witnesses cosigned for this log."""
    try:
        note = parse_note(_cosigned(log).read_bytes())
        verify_checkpoint(note, log.key)
    except (FileNotFoundError, ReceiptInvalid):
        return None
    return note


def cosign_newest(
    log: ReceiptLog, clients: Sequence[WitnessClient], refused: Callable[[Unavailable], None]
) -> SignedNote | None:
    """Ask witnesses for cosignatures on the newest checkpoint; None if none gave one, each refusal told to `refused`.

    What comes is kept in `log/cosigned` beside the log. InvalidArgument: nothing was signed yet.
    """
    note = newest_note(log)
    if note is None:
        raise InvalidArgument("the log has no checkpoint yet: a running server signs one", field="state-dir")
    checkpoint = verify_checkpoint(note, log.key)
    tree = functools.cache(lambda: MerkleTree(log.leaf_hashes(0, checkpoint.size)))
    plain = len(note.signatures)
    for client in clients:
        try:
            note = client.cosign(note, checkpoint, tree)
        except Unavailable as error:
            refused(error)
    if len(note.signatures) == plain:
        return None
    release(_cosigned(log), str(note))
    return note


def _cosigned(log: ReceiptLog) -> Path:
    return log.path.parent / "cosigned"
