"""Tailing the usage journal from another process, while it is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import Internal
from .frames import (
    START,
    Entry,
    Mark,
    Position,
    decode_frame,
    list_segments,
    segment_path,
)

_CHUNK = 1 << 20


class JournalReader:
    """Reads durable frames in order from a position, and remembers how far it got.

    What lies behind the writer's `durable` mark is not there yet for a reader: an unsynced or half-written tail is
    never seen. Not thread-safe.
    """

    def __init__(self, directory: Path, position: Position = START) -> None:
        self.position = position
        self._directory = directory
        self._durable = Mark(directory, "durable")

    def read(self) -> Iterator[Entry]:
        """Every durable frame from `position` on, moving it along. Internal: a durable frame is missing or damaged."""
        durable = self._durable.read()
        while durable is not None and self.position < durable:
            yield from self._read_segment(durable)

    def _read_segment(self, durable: Position) -> Iterator[Entry]:
        segment, offset = self.position
        try:
            descriptor = os.open(segment_path(self._directory, segment), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            self.position = self._first_segment()
            return
        try:
            # A segment below the durable one is finished and durable to its last byte.
            limit = os.fstat(descriptor).st_size if segment < durable.segment else durable.offset
            if offset > limit:
                raise Internal(f"segment {segment} of the journal ends at {limit}, but was read to {offset} before")
            while offset < limit:
                for entry in self._read_chunk(descriptor, segment, offset, limit):
                    offset = entry.end.offset
                    self.position = entry.end
                    yield entry
        finally:
            os.close(descriptor)
        if segment < durable.segment:
            self.position = Position(segment + 1, 0)

    def _read_chunk(self, descriptor: int, segment: int, offset: int, limit: int) -> Iterator[Entry]:
        """The frames that are whole within a chunk; the chunk grows to the rest when not even one is."""
        for size in (min(_CHUNK, limit - offset), limit - offset):
            chunk = os.pread(descriptor, size, offset)
            place = 0
            while (found := decode_frame(chunk, place)) is not None:
                frame, end = found
                yield Entry(frame, Position(segment, offset + place), Position(segment, offset + end))
                place = end
            if place:
                return
        raise Internal(f"the journal is damaged: no whole frame at offset {offset} of segment {segment}")

    def _first_segment(self) -> Position:
        """Where to begin when the start was erased; only a reader that has read nothing may skip it."""
        segments = list_segments(self._directory)
        if self.position != START or not segments:
            raise Internal(f"segment {self.position.segment} of the journal is missing; there are {segments}")
        return Position(segments[0], 0)
