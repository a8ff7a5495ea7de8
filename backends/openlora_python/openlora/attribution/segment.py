"""The segment at the end of a usage journal: writing, syncing and changing to the next one."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from ..errors import Unavailable
from .frames import (
    Mark,
    Position,
    SegmentHeader,
    encode_frame,
    segment_path,
    sync_directory,
)


class SegmentWriter:
    """Appends to the last segment and tells readers how far it is durable. Thread-safe.

    The first OSError is kept in `failed`, and every later call raises it: behind a write that stopped half-way nothing
    could be read, and behind a failed sync nothing is known.
    """

    def __init__(self, directory: Path, segment: int, next_seq: int) -> None:
        """Create the segment, durably with its header. OSError: it can't be created."""
        self.failed: Unavailable | None = None
        self._directory = directory
        self._mark = Mark(directory, "durable")
        self._lock = threading.Lock()  # guards the file, `_end` and `failed`
        self._descriptor, self._end = self._create(segment, next_seq)
        self.durable = self._end

    def write(self, data: bytes) -> Position:
        """Put whole frames into the file, without a sync; the position behind them. Unavailable: they are not there."""
        with self._lock:
            if self.failed is not None:
                raise self.failed
            try:
                _write_all(self._descriptor, data)
            except OSError as error:
                raise self._fail(error) from error
            self._end = Position(self._end.segment, self._end.offset + len(data))
            return self._end

    def sync(self, end: Position) -> None:
        """Make everything up to `end` (of this segment) durable, then visible to readers. Unavailable: it may not be.

        One thread calls this and `rotate`; others may write meanwhile.
        """
        try:
            os.fdatasync(self._descriptor)
            self._mark.publish(end)
        except OSError as error:
            with self._lock:
                raise self._fail(error) from error
        self.durable = end

    def rotate(self, next_seq: int) -> None:
        """End this segment, durable to its last byte, and go on in the next one. Unavailable: the disk failed."""
        with self._lock:
            if self.failed is not None:
                raise self.failed
            try:
                os.fdatasync(self._descriptor)
                descriptor, end = self._create(self._end.segment + 1, next_seq)
                os.close(self._descriptor)
                self._descriptor, self._end = descriptor, end
                self._mark.publish(end)
            except OSError as error:
                raise self._fail(error) from error
            self.durable = end

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
            self._descriptor = -1
            self.failed = self.failed or Unavailable("the journal is closed")

    def _create(self, segment: int, next_seq: int) -> tuple[int, Position]:
        path = segment_path(self._directory, segment)
        header = encode_frame(SegmentHeader(segment, next_seq))
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            _write_all(descriptor, header)
            os.fsync(descriptor)
            sync_directory(self._directory)
        except OSError:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        return descriptor, Position(segment, len(header))

    def _fail(self, error: OSError) -> Unavailable:
        if self.failed is None:
            self.failed = Unavailable(f"the usage journal can't be written: {error}", retry_after_ms=1_000)
        return self.failed


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
