"""Batches of requests through an engine in this process, with a time for every token."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..adapters.manifest import adapter_manifest
from ..engine.api import WEIGHT_ONE, AdapterUse, EngineOutput, EngineRequest, Sampling
from ..engine.torch_engine import TorchEngine
from ..errors import Internal, from_message

_LOOK_SECONDS = 0.5  # between looks at an engine that says nothing: its loop may have stopped


@dataclass
class Timing:
    """One request: what was asked, and when each new token came, in seconds of `time.perf_counter`."""

    prompt_tokens: int
    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    finished: bool = False


@dataclass(frozen=True)
class Batch:
    """What one batch took. `began` is when its first request was handed over."""

    began: float
    timings: list[Timing]
    kv_blocks_used: int  # at the peak
    kv_blocks_wasted: int  # of those: more than the tokens in them need

    @property
    def ended(self) -> float:
        return max(timing.times[-1] for timing in self.timings)

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def prefilled(self) -> float:
        """When every request had its first token."""
        return max(timing.times[0] for timing in self.timings)

    @property
    def new_tokens(self) -> int:
        return sum(len(timing.times) for timing in self.timings)

    @property
    def tokens_per_s(self) -> float:
        """New tokens over wall time, prefill included."""
        return self.new_tokens / self.seconds

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens over the time until every request had its first token."""
        return sum(timing.prompt_tokens for timing in self.timings) / (self.prefilled - self.began)

    @property
    def decode_tokens_per_s(self) -> float | None:
        """New tokens after that over the rest of the time; None when there were none."""
        later = sum(moment > self.prefilled for timing in self.timings for moment in timing.times)
        return later / (self.ended - self.prefilled) if later else None

    @property
    def ttfts(self) -> list[float]:
        return [timing.times[0] - self.began for timing in self.timings]

    @property
    def inter_tokens(self) -> list[float]:
        return [later - earlier for timing in self.timings for earlier, later in itertools.pairwise(timing.times)]


class Runner:
    """Owns a `TorchEngine` that was not started yet. Only for one thread."""

    def __init__(self, engine: TorchEngine, block_size: int) -> None:
        self.engine = engine
        self._block_size = block_size
        self._changed = threading.Condition()
        self._live: dict[str, Timing] = {}
        self._error = ""
        self._peak = (0, 0)  # KV blocks used and wasted
        self._count = itertools.count()
        self._digests: dict[Path, str] = {}
        engine.start(self._emit)

    def run(self, prompts: Sequence[Sequence[int]], adapters: Sequence[Path | None], new_tokens: int) -> Batch:
        """One batch: all requests at once, greedy, `new_tokens` tokens each whatever they are.

        Raises:
            OpenLoRAError: what the engine said of a request.
            Internal: the engine's loop has stopped.
        """
        sampling = Sampling(max_tokens=new_tokens, temperature=0.0)
        requests = [
            EngineRequest(f"bench-{next(self._count)}", tuple(prompt), self._uses(path), sampling)
            for prompt, path in zip(prompts, adapters, strict=True)
        ]
        timings = {request.request_id: Timing(len(request.prompt)) for request in requests}
        with self._changed:
            self._live, self._error, self._peak = timings, "", (0, 0)
        began = time.perf_counter()
        for request in requests:
            self.engine.submit(request)
        with self._changed:
            while not self._changed.wait_for(self._over, _LOOK_SECONDS):
                if self.engine.failed is not None:
                    raise Internal(f"the engine stopped: {self.engine.failed}")
            if self._error:
                raise from_message(self._error)
            return Batch(began, list(timings.values()), *self._peak)

    def load(self, adapters: Sequence[Path]) -> None:
        """Make adapters resident, as many as there are slots: each answers a request of one token."""
        if adapters:
            self.run([[0]] * len(adapters), adapters, new_tokens=1)

    def close(self) -> None:
        self.engine.shutdown()

    def _uses(self, path: Path | None) -> tuple[AdapterUse, ...]:
        """The adapter in a directory at weight 1."""
        if path is None:
            return ()
        if path not in self._digests:
            self._digests[path] = adapter_manifest(path).digest
        return (AdapterUse(self._digests[path], str(path.resolve()), WEIGHT_ONE),)

    def _over(self) -> bool:
        return bool(self._error) or all(timing.finished for timing in self._live.values())

    def _emit(self, outputs: list[EngineOutput]) -> None:
        now = time.perf_counter()
        with self._changed:
            for output in outputs:
                timing = self._live.get(output.request_id)
                if timing is None:
                    continue  # of a batch that ended in an error
                timing.token_ids += output.token_ids
                timing.times += [now] * len(output.token_ids)
                timing.finished = bool(output.finish_reason)
                self._error = self._error or output.error
            self._count_blocks()
            if self._over():
                self._changed.notify_all()

    def _count_blocks(self) -> None:
        """The stats are those of the step whose outputs are here, so each live request holds all but its last token."""
        live = [timing for timing in self._live.values() if not timing.finished]
        used = self.engine.stats().kv_blocks_used
        if live and used > self._peak[0] and all(timing.times for timing in live):
            tokens = [timing.prompt_tokens + len(timing.token_ids) - 1 for timing in live]
            self._peak = (used, used - sum(-(-count // self._block_size) for count in tokens))
