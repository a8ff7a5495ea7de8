"""The embedded engine: continuous batching of one Hugging Face model with many adapters, on CPU or GPU.

One thread owns the model, the scheduler and every sequence. `submit` and `cancel` only leave a note and wake it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque

import torch
import transformers
from transformers import PreTrainedConfig

from .. import __version__
from ..errors import Internal, InvalidArgument, OpenLoRAError, Overloaded
from .adapter_file import AdapterReader
from .adapter_slots import AdapterSlots
from .api import Emit, EngineInfo, EngineOutput, EngineRequest, EngineStats, TokenLogprob
from .kv_cache import KVCache
from .model import Chunk, PagedModel, head_dim, load, longest_context
from .sampling import Sampled, SamplingState, sample
from .scheduler import Scheduler, Sequence, Work
from .selfcheck import TOKENS, check, probe_tokens, reference_logits

_LOG = logging.getLogger(__name__)

_CPU_CACHE_SHARE = 0.25  # of physical memory
_GPU_CACHE_SHARE = 0.8  # of what the weights leave free


class TorchEngine:
    """`engine.api.Engine` over transformers and torch.

    `failed` is the exception that stopped the step loop for good, or None: a process that hosts the engine
    watches it.
    """

    def __init__(
        self,
        model_dir: str,
        base_digest: str,
        *,
        dtype: str = "auto",
        device: str = "auto",
        quantization: str = "none",
        max_model_len: int | None = None,
        max_batch: int = 64,
        max_step_tokens: int = 512,
        kv_cache_tokens: int | None = None,
        block_size: int = 16,
        max_adapters: int = 64,
        max_rank: int = 128,
        max_waiting: int = 1024,
    ) -> None:
        """Load the model, check it against transformers, and make room for cache and adapters.

        `max_model_len` bounds prompt and output together; None is the model's own limit, less if memory asks for it.
        `kv_cache_tokens` is shared by all sequences; None is enough for `max_batch` of the longest, within a share
        of the memory. `max_step_tokens` bounds decode and prefill tokens of one forward.

        Raises:
            InvalidArgument: a setting is out of range, naming it.
            UnsupportedModel: the architecture is not supported, or the self-check found other logits.
        """
        if quantization != "none":
            raise InvalidArgument(f"{quantization!r} is not supported yet, 'none' is right", field="quantization")
        for name, value in (("max_batch", max_batch), ("block_size", block_size), ("max_adapters", max_adapters),
                            ("max_rank", max_rank), ("max_waiting", max_waiting)):  # fmt: skip
            if value < 1:
                raise InvalidArgument(f"{value} is too small, at least 1 is right", field=name)
        if max_step_tokens < max_batch:
            raise InvalidArgument(
                f"{max_step_tokens} is too small, at least max_batch = {max_batch} is right", field="max_step_tokens"
            )
        target = _device(device)
        model = load(model_dir, dtype, target)
        config = model.config
        probe = probe_tokens(config.vocab_size)
        expected = reference_logits(model, probe)
        cache = _make_cache(config, model.dtype, target, max_model_len, kv_cache_tokens, max_batch, block_size)
        self.max_model_len = min(max_model_len or longest_context(config), cache.total_blocks * block_size)
        self._model = PagedModel(model, cache)
        check(self._model, probe, expected)

        self._wake = threading.Event()
        reader = AdapterReader(self._model.linears, model.dtype, target, max_rank)
        self._slots = AdapterSlots(reader.read, max_adapters, self._wake.set)
        self._scheduler = Scheduler(
            cache, self._slots, max_batch=max_batch, max_step_tokens=max_step_tokens, max_model_len=self.max_model_len
        )
        self._lock = threading.Lock()  # guards the five fields below
        self._live: dict[str, Sequence] = {}
        self._submitted: deque[Sequence] = deque()
        self._cancelled: list[str] = []
        self._refused: list[EngineOutput] = []
        self._arrivals = 0
        self._max_waiting = max_waiting
        self._stopping = False
        self._thread: threading.Thread | None = None
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

    def start(self, emit: Emit) -> None:
        """Start the step loop; `emit` gets everything that a step made, on the loop's thread."""
        self._thread = threading.Thread(target=self._loop, args=(emit,), name="torch-engine", daemon=True)
        self._thread.start()

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
                state = SamplingState(request.sampling, request.prompt, self.info.vocab_size, self._model.device)
                sequence = Sequence(request, self._arrivals, state, list(request.prompt))
                self._arrivals += 1
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
        if self._thread is not None:
            self._thread.join()
        self._slots.close()

    def _refusal(self, request: EngineRequest) -> OpenLoRAError | None:
        """Why a request can't be taken, if so."""
        sampling, prompt, vocab_size = request.sampling, request.prompt, self.info.vocab_size
        if not prompt:
            return InvalidArgument("is empty, at least one token is right", field="prompt")
        if len(prompt) >= self.max_model_len:
            return InvalidArgument(
                f"{len(prompt)} tokens leave no room for an answer, max_model_len is {self.max_model_len}",
                field="prompt",
            )
        if sampling.max_tokens < 1:
            return InvalidArgument(f"{sampling.max_tokens} is too small, at least 1 is right", field="max_tokens")
        named = {
            "prompt": prompt,
            "eos_token_ids": sampling.eos_token_ids,
            "stop_token_ids": sampling.stop_token_ids,
            "bad_words": [token for word in sampling.bad_words for token in word],
        }
        for name, tokens in named.items():
            outside = next((token for token in tokens if not 0 <= token < vocab_size), None)
            if outside is not None:
                return InvalidArgument(f"token id {outside} is outside the vocabulary of {vocab_size}", field=name)
        if not all(sampling.bad_words):
            return InvalidArgument("a word has no tokens", field="bad_words")
        distinct = len({use.digest for use in request.adapters})
        if distinct > self.info.max_adapters:
            return InvalidArgument(f"{distinct} adapters, at most {self.info.max_adapters} fit", field="adapters")
        waiting = len(self._scheduler.waiting) + len(self._submitted)
        if waiting >= self._max_waiting:
            retry = self._finish_interval * waiting / 2  # until half of the queue is gone
            return Overloaded(
                f"{waiting} requests are waiting", retry_after_ms=round(1000 * min(max(retry, 0.1), 30.0))
            )
        return None

    def _loop(self, emit: Emit) -> None:
        try:
            while not self._stopping:
                self._wake.clear()
                outputs = self._take_notes()
                for sequence, error in self._scheduler.admit():
                    outputs.append(self._finish(sequence, error=error))
                works = self._scheduler.schedule()
                if works:
                    outputs += self._step(works)
                self._stats = self._count()
                if outputs:
                    emit(outputs)
                elif not works:
                    self._wake.wait()
        except Exception as error:
            _LOG.exception("the step loop stopped")
            self.failed = error

    def _take_notes(self) -> list[EngineOutput]:
        """Take over what other threads left: submissions, refusals, cancellations."""
        with self._lock:
            outputs, self._refused = self._refused, []
            submitted, self._submitted = list(self._submitted), deque()
            cancelled, self._cancelled = self._cancelled, []
            # Under the lock, so that every waiting request is in one of the two queues whenever one is counted.
            for sequence in submitted:
                self._scheduler.add(sequence)
        for request_id in cancelled:
            sequence = self._live.get(request_id)
            if sequence is not None:
                outputs.append(self._finish(sequence, reason="cancelled"))
        return outputs

    def _count(self) -> EngineStats:
        cache = self._scheduler.cache
        return EngineStats(
            steps=self._steps,
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            kv_blocks_used=cache.used_blocks,
            kv_blocks_total=cache.total_blocks,
            adapters_loaded=self._slots.loaded,
        )

    def _step(self, works: list[Work]) -> list[EngineOutput]:
        """One forward, and a token for each sequence that is ready for one.

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
            for work in works:
                work.sequence.computed += work.tokens
        except Exception as error:
            _LOG.exception("a step of %d sequences failed", len(works))
            fault = Internal(f"a step failed: {type(error).__name__}: {error}")
            return [self._finish(work.sequence, error=fault) for work in works]
        return [self._accept(sequence, choice) for sequence, choice in zip(ready, choices, strict=True)]

    def _accept(self, sequence: Sequence, choice: Sampled | OpenLoRAError) -> EngineOutput:
        if isinstance(choice, OpenLoRAError):
            return self._finish(sequence, error=choice)
        sampling = sequence.request.sampling
        sequence.token_ids.append(choice.token_id)
        sequence.sampling.append(choice.token_id)
        logprobs = None if choice.logprob is None else [choice.logprob]
        if choice.token_id in sampling.eos_token_ids or choice.token_id in sampling.stop_token_ids:
            return self._finish(sequence, [choice.token_id], "stop", logprobs=logprobs)
        if len(sequence.sampling.output) >= sampling.max_tokens or len(sequence.token_ids) >= self.max_model_len:
            return self._finish(sequence, [choice.token_id], "length", logprobs=logprobs)
        return EngineOutput(sequence.request.request_id, [choice.token_id], logprobs=logprobs)

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
        self._scheduler.remove(sequence)
        request_id = sequence.request.request_id
        with self._lock:
            del self._live[request_id]
        now = time.monotonic()
        self._finish_interval += 0.1 * (now - self._last_finish - self._finish_interval)
        self._last_finish = now
        return EngineOutput(request_id, token_ids or [], reason, "" if error is None else str(error), logprobs)


def _ended(request_id: str, error: OpenLoRAError) -> EngineOutput:
    return EngineOutput(request_id, [], "error", str(error))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidArgument(f"{name!r} is not a device; auto, cpu or cuda is right", field="device") from error
    if device.type not in ("cpu", "cuda"):
        raise InvalidArgument(f"{name!r} is not supported; auto, cpu or cuda is right", field="device")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidArgument("this machine has no CUDA device that torch can use", field="device")
    return device


def _make_cache(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int | None,
    tokens: int | None,
    max_batch: int,
    block_size: int,
) -> KVCache:
    """The cache for the settings, or for the memory where they say nothing."""
    longest = longest_context(config)
    if max_model_len is not None and not TOKENS <= max_model_len <= longest:
        raise InvalidArgument(
            f"{max_model_len} is out of range, {TOKENS} to {longest} is right for this model", field="max_model_len"
        )
    smallest = 2 * -(-TOKENS // block_size) * block_size  # what the self-check takes
    if tokens is not None and tokens < max(max_model_len or 0, smallest):
        raise InvalidArgument(
            f"{tokens} is too small, at least {max(max_model_len or 0, smallest)} is right", field="kv_cache_tokens"
        )
    if tokens is None:
        size = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim(config) * dtype.itemsize
        wanted = max_batch * (max_model_len or longest)
        tokens = max(min(wanted, _memory_for_cache(device) // size), max_model_len or 0, smallest)
    return KVCache(
        layers=config.num_hidden_layers,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim(config),
        tokens=tokens,
        block_size=block_size,
        dtype=dtype,
        device=device,
    )


def _memory_for_cache(device: torch.device) -> int:
    """Bytes that the cache may take when nobody said."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * _GPU_CACHE_SHARE)
    return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _CPU_CACHE_SHARE)
