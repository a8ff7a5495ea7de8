"""Whether a state directory may still sign for its log, and what happens if it may not.

A directory that was restored from a backup does not know what it signed since; of a directory and its copy, both would
go on. Either way two trees could be signed that contradict each other. So the log is compared with what others saw of
it. Where that is another log, or it has forgotten a checkpoint that was released, it is closed; so is a file that is
another than the one that signed (see `file_identity`) and that nobody saw: the safe way is a new log.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from ..errors import Internal, Unavailable
from .checkpoint import Checkpoint
from .checkpointer import Checkpointer, released_checkpoint
from .log import ReceiptLog, publish_key
from .log_database import lock_log
from .log_key import LogKey
from .merkle_tree import MerkleTree
from .rotation import begin_rotation, finish_rotation

logger = logging.getLogger(__name__)

Observer = Callable[[LogKey], Checkpoint | None]
"""Who saw the log's trees: the newest one it knows of, or None if it never saw any. Unavailable: nobody knows now."""


class Custody(enum.Enum):
    """What came of the question."""

    KEPT = "this is the file that signed last"
    TAKEN = "copied or restored, and it begins with all that others saw of the log: it signs from now on"
    UNCOMPARED = "copied or restored, and those who could say more do not answer: no checkpoints until the next start"
    CLOSED = "copied or restored: it is not what others saw, or nobody saw it. Closed, a new log goes on"


def settle_custody(state_dir: Path, observers: Sequence[Observer]) -> Custody:
    """Before a server starts: compare the log with what others saw, and close it where it may not sign again.

    A file that looks like the one that signed is compared as well: it may have been restored in place.
    """
    if not (state_dir / "log" / "receipts.sqlite").exists():
        return Custody.KEPT
    with closing(ReceiptLog.open(state_dir)) as log:
        released = released_checkpoint(log)
        newest = log.newest_checkpoint()
        forgotten = released is not None and (newest is None or released.size > newest.size)
        heads, silent = _ask(log.key, observers)
        known = max([head.size for head in heads] + ([released.size] if forgotten else []), default=0)
        if forgotten or _contradicted(log, heads):
            custody = Custody.CLOSED
        elif log.in_custody:
            return Custody.KEPT
        elif silent:
            custody = Custody.UNCOMPARED
        elif heads:
            custody = Custody.TAKEN
            log.take_custody()
        else:
            custody = Custody.CLOSED
    if custody is Custody.CLOSED:
        rotate(state_dir, known)
    logger.warning("the receipt log in %s was %s", state_dir, custody.value)
    return custody


def rotate(state_dir: Path, known: int = 0) -> LogKey:
    """Close the log with a last checkpoint, if it may sign, and open the one that follows; the new one's key.

    `known`: see `begin_rotation`; such a log signs nothing more. Unavailable: a server runs on it.
    """
    with closing(ReceiptLog.open(state_dir, wait=False)) as log:
        if log.in_custody and not known:
            try:
                Checkpointer(log).sign_due(now=True)
            except Internal as error:
                logger.warning("closed without a last checkpoint: %s", error)
    lock = lock_log(state_dir / "log", wait=False)
    with open(lock, "rb", closefd=True):
        key = begin_rotation(state_dir, known)
        finish_rotation(state_dir)
        publish_key(state_dir, key)
    return key


def _ask(key: LogKey, observers: Sequence[Observer]) -> tuple[list[Checkpoint], bool]:
    """The trees that others saw, and whether any of them does not answer."""
    heads, silent = [], False
    for observe in observers:
        try:
            seen = observe(key)
        except Unavailable as error:
            logger.warning("nothing to compare the receipt log with: %s", error)
            silent = True
            continue
        if seen is not None:
            heads.append(seen)
    return heads, silent


def _contradicted(log: ReceiptLog, heads: Sequence[Checkpoint]) -> bool:
    if not heads:
        return False
    tree = MerkleTree(log.leaf_hashes())
    return any(head.size > tree.size or tree.root(head.size) != head.root for head in heads)
