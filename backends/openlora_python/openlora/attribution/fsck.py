"""Checking a whole log or its export from the raw leaves up: everything that can be recomputed is.

Faults are lines of text, one for each thing that is wrong. Whether the checkpoints are those that others saw, only the
chain and witnesses know.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..errors import OpenLoRAError
from .checkpoint import verify_checkpoint
from .checkpointer import released_checkpoint
from .export import LogExport
from .frames import CompletionFrame, list_segments
from .log import LoggedReceipt, ReceiptLog, SignedCheckpoint
from .log_key import LogKey
from .merkle_tree import MerkleTree
from .projection import agrees
from .reader import JournalReader
from .receipt import Receipt, ReceiptHasher, decode_leaf, leaf_hash, recover_signer

Progress = Callable[[int, int], None]

_PAGE = 1_000
_REQUEST_ID = slice(96, 128)  # of a leaf


def check_log(log: ReceiptLog, journal: Path | None, progress: Progress = lambda done, of: None) -> Iterator[str]:
    """The faults of a log, and where it and the journal in that directory contradict each other."""
    signed, released = log.checkpoints(), released_checkpoint(log)  # before the size: a server may go on
    tree, size = MerkleTree(), log.size()
    check = _ReceiptCheck(log.key)
    blobs = {name for name in log.blob_hashes() if hashlib.sha256(log.blob(name) or b"").digest() == name}
    for start in range(0, size, _PAGE):
        page = log.list(start, _PAGE)
        if [one.seq for one in page] != list(range(start, min(start + _PAGE, size))):
            yield f"receipts from {start} on: some are missing"
            return
        for one in page:
            yield from _check_row(log, one)
            yield from check(one.seq, one.leaf, one.signature, blobs)
            tree.append(leaf_hash(one.leaf))
        progress(min(start + _PAGE, size), size)
    yield from _check_checkpoints(log.key, signed, tree)
    if released is not None and (released.size > tree.size or tree.root(released.size) != released.root):
        yield f"the released checkpoint of {released.size} is not of these receipts"
    if journal is not None and log.successor is None and list_segments(journal):
        yield from _check_journal(log, journal)


def check_export(export: LogExport, progress: Progress = lambda done, of: None) -> Iterator[str]:
    """The faults of an export, from its files alone."""
    tree, check = MerkleTree(), _ReceiptCheck(export.key)
    known: set[bytes] = set()
    try:
        for seq, leaf in enumerate(export.leaves()):
            try:
                wanted = decode_leaf(leaf).blob_hashes
            except OpenLoRAError:
                wanted = ()
            known |= {name for name in wanted if name not in known and export.blob(name) is not None}
            yield from check(seq, leaf, export.signature(seq), known)
            tree.append(leaf_hash(leaf))
            if seq % _PAGE == 0:
                progress(seq, export.size)
    except OpenLoRAError as error:
        yield str(error)
        return
    progress(export.size, export.size)
    if tree.root() != export.checkpoint.root:
        yield f"checkpoint of {export.size}: the leaves give the root {tree.root().hex()}"


class _ReceiptCheck:
    """What can be wrong with one leaf, its signature and its blobs."""

    def __init__(self, key: LogKey) -> None:
        self._key = key
        self._hasher = ReceiptHasher(key.log_id)

    def __call__(self, seq: int, leaf: bytes, signature: bytes | None, blobs: set[bytes]) -> Iterator[str]:
        try:
            receipt = decode_leaf(leaf)
        except OpenLoRAError as error:
            yield f"receipt {seq}: {error.message}"
            return
        if receipt.seq != seq:
            yield f"receipt {seq}: its leaf says {receipt.seq}"
        if receipt.log_id != self._key.log_id:
            yield f"receipt {seq}: of log {receipt.log_id.hex()}"
        yield from self._check_signature(receipt, leaf, signature)
        for name in receipt.blob_hashes:
            if name not in blobs:
                yield f"receipt {seq}: the blob {name.hex()} is missing or changed"

    def _check_signature(self, receipt: Receipt, leaf: bytes, signature: bytes | None) -> Iterator[str]:
        try:
            signer = recover_signer(self._hasher.digest(leaf), signature or b"")
        except OpenLoRAError as error:
            yield f"receipt {receipt.seq}: {error.message}"
            return
        if signer != self._key.signer:
            yield f"receipt {receipt.seq}: signed by {signer}"


def _check_row(log: ReceiptLog, logged: LoggedReceipt) -> Iterator[str]:
    """The columns that are there to find a receipt by."""
    if logged.leaf_hash != leaf_hash(logged.leaf):
        yield f"receipt {logged.seq}: the stored hash is not that of its leaf"
    found = log.get_by_request(logged.leaf[_REQUEST_ID].hex())
    if found is None or found.seq != logged.seq:
        yield f"receipt {logged.seq}: it is found by another request than its leaf's"


def _check_checkpoints(key: LogKey, signed: Sequence[SignedCheckpoint], tree: MerkleTree) -> Iterator[str]:
    for one in signed:
        try:
            noted = verify_checkpoint(one.note, key)
        except OpenLoRAError as error:
            yield f"checkpoint of {one.size}: {error}"
            continue
        if (noted.size, noted.root) != (one.size, one.root):
            yield f"checkpoint of {one.size}: its note says {noted.size} and {noted.root.hex()}"
        if one.size > tree.size:
            yield f"checkpoint of {one.size}: there are {tree.size} receipts"
        elif tree.root(one.size) != one.root:
            yield f"checkpoint of {one.size}: the leaves give the root {tree.root(one.size).hex()}"


def _check_journal(log: ReceiptLog, journal: Path) -> Iterator[str]:
    """What the journal still has of completions, against the receipts."""
    first = log.first_completion
    try:
        for frame, _, _ in JournalReader(journal).read():
            if isinstance(frame, CompletionFrame) and frame.seq >= first:
                logged = log.get(frame.seq - first)
                if logged is not None and not agrees(logged, frame):
                    yield f"receipt {logged.seq}: not of the journal's completion {frame.seq}"
    except OpenLoRAError as error:
        yield f"journal: {error.message}"
