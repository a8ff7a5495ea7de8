"""Proof files of receipts, from a tree that stays in memory: a log of a million receipts is not hashed for each."""

from __future__ import annotations

import threading

from ..attribution.checkpoint import verify_checkpoint
from ..attribution.log import ReceiptLog
from ..attribution.merkle_tree import MerkleTree
from ..attribution.proof import ReceiptProof
from ..attribution.prove import cosigned_note, newest_note
from ..errors import Unavailable


class ProofMaker:
    """Keeps the tree of one log, 64 bytes a receipt. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._log_id = b""
        self._tree = MerkleTree()

    def prove(self, log: ReceiptLog, seq: int) -> ReceiptProof:
        """The proof of a receipt, without salts, under the same checkpoint as `openlora receipts prove` takes.

        InvalidArgument: no such receipt. Unavailable: no checkpoint covers it yet.
        """
        document = log.receipt_json(seq)
        for note in (cosigned_note(log), newest_note(log)):
            if note is not None and (size := verify_checkpoint(note, log.key).size) > seq:
                return ReceiptProof(document, seq, tuple(self._path(log, seq, size)), note)
        raise Unavailable(f"no checkpoint covers receipt {seq} yet: a running server signs one about every second")

    def _path(self, log: ReceiptLog, seq: int, size: int) -> list[bytes]:
        with self._lock:
            if self._log_id != log.key.log_id:
                self._log_id, self._tree = log.key.log_id, MerkleTree()
            for leaf_hash in log.leaf_hashes(self._tree.size, max(size, self._tree.size)):
                self._tree.append(leaf_hash)
            return self._tree.inclusion_proof(seq, size)
