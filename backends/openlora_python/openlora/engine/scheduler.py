"""Who runs in the next step: admission in fair order, a token for each decoding stream, prompts with what is left."""

from __future__ import annotations

import bisect
import time
from dataclasses import dataclass, field

from ..errors import Internal, OpenLoRAError
from .api import WEIGHT_ONE, EngineRequest
from .fair_turns import FairTurns
from .kv_cache import KVCache, SequenceBlocks
from .lora import WeightedAdapter
from .prefix_cache import KeyChain, PrefixCache
from .residency import Residency
from .sampling import SamplingState
from .step_budget import StepBudget, StepLoad


@dataclass(eq=False)
class Sequence:
    """One request from submission to its last token."""

    request: EngineRequest
    arrival: int
    sampling: SamplingState
    token_ids: list[int]  # prompt, then output
    keys: KeyChain
    deadline: float | None = None  # of the monotonic clock
    submitted_at: float = field(default_factory=time.monotonic)
    queue_seconds: float | None = None  # until it first ran
    computed: int = 0  # leading tokens whose keys and values are in the cache
    cached: int | None = None  # leading prompt tokens that were in the cache when it first ran
    running: bool = False
    holds: bool = False  # slots, for its adapters
    overtaken: int = 0  # sequences behind it that were admitted while it waited for room
    turn: float = 0.0
    blocks: SequenceBlocks = field(default_factory=SequenceBlocks)
    adapters: tuple[WeightedAdapter, ...] = ()

    @property
    def place(self) -> tuple[int, float, int]:
        """Its place in the queue."""
        return self.request.priority, self.turn, self.arrival

    @property
    def seniority(self) -> tuple[int, int]:
        """Its place among those that run: the last one makes room when blocks run out."""
        return self.request.priority, self.arrival

    @property
    def decodes(self) -> bool:
        """Whether all but its last token is computed."""
        return len(self.token_ids) - self.computed == 1


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
    """Queues, admission, preemption.

    **Room.** A running sequence has a row, its adapters held in device slots (so a step never has more adapters than
    slots), and blocks for the tokens it has: at most one of them partly filled, none in reserve. It is admitted
    when there are blocks for all that is known of it and, beyond that, one for each sequence that then runs.

    **Preemption by recompute.** When decoding streams need more blocks than there are, the least senior running
    sequence (lowest priority, then youngest) gives up its own, and waits at the front of its priority's queue to
    compute its tokens again; what it published stays in the prefix cache as long as nobody needs the memory.
    *Progress*: seniority never changes, and the most senior running sequence is never chosen while another
    runs; alone it always fits, because no sequence may be longer than the cache. So it gets its token in every
    step, ends after at most `max_model_len` steps, and then the next one is the most senior. *No thrashing*: after an
    admission there is a block for each running sequence, and none takes a second one within `block_size` steps, so a
    preemption comes at least that many steps after the admission before it.

    **Order and fairness.** Lower priority numbers first; within one, `FairTurns` rotates among adapters, so that a long
    queue for one adapter does not hold up the others. A sequence that lacks slots, host memory for its adapters or
    blocks may be overtaken by those behind it, but only `max_batch` times: then nobody behind it is admitted, and those
    give up slots they hold in advance, until it fits. *Bound*: of the requests of its priority that arrive later, a
    request with n of its own adapters ahead of it sees at most (n + 1) of each other adapter set admitted first,
    `max_batch` that overtake it for want of room, and those that go on while its own adapters load. So no adapter
    starves, however many requests another one gets. Strict priorities may starve what is less urgent: the policy caps
    them.
    """

    def __init__(
        self,
        cache: KVCache,
        prefix: PrefixCache,
        residency: Residency,
        budget: StepBudget,
        *,
        max_batch: int,
    ) -> None:
        self.cache = cache
        self.prefix = prefix
        self.residency = residency
        self.budget = budget
        self.max_batch = max_batch
        self.waiting: list[Sequence] = []  # by place
        self.running: list[Sequence] = []  # by seniority
        self.preemptions = 0
        self.changed = False  # since the last admission: somebody came or left, or an adapter arrived
        self._turns = FairTurns()
        self._load = StepLoad()  # of the step that was scheduled last

    def add(self, sequence: Sequence) -> None:
        sequence.turn = self._turns.enter(sequence.request)
        self._enqueue(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, whatever phase it is in, and give back all that it held."""
        if sequence.running:
            self._stop(sequence)
        else:
            self._dequeue(sequence, served=False)
        self._release(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to the queue; it goes on holding its slots."""
        self._stop(sequence)
        sequence.computed = 0
        sequence.turn = self._turns.enter_again(sequence.request)
        self._enqueue(sequence)
        self.preemptions += 1

    def admit(self) -> list[tuple[Sequence, OpenLoRAError]]:
        """Move waiting sequences to running, in order, and start loading what they need.

        Looks at the first `2 · max_batch` only. Returns the sequences whose adapters can't be had.
        """
        if not self.changed:
            return []
        self.changed = False
        failed: list[tuple[Sequence, OpenLoRAError]] = []
        blocked: list[Sequence] = []
        for sequence in self.waiting[: 2 * self.max_batch]:
            # With nobody running, only slots that others hold in advance can be missing, and nobody will free them.
            starving = sequence.overtaken >= self.max_batch or not self.running
            try:
                admitted = self._admit(sequence)
                if admitted is None and starving:
                    self._release_behind(sequence)
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

    def schedule(self) -> list[Work]:
        """The work of one step: a token for every decoding stream, and of the prompts what the step's budget allows."""
        decoding = [sequence for sequence in self.running if sequence.decodes]
        self._make_room(decoding)
        prefilling = [sequence for sequence in self.running if not sequence.decodes]
        context = sum(len(sequence.token_ids) for sequence in decoding)
        allowance = self.budget.allow(len(decoding), context, len(prefilling))
        works = [Work(sequence, 1) for sequence in decoding]
        for sequence in prefilling:
            if allowance.tokens == 0:
                break
            self._catch_up(sequence)
            tokens = allowance.take(sequence.computed, len(sequence.token_ids) - sequence.computed)
            if tokens:
                works.append(Work(sequence, tokens))
        self._load = allowance.load
        return works

    def computed(self, works: list[Work]) -> None:
        """The forward of the step is done: its tokens count, and blocks that became full are for others to use."""
        for work in works:
            sequence = work.sequence
            sequence.computed += work.tokens
            if sequence.computed // self.cache.block_size > sequence.keys.published:
                self.prefix.publish(sequence.keys, sequence.token_ids, sequence.computed, sequence.blocks.ids)

    def timed(self, seconds: float) -> None:
        """The scheduled step took so long, all in all."""
        self.budget.observe(self._load, seconds)

    def distrust(self, sequence: Sequence) -> None:
        """What this sequence computed is not fit for others."""
        self.prefix.withdraw(sequence.blocks.ids)

    def _enqueue(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=lambda other: other.place)
        self.changed = True

    def _dequeue(self, sequence: Sequence, *, served: bool) -> None:
        del self.waiting[bisect.bisect_left(self.waiting, sequence.place, key=lambda other: other.place)]
        self._turns.leave(sequence.request, sequence.turn, served=served)
        self.changed = True

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.running = False
        self.cache.release(sequence.blocks)
        self.changed = True

    def _release(self, sequence: Sequence) -> None:
        if sequence.holds:
            self.residency.release(sequence.request.adapters)
            sequence.holds, sequence.adapters = False, ()

    def _release_behind(self, sequence: Sequence) -> None:
        """Those behind give up what they hold in advance: it may be what this one waits for."""
        for other in self.waiting[self.waiting.index(sequence) + 1 :]:
            self._release(other)

    def _admit(self, sequence: Sequence) -> bool | None:
        """True when it runs now, False while its adapters load or no row is free, None when slots, host memory or cache
        are full."""
        if not sequence.holds:
            sequence.holds = self.residency.hold(sequence.request.adapters)
            if not sequence.holds:
                return None
        if not self._take_adapters(sequence):
            return None if self.residency.lacks_room(sequence.request.adapters) else False
        if len(self.running) >= self.max_batch:
            return False
        if not self._take_blocks(sequence):
            return None
        self._dequeue(sequence, served=True)
        bisect.insort(self.running, sequence, key=lambda other: other.seniority)
        sequence.running = True
        if sequence.queue_seconds is None:
            sequence.queue_seconds = time.monotonic() - sequence.submitted_at
        return True

    def _take_adapters(self, sequence: Sequence) -> bool:
        """Whether all its adapters are resident."""
        uses = sequence.request.adapters
        if len(sequence.adapters) == len(uses):
            return True
        try:
            adapters = self.residency.ready(uses)
        except OpenLoRAError:
            raise
        except Exception as error:
            raise Internal(f"loading an adapter failed: {type(error).__name__}: {error}") from error
        if adapters is None:
            return False
        sequence.adapters = tuple(
            WeightedAdapter(adapter, use.weight / WEIGHT_ONE) for adapter, use in zip(adapters, uses, strict=True)
        )
        return True

    def _take_blocks(self, sequence: Sequence) -> bool:
        """Blocks for all its known tokens, those that are in the prefix cache shared; all or none.

        The last known token is always computed: the next one is chosen from its logits. If its block is among the
        shared ones, that takes a copy.
        """
        known = len(sequence.token_ids)
        full = known // self.cache.block_size
        blocks = SequenceBlocks(self.prefix.match(sequence.keys, sequence.token_ids, 0, full))
        cached = min(len(blocks.ids) * self.cache.block_size, known - 1)
        missing = self.cache.blocks_for(known) - cached // self.cache.block_size
        spare = len(self.running) + 1 if self.running else 0
        if missing + spare > self.cache.available_blocks:
            self.cache.release(blocks)
            return False
        if cached < len(blocks.ids) * self.cache.block_size:
            self.cache.make_writable(blocks, -1)
        self.cache.grow([(blocks, known)])
        sequence.blocks, sequence.computed = blocks, cached
        sequence.keys.published = cached // self.cache.block_size
        if sequence.cached is None:
            sequence.cached = cached
            self.prefix.lookup_tokens += known
            self.prefix.hit_tokens += cached
        return True

    def _catch_up(self, sequence: Sequence) -> None:
        """Blocks that others have computed since it was admitted take the place of its own empty ones."""
        size, known = self.cache.block_size, len(sequence.token_ids)
        if sequence.computed % size:
            return
        first = sequence.computed // size
        found = self.prefix.match(sequence.keys, sequence.token_ids, first, (known - 1) // size)
        if found:
            own = sequence.blocks.ids[first : first + len(found)]
            sequence.blocks.ids[first : first + len(found)] = found
            self.cache.pool.release(own)
            sequence.computed += len(found) * size
            sequence.keys.published = sequence.computed // size
            if not sequence.sampling.output:
                sequence.cached = sequence.computed
                self.prefix.hit_tokens += len(found) * size

    def _make_room(self, decoding: list[Sequence]) -> None:
        """A block for each decoding sequence that needs one; who is preempted for it no longer decodes."""
        size = self.cache.block_size
        lacking = [sequence for sequence in decoding if len(sequence.blocks.ids) * size < len(sequence.token_ids)]
        while len(lacking) > self.cache.available_blocks:
            self.preempt(self.running[-1])
            # Both lists are in the order of seniority, and victims come from its end.
            while lacking and not lacking[-1].running:
                lacking.pop()
        while decoding and not decoding[-1].running:
            decoding.pop()
        if lacking:
            self.cache.grow([(sequence.blocks, len(sequence.token_ids)) for sequence in lacking])
