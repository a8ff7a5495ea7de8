"""The embedded engine: continuous batching of one Hugging Face model with many adapters, on CPU or GPU.

One thread owns the model, the scheduler and every sequence. `submit` and `cancel` only leave a note and wake it.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

import torch
import transformers
from transformers import PreTrainedModel

from .. import __version__
from ..errors import DeadlineExceeded, Internal, InvalidArgument, NotFinite, OpenLoRAError, Overloaded
from .adapter_file import AdapterReader
from .api import Emit, EngineInfo, EngineOutput, EngineRequest, EngineStats, TokenLogprob
from .checked_model import device_of, load_checked
from .host_memory import default_adapter_bytes
from .loader import Loader
from .model import Chunk, PagedModel, eos_token_ids, longest_context
from .prefix_cache import PrefixCache
from .quantization import MODES
from .request_check import check_request
from .residency import Residency
from .sampling import Sampled, SamplingState, sample
from .scheduler import Scheduler, Sequence, Work
from .step_budget import StepBudget
from .structured_output import GuideCompiler

_LOG = logging.getLogger(__name__)


class TorchEngine:
    """`engine.api.Engine` over transformers and torch.

    `failed` is the exception that stopped the step loop for good, or None: a process that hosts the engine
    watches it.
    """

    ending = ended = False

    def __init__(
        self,
        model_dir: str,
        base_digest: str,
        *,
        dtype: str = "auto",
        device: str = "auto",
        quantization: str = "none",
        quantized_dir: str | None = None,
        max_model_len: int | None = None,
        max_batch: int = 64,
        max_step_tokens: int = 512,
        kv_cache_tokens: int | None = None,
        block_size: int = 16,
        max_adapters: int = 64,
        host_adapter_bytes: int | None = None,
        max_rank: int = 128,
        max_waiting: int = 1024,
        prefix_cache: bool = True,
        prefill_stretch: float = 1.9,
    ) -> None:
        """Load the model, check it against transformers, and make room for cache and adapters.

        `max_model_len` bounds prompt and output together; None is the model's own limit, less if memory asks for it.
        `kv_cache_tokens` is shared by all sequences; None is enough for `max_batch` of the longest, within a share
        of the memory. `max_step_tokens` bounds decode and prefill tokens of one forward, `prefill_stretch` how much
        longer prompts may make a step in which others decode (`StepBudget`). `max_adapters` are the device slots,
        `host_adapter_bytes` the memory of all adapters on the host; None is a share of the machine's. `quantized_dir`
        keeps quantized weights by `base_digest`, so that only the first start makes them.

        Raises:
            InvalidArgument: a setting is out of range, naming it.
            UnsupportedModel: the architecture is not supported, or the self-check found other logits.
        """
        if quantization not in MODES:
            raise InvalidArgument(
                f"{quantization!r} is unknown, one of {', '.join(MODES)} is right", field="quantization"
            )
        for name, value in (("max_batch", max_batch), ("block_size", block_size), ("max_adapters", max_adapters),
                            ("max_rank", max_rank), ("max_waiting", max_waiting)):  # fmt: skip
            if value < 1:
                raise InvalidArgument(f"{value} is too small, at least 1 is right", field=name)
        if host_adapter_bytes is not None and host_adapter_bytes < 1:
            raise InvalidArgument(f"{host_adapter_bytes} is too small, at least 1 is right", field="host_adapter_bytes")
        if max_step_tokens < max_batch:
            raise InvalidArgument(
                f"{max_step_tokens} is too small, at least max_batch = {max_batch} is right", field="max_step_tokens"
            )
        if not prefill_stretch > 1:
            raise InvalidArgument(f"{prefill_stretch} is out of range, above 1 is right", field="prefill_stretch")
        target = device_of(device)
        load = partial(
            load_checked, model_dir, base_digest, dtype=dtype, device=target, quantization=quantization,
            quantized_dir=quantized_dir, max_model_len=max_model_len, kv_cache_tokens=kv_cache_tokens,
            max_batch=max_batch, block_size=block_size,
        )  # fmt: skip
        loaded: Future[tuple[PreTrainedModel, PagedModel]] = Future()
        self._emit: Emit | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(load, loaded), name="torch-engine", daemon=True)
        self._thread.start()
        model, self._model = loaded.result()
        config, cache = model.config, self._model.cache
        self.max_model_len = min(max_model_len or longest_context(config), cache.total_blocks * block_size)

        self._wake = threading.Event()
        reader = AdapterReader(self._model.linears, self._model.lora, model.dtype, max_rank)
        self._residency = Residency(
            reader.open,
            slots=max_adapters,
            host_bytes=host_adapter_bytes or default_adapter_bytes(cache.data.nbytes if target.type == "cpu" else 0),
            wake=self._wake.set,
            place=None if target.type == "cpu" else lambda adapter: adapter.to(target),
        )
        self._loader = Loader(self._residency)
        self._guides = GuideCompiler(model_dir, config.vocab_size, eos_token_ids(model), self._wake.set)
        self._preparing: list[Sequence] = []  # until their guides are ready
        self._prefix = PrefixCache(cache.pool, block_size, base_digest, enabled=prefix_cache)
        budget = StepBudget(max_step_tokens, prefill_stretch)
        self._scheduler = Scheduler(cache, self._prefix, self._residency, budget, max_batch=max_batch)
        self._deadlines: list[tuple[float, int, Sequence]] = []  # a heap by (deadline, arrival), of the ended ones too
        self._lock = threading.Lock()  # guards the five fields below
        self._live: dict[str, Sequence] = {}
        self._submitted: deque[Sequence] = deque()
        self._cancelled: list[str] = []
        self._refused: list[EngineOutput] = []
        self._arrivals = 0
        self._max_waiting = max_waiting
        self._stopping = False
        self._steps = 0
        self._last_finish = time.monotonic()
        self._finish_interval = 0.1  # seconds between finished requests, smoothed
        self._stats = self._count()
        self.failed: Exception | None = None
        self.info = EngineInfo(
            engine="torch",
            version=f"openlora {__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
            base_digest=base_digest,
            dtype=str(model.dtype).removeprefix("torch."),
            quantization=quantization,
            device=str(target),
            max_model_len=self.max_model_len,
            vocab_size=config.vocab_size,
            max_rank=max_rank,
            max_adapters=max_adapters,
        )

    def _run(self, load: Callable[[], tuple[PreTrainedModel, PagedModel]], loaded: Future) -> None:
        """Everything that computes is on this one thread: OpenMP keeps a team of workers for each thread that does, and
        as soon as all teams together have more threads than the machine has cores, none of them spins for its next
        piece of work: each product then begins with a wake-up, a third of a decode step."""
        try:
            loaded.set_result(load())
        except Exception as error:
            loaded.set_exception(error)
            return
        self._started.wait()
        if self._emit is not None:
            self._loop(self._emit)

    def start(self, emit: Emit) -> None:
        """Start the step loop; `emit` gets everything that a step made, on the loop's thread."""
        self._emit = emit
        self._started.set()

    def submit(self, request: EngineRequest) -> None:
        """Queue a request. What is wrong with it, or an overfull queue, is told by its one output.

        Raises:
            InvalidArgument: a request with this id is still running; it goes on.
        """
        with self._lock:
            if request.request_id in self._live:
                raise InvalidArgument(f"{request.request_id!r} is still running", field="request_id")
            error = self._refusal(request)
            if error is not None:
                self._refused.append(_ended(request.request_id, error))
            else:
                guide = request.sampling.guide
                state = SamplingState(
                    request.sampling, request.prompt, None if guide is None else self._guides.start(guide)
                )
                sequence = Sequence(request, self._arrivals, state, list(request.prompt), self._prefix.chain(request))
                if request.timeout is not None:
                    sequence.deadline = time.monotonic() + request.timeout
                self._arrivals += 1
                self._residency.prefetch(request.adapters)
                self._live[request.request_id] = sequence
                self._submitted.append(sequence)
        self._wake.set()

    def cancel(self, request_id: str) -> None:
        """End a request as `cancelled` before the next step; an unknown id is ignored."""
        with self._lock:
            self._cancelled.append(request_id)
        self._wake.set()

    def stats(self) -> EngineStats:
        """As of the end of the last turn of the loop."""
        return self._stats

    def shutdown(self) -> None:
        """Stop the step loop and the loader; running requests are dropped."""
        self._stopping = True
        self._wake.set()
        self._started.set()
        self._thread.join()
        self._loader.close()
        self._guides.close()

    def _refusal(self, request: EngineRequest) -> OpenLoRAError | None:
        """Why a request can't be taken, if so."""
        try:
            check_request(request, self.info)
        except InvalidArgument as error:
            return error
        waiting = len(self._scheduler.waiting) + len(self._submitted) + len(self._preparing)
        if waiting >= self._max_waiting:
            retry = self._finish_interval * waiting / 2  # until half of the queue is gone
            return Overloaded(
                f"{waiting} requests are waiting", retry_after_ms=round(1000 * min(max(retry, 0.1), 30.0))
            )
        return None

    def _loop(self, emit: Emit) -> None:
        try:
            while not self._stopping:
                outputs = self._take_notes() if self._wake.is_set() else []
                outputs += self._expire()
                for sequence, error in self._scheduler.admit():
                    outputs.append(self._finish(sequence, error=error))
                started = time.perf_counter()
                works = self._scheduler.schedule()
                if works:
                    outputs += self._step(works, started)
                self._stats = self._count()
                if outputs:
                    emit(outputs)
                elif not works:
                    self._wake.wait(self._until_next_deadline())
        except Exception as error:
            _LOG.exception("the step loop stopped")
            self.failed = error

    def _take_notes(self) -> list[EngineOutput]:
        """Take over what other threads left: submissions, refusals, cancellations, adapters, guides."""
        self._wake.clear()
        self._scheduler.changed = True
        with self._lock:
            outputs, self._refused = self._refused, []
            submitted, self._submitted = list(self._submitted), deque()
            cancelled, self._cancelled = self._cancelled, []
            # Under the lock, so that every waiting request is in one of the three queues whenever one is counted.
            for sequence in submitted:
                if sequence.deadline is not None:
                    heapq.heappush(self._deadlines, (sequence.deadline, sequence.arrival, sequence))
            refused = self._enqueue(self._preparing + submitted)
        outputs += [self._finish(sequence, error=error) for sequence, error in refused]
        for request_id in cancelled:
            sequence = self._live.get(request_id)
            if sequence is not None:
                outputs.append(self._finish(sequence, reason="cancelled"))
        return outputs

    def _enqueue(self, sequences: list[Sequence]) -> list[tuple[Sequence, OpenLoRAError]]:
        """Those whose guides are ready wait for a row from now on; returns those whose guides are bad."""
        self._preparing, refused = [], []
        for sequence in sequences:
            ready = False
            try:
                ready = sequence.sampling.ready
            except OpenLoRAError as error:
                refused.append((sequence, error))
            if ready:
                self._scheduler.add(sequence)
            else:
                self._preparing.append(sequence)
        return refused

    def _expire(self) -> list[EngineOutput]:
        """End what is past its deadline, in whatever phase it is."""
        outputs = []
        now = time.monotonic()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, sequence = heapq.heappop(self._deadlines)
            if self._live.get(sequence.request.request_id) is sequence:
                late = DeadlineExceeded(f"not finished in {sequence.request.timeout * 1000:.0f} ms")
                outputs.append(self._finish(sequence, error=late))
        return outputs

    def _until_next_deadline(self) -> float | None:
        """Seconds; None when there is none."""
        return max(0.0, self._deadlines[0][0] - time.monotonic()) if self._deadlines else None

    def _count(self) -> EngineStats:
        cache, adapters = self._scheduler.cache, self._residency.stats()
        return EngineStats(
            steps=self._steps,
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            kv_blocks_used=cache.used_blocks,
            kv_blocks_total=cache.total_blocks,
            adapters_loaded=adapters.slots_filled,
            kv_blocks_cached=cache.pool.idle,
            prefix_lookup_tokens=self._prefix.lookup_tokens,
            prefix_hit_tokens=self._prefix.hit_tokens,
            preemptions=self._scheduler.preemptions,
            adapters=adapters,
        )

    def _step(self, works: list[Work], started: float) -> list[EngineOutput]:
        """One forward, and a token for each sequence that is ready for one; `started` is when its scheduling began.

        A fault in here ends the sequences of this step; the others, and the loop, go on.
        """
        self._steps += 1
        try:
            chunks = [
                Chunk(
                    work.sequence.token_ids[work.sequence.computed : work.sequence.computed + work.tokens],
                    work.sequence.computed,
                    work.sequence.blocks.ids,
                    work.sequence.adapters,
                    logits=int(work.completes),
                )
                for work in works
            ]
            ready = [work.sequence for work in works if work.completes]
            logits = self._model.forward(chunks)
            choices = sample(logits, [sequence.sampling for sequence in ready])
            self._scheduler.computed(works)
        except Exception as error:
            _LOG.exception("a step of %d sequences failed", len(works))
            fault = Internal(f"a step failed: {type(error).__name__}: {error}")
            return [self._finish(work.sequence, error=fault) for work in works]
        outputs = [self._accept(sequence, choice) for sequence, choice in zip(ready, choices, strict=True)]
        self._scheduler.timed(time.perf_counter() - started)
        return outputs

    def _accept(self, sequence: Sequence, choice: Sampled | OpenLoRAError) -> EngineOutput:
        if isinstance(choice, OpenLoRAError):
            if isinstance(choice, NotFinite):
                self._scheduler.distrust(sequence)
            return self._finish(sequence, error=choice)
        sequence.token_ids.append(choice.token_id)
        sequence.sampling.append(choice.token_id)
        logprobs = None if choice.logprob is None else [choice.logprob]
        reason = self._finish_reason(sequence)
        if reason:
            output = self._finish(sequence, [choice.token_id], reason, logprobs=logprobs)
        else:
            output = EngineOutput(sequence.request.request_id, [choice.token_id], logprobs=logprobs)
        if len(sequence.sampling.output) == 1:
            output.cached_tokens = sequence.cached
            output.queue_seconds = sequence.queue_seconds
        return output

    def _finish_reason(self, sequence: Sequence) -> str:
        sampling, token_id = sequence.request.sampling, sequence.token_ids[-1]
        if token_id in sampling.eos_token_ids or token_id in sampling.stop_token_ids:
            return "stop"
        if sequence.sampling.complete:
            return "stop"
        if len(sequence.sampling.output) >= sampling.max_tokens or len(sequence.token_ids) >= self.max_model_len:
            return "length"
        return ""

    def _finish(
        self,
        sequence: Sequence,
        token_ids: list[int] | None = None,
        reason: str = "error",
        *,
        error: OpenLoRAError | None = None,
        logprobs: list[TokenLogprob] | None = None,
    ) -> EngineOutput:
        """Give back all that a sequence holds; its last output."""
        if sequence in self._preparing:
            self._preparing.remove(sequence)
        else:
            self._scheduler.remove(sequence)
        request_id = sequence.request.request_id
        self._residency.forget(sequence.request.adapters)
        with self._lock:
            del self._live[request_id]
        now = time.monotonic()
        self._finish_interval += 0.1 * (now - self._last_finish - self._finish_interval)
        self._last_finish = now
        return EngineOutput(request_id, token_ids or [], reason, "" if error is None else str(error), logprobs)


def _ended(request_id: str, error: OpenLoRAError) -> EngineOutput:
    return EngineOutput(request_id, [], "error", str(error))
