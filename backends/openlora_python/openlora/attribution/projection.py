"""From journal to log: every completed request becomes a signed receipt, in the journal's order, exactly once.

There is one path for all of them. What a crash left unfinished is closed by the journal when it opens again, and
what was not logged yet is read again from the log's low-water mark; both give the bytes that an undisturbed run gives.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import msgspec
from msgspec.structs import replace

from ..errors import Internal
from .frames import CompletionFrame, IntentFrame, Mark, Position
from .log import LoggedReceipt, NewReceipt, ReceiptLog
from .reader import JournalReader
from .receipt import HashedBlobs, hashed_blobs, receipt_from_frames


class Projector:
    """Tails a journal directory into a log. One thread at a time may call it."""

    def __init__(self, journal_directory: Path, log: ReceiptLog) -> None:
        self._directory = journal_directory
        self._log = log
        self._first_completion = log.first_completion
        self._projected_mark = Mark(journal_directory, "projected")
        self._blobs_of = _KnownBlobs()
        self._rewind()

    def project(self, limit: int = 1024) -> range:
        """Log the next completions that are durable in the journal, up to `limit`, in one transaction.

        Returns the numbers of the new receipts; an empty range when there is nothing new. Call it until then. Internal:
        journal and log contradict each other, or the journal is damaged; nothing was logged by this call.
        """
        first = self._next_seq
        try:
            new = self._take(limit)
            if new:
                self._log.append(new, self._low_water)
        except BaseException:
            self._rewind()
            raise
        return range(first, self._next_seq)

    def release(self, checkpointed: int) -> None:
        """Let the journal erase what is no longer needed, if the first `checkpointed` receipts are all there are.

        Not before: until a checkpoint covers them, journal segments are the other copy of what receipts say.
        """
        if 0 < checkpointed >= self._log.size():  # the journal may not be there before the first one
            self._projected_mark.publish(self._log.low_water)

    @property
    def _low_water(self) -> Position:
        """The earliest position from which all open intents can be read again."""
        for _, start in self._open.values():  # in the journal's order
            return start
        return self._reader.position

    def _rewind(self) -> None:
        self._reader = JournalReader(self._directory, self._log.low_water)
        self._next_seq = self._log.size()
        self._open: dict[str, tuple[IntentFrame, Position]] = {}

    def _take(self, limit: int) -> list[NewReceipt]:
        new: list[NewReceipt] = []
        for frame, start, _ in self._reader.read():
            if isinstance(frame, IntentFrame):
                self._open[frame.request_id] = (frame, start)
            elif isinstance(frame, CompletionFrame):
                intent, _ = self._open.pop(frame.request_id, (None, start))
                seq = frame.seq - self._first_completion
                if seq < 0:
                    continue  # the log before this one has it
                frame = replace(frame, seq=seq)
                if seq < self._next_seq:
                    self._check_logged(frame)
                    continue
                if intent is None or seq > self._next_seq:
                    raise Internal(f"the journal has completion {seq} of this log, which expects {self._next_seq}")
                unsigned = receipt_from_frames(intent, frame, self._log.key.log_id, self._blobs_of)
                new.append(
                    NewReceipt(unsigned.receipt, unsigned.leaf, unsigned.blobs, intent.prompt_salt, intent.output_salt)
                )
                self._next_seq += 1
                if len(new) == limit:
                    break
        return new

    def _check_logged(self, frame: CompletionFrame) -> None:
        """What is durable never changes: a difference means that one of the two was restored from a copy."""
        logged = self._log.get(frame.seq)
        if logged is None:
            raise Internal(f"receipt {frame.seq} is missing in the log")
        if not agrees(logged, frame):
            raise Internal(f"receipt {frame.seq} is not of the journal's completion: one of them was rolled back")


def agrees(logged: LoggedReceipt, frame: CompletionFrame) -> bool:
    """Whether a receipt is of this completion, whatever numbers the two have."""
    receipt = logged.receipt
    facts = (receipt.request_id.hex(), frame.seq, receipt.status, receipt.out_tokens, receipt.output_commit)
    return CompletionFrame(*facts, receipt.ended_at) == frame


class _KnownBlobs:
    """`hashed_blobs` that remembers: requests repeat few combinations of base, adapters and terms."""

    _CAPACITY = 1024

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, HashedBlobs] = OrderedDict()
        self._encode = msgspec.msgpack.Encoder().encode

    def __call__(self, intent: IntentFrame) -> HashedBlobs:
        key = self._encode((intent.base_digest, intent.runtime, intent.adapters, intent.terms, intent.registry))
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = hashed_blobs(intent)
            if len(self._known) > self._CAPACITY:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(key)
        return known
