"""What a usage journal says after a crash: found by reading its segments from the first one on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import Internal
from .commitments import output_commitment
from .frames import (
    STATUS_ABORTED,
    CompletionFrame,
    Frame,
    IntentFrame,
    Mark,
    Position,
    ProgressFrame,
    SegmentHeader,
    decode_frame,
    list_segments,
    segment_path,
    sync_directory,
    write_again,
)


@dataclass(frozen=True)
class RecoveryReport:
    """What opening a journal found."""

    aborted: tuple[CompletionFrame, ...]  # the closings of requests that a crash had left open
    torn_bytes: int  # cut from the tail of the last segment
    started_at: dict[str, int]  # request id → seconds, of every intent in the live segments


@dataclass
class JournalState:
    """What the valid frames of all live segments add up to."""

    segments: list[int] = field(default_factory=list)
    next_seq: int = 0
    open_intents: dict[str, IntentFrame] = field(default_factory=dict)
    progress: dict[str, ProgressFrame] = field(default_factory=dict)
    started_at: dict[str, int] = field(default_factory=dict)
    segment_of: dict[str, int] = field(default_factory=dict)  # request id → segment of its intent
    last_time: int = 0
    torn_bytes: int = 0

    def closings(self) -> tuple[CompletionFrame, ...]:
        """One aborted completion for each open intent, with what its last progress frame says was sent."""
        frames = []
        for seq, (request_id, intent) in enumerate(self.open_intents.items(), self.next_seq):
            sent = self.progress.get(request_id)
            frames.append(
                CompletionFrame(
                    request_id=request_id,
                    seq=seq,
                    status=STATUS_ABORTED,
                    out_tokens=sent.out_tokens if sent else 0,
                    output_commit=sent.output_commit if sent else output_commitment(intent.output_salt).digest(),
                    ended_at=self.last_time,
                )
            )
        return tuple(frames)

    def apply(self, frame: Frame, segment: int, acknowledged: bool) -> None:
        """Add one frame. Of those that nobody was told about, only what was sent counts."""
        if isinstance(frame, ProgressFrame):
            if frame.request_id in self.open_intents:
                self.progress[frame.request_id] = frame
        elif not acknowledged:
            return
        elif isinstance(frame, IntentFrame):
            self.open_intents[frame.request_id] = frame
            self.started_at[frame.request_id] = frame.started_at
            self.segment_of[frame.request_id] = segment
            self.last_time = max(self.last_time, frame.started_at)
        elif isinstance(frame, CompletionFrame):
            intent = self.open_intents.pop(frame.request_id, None)
            # The intent of a completion may lie in a segment that was erased since both were projected.
            if frame.seq != self.next_seq or (intent is None and self.segments[0] == 0):
                raise Internal(f"the journal is damaged: completion {frame.seq} where {self.next_seq} should be")
            self.progress.pop(frame.request_id, None)
            self.next_seq += 1
            self.last_time = max(self.last_time, frame.ended_at)
        else:
            raise Internal(f"the journal is damaged: a second header in segment {segment}")


def scan_journal(directory: Path, acknowledged_to: Position | None) -> JournalState:
    """Read all segments and cut the torn tail of the last one, durably.

    `acknowledged_to` bounds what counts after a write error in this process: the callers of everything behind it were
    told that it failed, so it is cut too. Internal: damage anywhere but in the tail, or below the `durable` mark.
    """
    state = JournalState()
    segments = list_segments(directory)
    if acknowledged_to is not None:
        for leftover in [number for number in segments if number > acknowledged_to.segment]:
            segment_path(directory, leftover).unlink()
            segments.remove(leftover)
    valid = Position(0, 0)
    for number in segments:
        last = number == segments[-1]
        if state.segments and number != state.segments[-1] + 1:
            raise Internal(f"segment {state.segments[-1] + 1} of the journal is missing in {directory}")
        valid = Position(number, _scan_segment(state, segment_path(directory, number), number, last, acknowledged_to))
    durable = Mark(directory, "durable").read()
    if durable is not None and valid < durable:
        raise Internal(
            f"the journal in {directory} ends at segment {valid.segment}, offset {valid.offset}, but was durable to "
            f"segment {durable.segment}, offset {durable.offset}: acknowledged frames are gone. "
            "Restore it, or remove the file `durable` to go on without them"
        )
    if segments:
        known = durable.offset if durable is not None and durable.segment == valid.segment else 0
        _cut(state, segment_path(directory, valid.segment), valid.offset, known)
    sync_directory(directory)
    return state


def _scan_segment(state: JournalState, path: Path, number: int, last: bool, acknowledged_to: Position | None) -> int:
    """Apply the frames of one segment; the offset behind the last one that stays."""
    content = path.read_bytes()
    found = decode_frame(content, 0)
    if found is None and last:
        return 0  # a crash before the header was synced: nothing was ever acknowledged from here
    if found is None or not isinstance(found[0], SegmentHeader) or found[0].segment != number:
        raise Internal(f"{path.name} does not begin with the header of segment {number}")
    header, offset = found
    if not state.segments:
        state.next_seq = header.next_seq
    elif header.next_seq != state.next_seq:
        raise Internal(f"{path.name} begins at completion {header.next_seq}, but {state.next_seq} comes next")
    state.segments.append(number)
    kept = offset
    while (found := decode_frame(content, offset)) is not None:
        frame, offset = found
        acknowledged = acknowledged_to is None or Position(number, offset) <= acknowledged_to
        state.apply(frame, number, acknowledged)
        if acknowledged:
            kept = offset
    if offset != len(content) and not last:
        raise Internal(f"{path.name} is damaged at offset {offset} and is not the last segment")
    state.torn_bytes = len(content) - offset
    return kept


def _cut(state: JournalState, path: Path, offset: int, durable: int) -> None:
    """End the last segment behind its last valid frame, durable to there; one without even a header goes."""
    if offset == 0:
        state.torn_bytes = path.stat().st_size
        path.unlink()
        return
    with open(path, "r+b", buffering=0) as segment:
        segment.truncate(offset)
    write_again(path, durable)
