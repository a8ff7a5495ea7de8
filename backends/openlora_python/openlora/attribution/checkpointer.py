"""Checkpoints of the receipt log: about one a second under traffic, of what is durable in it.

The tree's frontier stays in memory and is made anew from the leaf hashes at the start only. `log/checkpoint` is the
newest note; a log in a directory that was copied or restored signs none (see `custody`).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from ..errors import Internal, ReceiptInvalid
from .checkpoint import Checkpoint, verify_checkpoint
from .frames import sync_directory
from .log import ReceiptLog
from .merkle_tree import Frontier

SECONDS = 1.0
"""At least this long between two checkpoints."""


class Checkpointer:
    """Signs and releases the checkpoints of one log. One thread at a time may call it."""

    def __init__(self, log: ReceiptLog) -> None:
        """Build the frontier (2 s for a million receipts). Internal: the log is not what it has signed."""
        self._log = log
        self._frontier = Frontier()
        self._next = 0.0  # on the monotonic clock
        self._file = log.path.parent / "checkpoint"
        newest = log.newest_checkpoint()
        self.signed_size = newest.size if newest is not None else 0
        self._take(self.signed_size)
        if newest is None:
            return
        if self._frontier.size < newest.size or self._frontier.root() != newest.root:
            raise Internal(
                f"the {self._frontier.size} receipts in {log.path} are not those whose checkpoint of {newest.size} it "
                "signed: receipts were lost or changed. `openlora receipts fsck` says which; restore the file, or "
                "close the log with `openlora receipts rotate`"
            )
        released = released_checkpoint(log)
        if released is not None and released.size > newest.size:
            raise Internal(f"{self._file} is of {released.size} receipts, the log in {log.path} signed {newest.size}")
        if log.in_custody:
            release(self._file, newest.note)  # a crash may have come between signing and releasing

    def sign_due(self, *, now: bool = False) -> bool:
        """Sign and release a checkpoint of all receipts, if there are new ones and it is time (or `now` says so).

        Whether everything in the log is under a checkpoint afterwards. OSError: the note can't be written.
        """
        size = self._log.size()
        if size == self.signed_size:
            return True
        if not now and time.monotonic() < self._next or not self._log.in_custody:
            return False
        self._next = time.monotonic() + SECONDS
        self._take(size)
        signed = self._log.sign_checkpoint(size, self._frontier.root())
        release(self._file, signed.note)
        self.signed_size = size
        return True

    def _take(self, size: int) -> None:
        for leaf_hash in self._log.leaf_hashes(self._frontier.size, size):
            self._frontier.append(leaf_hash)


def released_checkpoint(log: ReceiptLog) -> Checkpoint | None:
    """The newest checkpoint that was released, by its file; None if there is none of this log."""
    try:
        return verify_checkpoint((log.path.parent / "checkpoint").read_bytes(), log.key)
    except (OSError, ReceiptInvalid):
        return None  # it is written anew from the log


def release(path: Path, note: str) -> None:
    """Put a note where everybody reads it: the old one or the new one is there, never a part."""
    draft = path.with_name(path.name + ".new")
    with draft.open("wb") as file:
        file.write(note.encode())  # whatever the locale: Triton's stubs run in C's
        file.flush()
        os.fsync(file.fileno())
    draft.chmod(0o644)
    draft.rename(path)
    sync_directory(path.parent)
