"""The receipt log as its anchor worker sees it: signed checkpoints, and the root at any size from the leaves."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from ...attribution.chain_check import ChainCheck
from ...attribution.checkpoint import Checkpoint, verify_checkpoint
from ...attribution.file_identity import file_identity
from ...attribution.log import ReceiptLog
from ...attribution.merkle_tree import MerkleTree
from ...attribution.receipt import leaf_hash
from ...attribution.rotation import closed_directory
from ...errors import InvalidArgument, LogConflict, ReceiptInvalid, Unavailable

ZERO_ROOT = bytes(32)  # the contract's head of a log that has no anchor
_PAGE = 10_000


class LocalLog:
    """Reads a state directory's log; the tree in memory takes 64 bytes a receipt."""

    def __init__(self, state_dir: Path) -> None:
        """InvalidArgument: there is no log yet."""
        self._state_dir = state_dir
        self._tree = MerkleTree()
        self.checkpoint: Checkpoint | None = None
        self.is_closed = False  # since this was made: another log has its place
        self._checked: tuple[str, str, int, bytes] | None = None
        with closing(ReceiptLog.open(state_dir, read_only=True)) as log:
            self.key = log.key

    @property
    def size(self) -> int:
        return self._tree.size

    def refresh(self) -> None:
        """Read the newest checkpoint and all leaves since the last time.

        Raises:
            LogConflict: the checkpoint is not one of these leaves, or the log is gone.
            Unavailable: it is being moved to where closed logs lie, from where the next call reads.
            ReceiptInvalid: it is not signed by the log.
        """
        try:
            # before the leaves: a checkpoint is signed when its leaves are on disk
            note = (self._state_dir / "log" / "checkpoint").read_bytes()
        except FileNotFoundError:
            note = None
        try:
            checkpoint = verify_checkpoint(note, self.key) if note is not None else None
        except ReceiptInvalid:
            self._open().close()  # signed by the log that follows, if this one is closed by now
            raise
        self._read_leaves()
        if checkpoint is not None and self._differs(checkpoint.size, checkpoint.root):
            self._tree = MerkleTree()  # the files may have been replaced since their first leaves were read
            self._read_leaves()
            if self._differs(checkpoint.size, checkpoint.root):
                raise LogConflict(
                    f"the log's signed checkpoint of {checkpoint.size} receipts is not one of the {self.size} that are "
                    "there: nothing is anchored from it"
                )
        self.checkpoint = checkpoint

    def compare(self, size: int, root: bytes, now: float) -> None:
        """Compare an anchored head with the leaves, and keep the verdict for the attribution step.

        LogConflict: the log is behind the head, or another one; it is not to be anchored again.
        """
        verdict = "consistent"
        if self._differs(size, root):
            verdict = "behind" if size > self.size else "forked"
        identity = file_identity(self._state_dir / "log" / "receipts.sqlite")
        if self._checked != (identity, verdict, size, root):
            ChainCheck(
                log_id=self.key.log_id.hex(),
                verdict=verdict,
                head_size=size,
                head_root=root.hex(),
                log_size=self.size,
                file=identity,
                checked_at=now,
            ).save(self._state_dir)
            self._checked = (identity, verdict, size, root)
        if verdict == "behind":
            raise LogConflict(
                f"{size} receipts are anchored, this log has {self.size}: it was restored or copied from an older "
                "state. Nothing is anchored over it; start the server again, which goes on in a new log"
            )
        if verdict == "forked":
            raise LogConflict(
                f"the root anchored at {size} receipts is {root.hex()}, this log's is {self.root(size).hex()}: its "
                "history is another one. Nothing is anchored over it; start the server again, which goes on in a new "
                "log"
            )

    def root(self, size: int) -> bytes:
        """As the contract has it: zeros for no leaves."""
        return self._tree.root(size) if size else ZERO_ROOT

    def _differs(self, size: int, root: bytes) -> bool:
        if size == 0:
            return False
        return size > self.size or self._tree.root(size) != root

    def _follow_closed(self) -> None:
        closed = closed_directory(self._state_dir, self.key)
        if self.is_closed or not closed.exists():
            raise LogConflict(f"the log {self.key.log_id.hex()} is no longer in {self._state_dir}: start again")
        self._state_dir = closed
        self.is_closed = True

    def _open(self) -> ReceiptLog:
        try:
            log = ReceiptLog.open(self._state_dir, read_only=True)
        except InvalidArgument as error:
            raise Unavailable(f"the log is being moved: {error.message}") from error
        if log.key != self.key:
            log.close()
            self._follow_closed()
            raise Unavailable("the log was closed; its last checkpoint is anchored from where it lies now")
        return log

    def _read_leaves(self) -> None:
        with closing(self._open()) as log:
            size = log.size()
            if size < self._tree.size:
                self._tree = MerkleTree()
            while self._tree.size < size:
                for one in log.list(self._tree.size, min(_PAGE, size - self._tree.size)):
                    self._tree.append(leaf_hash(one.leaf))
