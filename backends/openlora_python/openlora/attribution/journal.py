"""The usage journal: the one thing that must be durable before an answer's last response leaves.

The generation step owns it. Intents and completions are acknowledged by callback after an `fdatasync` that many of them
share (group commit); progress is written at once and never synced. Any error of the disk ends acknowledgement: after
a failed fsync the kernel may have dropped the pages, so a retry would prove nothing. The way on is `reopen`.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from ..errors import Internal, NotAuthenticated, Overloaded, Unavailable
from .blobs import check_blobs
from .frames import (
    START,
    STATUS_ABORTED,
    STATUS_CANCELLED,
    STATUS_COMPLETE,
    STATUS_ERROR,
    CompletionFrame,
    Entry,
    IntentFrame,
    Mark,
    Position,
    ProgressFrame,
    encode_checked,
    encode_frame,
    list_segments,
    make_directory,
    segment_path,
    sync_directory,
)
from .reader import JournalReader
from .recovery import JournalState, RecoveryReport, scan_journal
from .registry_reference import RegistryReference
from .segment import SegmentWriter

__all__ = [
    "START",
    "STATUS_ABORTED",
    "STATUS_CANCELLED",
    "STATUS_COMPLETE",
    "STATUS_ERROR",
    "CompletionFrame",
    "Entry",
    "IntentFrame",
    "Journal",
    "JournalReader",
    "Position",
    "ProgressFrame",
    "RecoveryReport",
]

logger = logging.getLogger(__name__)

_RETRY_MS = 1_000


@dataclass(frozen=True)
class _Intents:
    encoded: bytes
    on_durable: Callable[[], None]
    on_error: Callable[[BaseException], None]


@dataclass(frozen=True)
class _Completion:
    frame: CompletionFrame  # its seq is given when it is written
    on_durable: Callable[[int], None]
    on_error: Callable[[BaseException], None]


class Journal:
    """The single writer of a journal directory; `open` it, never construct it.

    Every method may be called from any thread. Callbacks come on the journal's own thread, in the order of the
    journal, and must be short; `on_error` and `on_failure` get the error that `failed` then holds.
    """

    recovery: RecoveryReport
    """What the last `open` or `reopen` found."""

    def __init__(
        self,
        directory: Path,
        lock_descriptor: int,
        segment_bytes: int,
        queue_limit: int,
        retain_seconds: int,
        on_failure: Callable[[BaseException], None] | None,
    ) -> None:
        self._directory = directory
        self._lock_descriptor = lock_descriptor
        self._segment_bytes = segment_bytes
        self._queue_limit = queue_limit
        self._retain_seconds = retain_seconds
        self._on_failure = on_failure
        self._erase_lock = threading.Lock()
        self._queue_changed = threading.Condition()  # guards the queue, `_closing` and the two maps
        self._queue: deque[_Intents | _Completion] = deque()
        self._closing = False
        self._open: dict[str, int] = {}  # request id → started_at, of requests that have no completion yet
        self._segment_of: dict[str, int] = {}  # request id → segment, of every intent in the live segments
        self._next_seq = 0
        self._recovered: JournalState | None = None  # kept while a reopen fails, because the scan cuts the tail
        self._start(None)

    @classmethod
    def open(
        cls,
        directory: Path,
        wait: bool = True,
        *,
        segment_bytes: int = 64 << 20,
        queue_limit: int = 4096,
        retain_seconds: int = 120,
        on_failure: Callable[[BaseException], None] | None = None,
    ) -> Journal:
        """Open or create the journal, close what a crash left open, and start the writer.

        Waits for another process that still holds the journal, or raises Unavailable at once with `wait` false.
        `queue_limit` bounds the intents that wait for the disk; `retain_seconds` is how long an erasable segment stays,
        so that ids younger than a ticket's life are still known. OSError: the directory can't be used.
        """
        make_directory(directory, 0o700)
        lock_descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock_descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return cls(directory, lock_descriptor, segment_bytes, queue_limit, retain_seconds, on_failure)
        except BlockingIOError as error:
            os.close(lock_descriptor)
            raise Unavailable(f"another process holds the journal in {directory}", retry_after_ms=_RETRY_MS) from error
        except BaseException:
            os.close(lock_descriptor)
            raise

    @property
    def failed(self) -> Unavailable | None:
        """Why nothing is acknowledged any more; None while the journal works."""
        return self._writer.failed

    def append(
        self,
        frames: Sequence[IntentFrame],
        on_durable: Callable[[], None],
        on_error: Callable[[BaseException], None],
    ) -> None:
        """Queue intents; `on_durable` comes once all of them are on disk.

        NotAuthenticated: a request id was used before. InvalidArgument: a field is out of range. Overloaded: too many
        wait. Unavailable: the journal has failed. With any of these nothing was queued and no callback comes.
        """
        for frame in frames:
            check_blobs(frame.base_digest, frame.runtime, frame.adapters, frame.terms)
            if frame.registry:
                RegistryReference.parse(frame.registry)
        encoded = [encode_checked(frame) for frame in frames]
        with self._queue_changed:
            self._refuse_if_stopped()
            if len(self._queue) >= self._queue_limit:
                raise Overloaded(f"{len(self._queue)} records wait for the journal", retry_after_ms=_RETRY_MS)
            new: set[str] = set()
            for frame in frames:
                if frame.request_id in self._segment_of or frame.request_id in new:
                    raise NotAuthenticated(f"{frame.request_id} is in the journal already", field="request_id")
                new.add(frame.request_id)
            for frame in frames:
                self._open[frame.request_id] = frame.started_at
                self._segment_of[frame.request_id] = self._writer.durable.segment
            self._queue.append(_Intents(b"".join(encoded), on_durable, on_error))
            self._queue_changed.notify()

    def append_progress(self, frames: Sequence[ProgressFrame]) -> None:
        """Write what is about to be sent, in one write and without a sync; return when it is in the file.

        Unavailable: it is not in the file, and the responses must not be sent.
        """
        try:
            self._writer.write(b"".join([encode_frame(frame) for frame in frames]))
        except Unavailable:
            with self._queue_changed:
                self._queue_changed.notify()  # the writer thread has to tell everybody who waits
            raise

    def append_completion(
        self,
        request_id: str,
        status: int,
        out_tokens: int,
        output_commit: bytes,
        ended_at: int,
        on_durable: Callable[[int], None],
        on_error: Callable[[BaseException], None],
    ) -> None:
        """Queue the end of a request; `on_durable` gets its completion number once it is on disk.

        Never refused for load: there is at most one for each intent. Internal: no open intent has this id.
        """
        with self._queue_changed:
            self._refuse_if_stopped()
            started_at = self._open.get(request_id)
            if started_at is None:
                raise Internal(f"request {request_id} has no open intent in the journal")
            # A clock that was set back must not end a request before it started.
            frame = CompletionFrame(request_id, 0, status, out_tokens, output_commit, max(ended_at, started_at))
            encode_checked(frame)
            del self._open[request_id]
            self._queue.append(_Completion(frame, on_durable, on_error))
            self._queue_changed.notify()

    def erase_before(self, segment: int) -> tuple[int, ...]:
        """Erase segments below `segment` (never the one in use) that nothing was written to for `retain_seconds`.

        Segments hold salts, so what is projected should go. Returns the numbers of those that went.
        """
        erased = set()
        newest = time.time() - self._retain_seconds
        with self._erase_lock:
            for number in list_segments(self._directory):
                path = segment_path(self._directory, number)
                if number >= min(segment, self._writer.durable.segment) or path.stat().st_mtime > newest:
                    break
                path.unlink()
                sync_directory(self._directory)  # one by one: a power cut must leave no gap
                erased.add(number)
        with self._queue_changed:
            self._segment_of = {name: place for name, place in self._segment_of.items() if place not in erased}
        return tuple(sorted(erased))

    def reopen(self) -> RecoveryReport:
        """After a failure: cut what was not acknowledged, close every open request as aborted, go on in a new segment.

        The caller has ended all its running requests before, because their completions are refused from here on.
        Unavailable: the disk still fails, and the journal stays failed.
        """
        if self._writer.failed is None:
            raise Internal("the journal has not failed; there is nothing to reopen")
        self._thread.join()
        self._writer.close()
        self._start(self._writer.durable)
        return self.recovery

    def close(self) -> None:
        """Make everything queued durable, stop the writer and let go of the lock."""
        with self._queue_changed:
            self._closing = True
            self._queue_changed.notify()
        self._thread.join()
        self._writer.close()
        os.close(self._lock_descriptor)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self, acknowledged_to: Position | None) -> None:
        """Recover into a new segment and start the writer thread on it."""
        try:
            state = self._recovered = self._recovered or scan_journal(self._directory, acknowledged_to)
            segment = state.segments[-1] + 1 if state.segments else 0
            writer = SegmentWriter(self._directory, segment, state.next_seq)
            closings = state.closings()
            try:
                writer.sync(writer.write(b"".join([encode_frame(frame) for frame in closings])))
            except Unavailable:
                writer.close()
                segment_path(self._directory, segment).unlink()
                raise
        except OSError as error:
            raise Unavailable(f"the usage journal can't be opened: {error}", retry_after_ms=_RETRY_MS) from error
        self._recovered = None
        self.recovery = RecoveryReport(closings, state.torn_bytes, state.started_at)
        self._next_seq = state.next_seq + len(closings)
        with self._queue_changed:
            self._open = {}
            self._segment_of = state.segment_of
            self._writer = writer
        self._erase_projected()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def _refuse_if_stopped(self) -> None:
        if self._writer.failed is not None:
            raise self._writer.failed
        if self._closing:
            raise Unavailable("the journal is closing")

    def _run(self) -> None:
        """The writer thread: one write and one sync for everything that came while the last ones ran."""
        while True:
            with self._queue_changed:
                self._queue_changed.wait_for(lambda: self._queue or self._closing or self._writer.failed)
                batch = list(self._queue)
                self._queue.clear()
            if self._writer.failed is None and not batch:
                return
            try:
                self._commit(batch)
            except Unavailable as error:
                with self._queue_changed:
                    late = list(self._queue)
                    self._queue.clear()
                for item in late:
                    _call(item.on_error, error)
                if self._on_failure is not None:
                    _call(self._on_failure, error)
                return

    def _commit(self, batch: Sequence[_Intents | _Completion]) -> None:
        parts: list[bytes] = []
        acknowledgements: list[Callable[[], None]] = []
        seq = self._next_seq
        for item in batch:
            if isinstance(item, _Intents):
                parts.append(item.encoded)
                acknowledgements.append(item.on_durable)
            else:
                parts.append(encode_frame(msgspec.structs.replace(item.frame, seq=seq)))
                acknowledgements.append(partial(item.on_durable, seq))
                seq += 1
        try:
            end = self._writer.write(b"".join(parts))
            self._writer.sync(end)
        except Unavailable as error:
            for item in batch:
                _call(item.on_error, error)
            raise
        self._next_seq = seq
        for acknowledge in acknowledgements:
            _call(acknowledge)
        if end.offset >= self._segment_bytes:
            self._writer.rotate(seq)
            self._erase_projected()

    def _erase_projected(self) -> None:
        projected = Mark(self._directory, "projected").read()
        if projected is None:
            return
        try:
            self.erase_before(projected.segment)
        except OSError:
            logger.exception("projected journal segments can't be erased; they stay until the next attempt")


def _call(callback: Callable[..., None], *arguments: object) -> None:
    """Run a callback; its failure is its owner's and must not keep the others from theirs."""
    try:
        callback(*arguments)
    except Exception:
        logger.exception("a callback of the journal failed")
