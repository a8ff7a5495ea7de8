"""Who runs in the next step: admission in order, then one token for each decoding row and prefill with what is left."""

from __future__ import annotations

import bisect
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field

from ..errors import Internal, OpenLoRAError
from .adapter_slots import AdapterSlots
from .api import WEIGHT_ONE, EngineRequest
from .kv_cache import KVCache, SequenceBlocks
from .lora import WeightedAdapter
from .sampling import SamplingState


@dataclass(eq=False)
class Sequence:
    """One request from submission to its last token."""

    request: EngineRequest
    arrival: int
    sampling: SamplingState
    token_ids: list[int]  # prompt, then output
    computed: int = 0  # leading tokens whose keys and values are in the cache
    pinned: bool = False  # its adapters hold slots
    overtaken: int = 0  # younger requests admitted while it waited for room
    blocks: SequenceBlocks = field(default_factory=lambda: SequenceBlocks(0))
    adapters: tuple[WeightedAdapter, ...] = ()

    @property
    def order(self) -> tuple[int, int]:
        return self.request.priority, self.arrival


@dataclass(frozen=True)
class Work:
    """The next `tokens` tokens of a sequence, to be computed in this step."""

    sequence: Sequence
    tokens: int

    @property
    def completes(self) -> bool:
        """Whether all known tokens are computed then, so that the next one can be chosen."""
        return self.sequence.computed + self.tokens == len(self.sequence.token_ids)


class Scheduler:
    """Queues and admission. A running sequence has a row, all its cache blocks reserved and its adapters pinned, so
    nothing that runs ever waits for memory."""

    def __init__(
        self, cache: KVCache, slots: AdapterSlots, *, max_batch: int, max_step_tokens: int, max_model_len: int
    ) -> None:
        self.cache = cache
        self.slots = slots
        self.max_batch = max_batch
        self.max_step_tokens = max_step_tokens
        self.max_model_len = max_model_len
        self.waiting: list[Sequence] = []  # by priority, then arrival
        self.running: list[Sequence] = []  # by admission

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=lambda other: other.order)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, whatever phase it is in, and give back all that it held."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self.cache.release(sequence.blocks)
        if sequence.pinned:
            self.slots.unpin(sequence.request.adapters)
            sequence.pinned = False

    def reservation(self, request: EngineRequest) -> int:
        """Tokens that a request may have to keep: the last one it makes is never fed back."""
        return min(len(request.prompt) + request.sampling.max_tokens, self.max_model_len) - 1

    def admit(self) -> list[tuple[Sequence, OpenLoRAError]]:
        """Move waiting sequences to running, in order, and start loading what they need.

        One that lacks room may be overtaken by those that have it, but only `max_batch` times: then it goes next.
        Returns the sequences whose adapters can't be had.
        """
        failed: list[tuple[Sequence, OpenLoRAError]] = []
        blocked: list[Sequence] = []
        beyond = 0
        for sequence in list(self.waiting):
            if len(self.running) >= self.max_batch:
                # No row is free; the next in line load their adapters meanwhile.
                beyond += 1
                if beyond > self.max_batch:
                    break
            starving = sequence.overtaken >= self.max_batch
            try:
                admitted = self._admit(sequence)
                if admitted is None and starving:
                    self._unpin_behind(sequence)
                    admitted = self._admit(sequence)
            except OpenLoRAError as error:
                failed.append((sequence, error))
                continue
            if admitted is None:
                blocked.append(sequence)
                if starving:
                    break
            elif admitted:
                for older in blocked:
                    older.overtaken += 1
        return failed

    def _unpin_behind(self, sequence: Sequence) -> None:
        """Younger sequences give up the slots that they hold in advance: they may be what this one waits for."""
        for younger in self.waiting[self.waiting.index(sequence) + 1 :]:
            if younger.pinned:
                self.slots.unpin(younger.request.adapters)
                younger.pinned = False

    def _admit(self, sequence: Sequence) -> bool | None:
        """True when it runs now, False while its adapters load or no row is free, None when slots or cache are full."""
        uses = sequence.request.adapters
        if not sequence.pinned:
            sequence.pinned = self.slots.pin(uses)
            if not sequence.pinned:
                return None
        adapters = self._resident(sequence)
        if adapters is None or len(self.running) >= self.max_batch:
            return False
        blocks = self.cache.reserve(self.reservation(sequence.request))
        if blocks is None:
            return None
        sequence.blocks, sequence.adapters = blocks, adapters
        self.waiting.remove(sequence)
        self.running.append(sequence)
        return True

    def _resident(self, sequence: Sequence) -> tuple[WeightedAdapter, ...] | None:
        uses = sequence.request.adapters
        try:
            adapters = self.slots.resident(uses)
        except OpenLoRAError:
            raise
        except Exception as error:
            raise Internal(f"loading an adapter failed: {type(error).__name__}: {error}") from error
        if adapters is None:
            return None
        return tuple(
            WeightedAdapter(adapter, use.weight / WEIGHT_ONE) for adapter, use in zip(adapters, uses, strict=True)
        )

    def schedule(self) -> list[Work]:
        """The work of one step, at most `max_step_tokens` tokens; decoding rows come first and always run."""
        works = [Work(sequence, 1) for sequence in self.running if self._decodes(sequence)]
        budget = self.max_step_tokens - len(works)
        for sequence in self.running:
            if budget > 0 and not self._decodes(sequence):
                tokens = min(budget, len(sequence.token_ids) - sequence.computed)
                works.append(Work(sequence, tokens))
                budget -= tokens
        self._take_blocks(works)
        return works

    def _take_blocks(self, works: Ordered[Work]) -> None:
        self.cache.grow([(work.sequence.blocks, work.sequence.computed + work.tokens) for work in works])

    @staticmethod
    def _decodes(sequence: Sequence) -> bool:
        return len(sequence.token_ids) - sequence.computed == 1
