"""A scheduler that runs without a model: every step "computes" at once, adapters load at once, rules are checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Ordered

import torch
from adapter_store import AdapterStore
from tiny_models import use

from openlora.engine.adapter_block import Adapter
from openlora.engine.api import AdapterUse, EngineRequest, Sampling
from openlora.engine.kv_cache import KVCache
from openlora.engine.prefix_cache import PrefixCache
from openlora.engine.residency import Residency
from openlora.engine.sampling import SamplingState
from openlora.engine.scheduler import Scheduler, Sequence, Work
from openlora.engine.step_budget import StepBudget


class LoadsAtOnce(Residency):
    """Has loaded what is wanted when `hold` and `ready` return."""

    def hold(self, uses: Ordered[AdapterUse]) -> bool:
        held = super().hold(uses)
        self._load_all()
        return held

    def ready(self, uses: Ordered[AdapterUse]) -> list[Adapter] | None:
        adapters = super().ready(uses)
        self._load_all()
        return super().ready(uses) if adapters is None else adapters

    def _load_all(self) -> None:
        while self.load_next():
            pass


class SchedulerRun:
    """Drives a scheduler as the engine does. `admitted` and `preempted` hold (turn of the loop, sequence) in order.

    The output of a request is its prompt's first token over and over, so that outputs can be prefixes, too.
    """

    def __init__(
        self,
        *,
        blocks: int = 64,
        block_size: int = 4,
        max_batch: int = 4,
        max_step_tokens: int = 16,
        max_adapters: int = 4,
        host_bytes: int = 1 << 40,
        prefix_cache: bool = True,
    ) -> None:
        self.cache = KVCache(
            layers=1,
            kv_heads=1,
            head_dim=1,
            tokens=blocks * block_size,
            block_size=block_size,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        residency = LoadsAtOnce(AdapterStore().open, slots=max_adapters, host_bytes=host_bytes, wake=lambda: None)
        prefix = PrefixCache(self.cache.pool, block_size, "0" * 64, enabled=prefix_cache)
        budget = StepBudget(max_step_tokens, 2.0)
        self.scheduler = Scheduler(self.cache, prefix, residency, budget, max_batch=max_batch)
        self.turns = 0
        self.admitted: list[tuple[int, Sequence]] = []
        self.preempted: list[tuple[int, Sequence]] = []
        self.ended: list[Sequence] = []
        self.admitted_before: dict[Sequence, int] = {}  # how many admissions there were when it came
        self._arrivals = 0
        self._watch()

    def _watch(self) -> None:
        admit, preempt = self.scheduler._admit, self.scheduler.preempt

        def watched_admit(sequence: Sequence) -> bool | None:
            result = admit(sequence)
            if result:
                self.admitted.append((self.turns, sequence))
            return result

        def watched_preempt(sequence: Sequence) -> None:
            assert sequence is self.scheduler.running[-1], "not the least senior one"
            assert len(self.scheduler.running) > 1, "nobody was left to make progress"
            self.preempted.append((self.turns, sequence))
            preempt(sequence)

        self.scheduler._admit, self.scheduler.preempt = watched_admit, watched_preempt

    def add(
        self, prompt: Ordered[int], adapters: Ordered[str] = (), *, max_tokens: int = 4, priority: int = 0
    ) -> Sequence:
        sampling = Sampling(max_tokens=max_tokens, temperature=0.0)
        uses = tuple(use(adapter) for adapter in adapters)
        request = EngineRequest(str(self._arrivals), tuple(prompt), uses, sampling, priority)
        state = SamplingState(sampling, request.prompt)
        chain = self.scheduler.prefix.chain(request)
        sequence = Sequence(request, self._arrivals, state, list(prompt), chain)
        self._arrivals += 1
        self.scheduler.add(sequence)
        self.admitted_before[sequence] = len(self.admitted)
        return sequence

    def step(self) -> list[Work]:
        """One turn of the loop, checked."""
        self.turns += 1
        assert self.scheduler.admit() == []
        works = self.scheduler.schedule()
        self.check(works)
        completing = [work.sequence for work in works if work.completes]
        self.scheduler.computed(works)
        self.scheduler.timed(0.01 + 0.001 * sum(work.tokens for work in works))
        for sequence in completing:
            sequence.token_ids.append(sequence.request.prompt[0])
            sequence.sampling.append(sequence.request.prompt[0])
            if len(sequence.sampling.output) == sequence.request.sampling.max_tokens:
                self.scheduler.remove(sequence)
                self.ended.append(sequence)
        self.check([])
        return works

    def finish(self, most: int = 100_000) -> None:
        """Steps until nobody is left."""
        for _ in range(most):
            if not (self.scheduler.waiting or self.scheduler.running):
                assert self.cache.pool.available == self.cache.pool.total
                assert self.scheduler.residency.held == 0
                return
            self.step()
        raise AssertionError(f"not finished in {most} steps")

    def check(self, works: list[Work]) -> None:
        """What must hold at any time, and of the work of a step before it is done."""
        pool, size, running = self.cache.pool, self.cache.block_size, self.scheduler.running
        holders = Counter(block for sequence in running for block in sequence.blocks.ids)
        assert {block: pool.holders(block) for block in holders} == holders
        assert pool.held == len(holders)
        assert len(pool._free) + pool.held + pool.idle == pool.total
        assert not any(sequence.blocks.ids for sequence in self.scheduler.waiting)
        assert len(running) <= self.scheduler.max_batch
        assert len({one.digest for s in running for one in s.request.adapters}) <= self.scheduler.residency.slots
        for sequence in running:
            # At most one block per sequence is partly empty, and none is kept for later.
            assert len(sequence.blocks.ids) <= self.cache.blocks_for(len(sequence.token_ids))
        for work in works:
            sequence = work.sequence
            written = range(sequence.computed // size, self.cache.blocks_for(sequence.computed + work.tokens))
            assert all(pool.writable(sequence.blocks.ids[index]) for index in written)
        if works:
            assert any(work.sequence is running[0] for work in works), "the most senior one stands still"
