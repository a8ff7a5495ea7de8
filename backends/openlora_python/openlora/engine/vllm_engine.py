"""vLLM's asynchronous engine (V1, 0.32) behind our protocol: `openlora serve --engine vllm`.

vLLM runs in processes of its own, under the interpreter that has it. It is told of token ids only, and never sees an
adapter that was not checked: one that it can't load would end it.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import EngineRestarted, InvalidArgument, Overloaded
from .api import EngineInfo, EngineRequest, Guide, TokenLogprob
from .one_adapter.engine import Backend, Counts, OneAdapterEngine, Step
from .one_adapter.failures import Meaning
from .one_adapter.options import options_of
from .one_adapter.placing import PlacedAdapter
from .vllm_options import VllmOptions

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM can be built for
MAX_TEMPERATURE = 2.0
MEANINGS = (
    Meaning(r"EngineDead", EngineRestarted, None, 2000, "vLLM died while this request ran"),
    Meaning(r"QueueOverflow|MaxQueuedTokens|RetryableRequest", Overloaded, None, 1000),
    Meaning(r"structured.output|grammar|json schema|regex|choice|guidance", InvalidArgument, "guide"),
    Meaning(r"prompt .*(longer|exceed)|maximum (model|context) length", InvalidArgument, "prompt"),
    Meaning(r"VLLMValidationError", InvalidArgument),
)


class VllmEngine(OneAdapterEngine):
    """`engine.api.Engine` over `vllm.v1.engine.async_llm.AsyncLLM`; options are those of `VllmOptions`."""

    def __init__(self, model_dir: str, base_digest: str, **options: Any) -> None:
        super().__init__(model_dir, base_digest, options_of(VllmOptions, options))

    async def open_backend(self, model_dir: str, base_digest: str) -> Backend:
        return VllmBackend(model_dir, base_digest, self._options)


class VllmBackend:
    meanings = MEANINGS

    def __init__(self, model_dir: str, base_digest: str, options: VllmOptions) -> None:
        if options.quantization != "none":
            raise InvalidArgument(
                f"{options.quantization!r} is not made here: vLLM serves a checkpoint as it is, only 'none' is right",
                field="quantization",
            )
        if options.max_rank > RANKS[-1]:
            raise InvalidArgument(f"{options.max_rank} is over vLLM's {RANKS[-1]}", field="max_rank")
        _set_environment(options)
        import torch
        import vllm
        from vllm import SamplingParams
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.inputs.engine import tokens_input
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
        from vllm.v1.engine.async_llm import AsyncLLM

        self._sampling_params, self._guides = SamplingParams, StructuredOutputsParams
        self._delta, self._tokens_input, self._lora_request = RequestOutputKind.DELTA, tokens_input, LoRARequest
        self._has_tokenizer = Path(model_dir, "tokenizer.json").is_file()
        self._counts = Counts()
        arguments = AsyncEngineArgs(
            model=model_dir,
            dtype=options.dtype,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_batch,
            max_num_batched_tokens=options.max_step_tokens,
            tensor_parallel_size=options.tensor_parallel_size,
            enable_prefix_caching=options.prefix_cache,
            kv_cache_memory_bytes=options.kv_cache_bytes,
            gpu_memory_utilization=options.gpu_memory_utilization,
            block_size=options.block_size,
            enforce_eager=options.enforce_eager,
            skip_tokenizer_init=not self._has_tokenizer,
            structured_outputs_config={"backend": "guidance"},  # llguidance, as in the embedded engine
            scheduling_policy="priority",
            max_logprobs=-1,
            enable_lora=True,
            max_loras=options.max_adapters,
            max_cpu_loras=options.adapters_in_host_memory,
            max_lora_rank=next(rank for rank in RANKS if rank >= options.max_rank),
            disable_log_stats=True,
        )
        self._llm = AsyncLLM.from_engine_args(arguments, stat_loggers=[_follow(self._counts)])
        config = self._llm.vllm_config
        self._counts.kv_blocks_total = config.cache_config.num_gpu_blocks or 0
        eos = getattr(self._llm.renderer.tokenizer, "eos_token_id", None) if self._has_tokenizer else None
        self._guide_end = None if eos is None else int(eos)
        self.info = EngineInfo(
            engine="vllm",
            version=f"openlora {__version__}, vllm {vllm.__version__}, torch {torch.__version__}",
            base_digest=base_digest,
            dtype=str(config.model_config.dtype).removeprefix("torch."),
            quantization=config.model_config.quantization or "none",
            device=config.device_config.device_type,
            max_model_len=config.model_config.max_model_len,
            vocab_size=config.model_config.get_vocab_size(),
            max_rank=options.max_rank,
            max_adapters=options.max_adapters,
            one_adapter=True,
        )

    @property
    def failure(self) -> Exception | None:
        return self._llm.dead_error if self._llm.errored else None

    def check(self, request: EngineRequest) -> None:
        guide, sampling = request.sampling.guide, request.sampling
        if sampling.temperature > MAX_TEMPERATURE:
            raise InvalidArgument(
                f"{sampling.temperature:g} is too high, vLLM goes up to {MAX_TEMPERATURE:g}", field="temperature"
            )
        if guide is None:
            return
        if not self._has_tokenizer:
            raise InvalidArgument("the model has no tokenizer.json, which structured output needs", field=guide.field)
        if sampling.min_tokens:
            raise InvalidArgument("with a guide vLLM can't keep it, 0 is right", field="min_tokens")

    async def generate(self, request: EngineRequest, adapter: PlacedAdapter | None) -> AsyncIterator[Step]:
        # vLLM stops a request whose iteration is cancelled or closed.
        stream = self._llm.generate(
            self._tokens_input(list(request.prompt), cache_salt=request.cache_salt or None),
            self._parameters(request),
            request.request_id,
            lora_request=adapter
            and self._lora_request(lora_name=adapter.name, lora_int_id=adapter.number, lora_path=adapter.path),
            priority=request.priority,
        )
        try:
            async for output in stream:
                made = output.outputs[0]
                token_ids = list(made.token_ids)
                reason = made.finish_reason or ""
                if reason not in ("", "stop", "length"):
                    raise RuntimeError(f"vLLM ended the request with {reason!r}")
                if reason == "stop" and self._only_ends_guide(request, token_ids):
                    token_ids.pop()
                yield Step(
                    token_ids,
                    reason,
                    self._logprobs(request, token_ids, made.logprobs),
                    output.num_cached_tokens or 0,
                    _queued(output.metrics),
                )
        finally:
            await stream.aclose()

    def counts(self) -> Counts:
        return self._counts

    async def close(self) -> None:
        self._llm.shutdown()

    def _parameters(self, request: EngineRequest) -> Any:
        sampling = request.sampling
        room = self.info.max_model_len - len(request.prompt)
        stops = [*sampling.eos_token_ids, *sampling.stop_token_ids]
        if sampling.guide is not None and self._guide_end is not None:
            stops.append(self._guide_end)
        parameters = self._sampling_params(
            max_tokens=min(sampling.max_tokens, room),
            min_tokens=min(sampling.min_tokens, sampling.max_tokens, room),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            seed=None if sampling.temperature == 0 else sampling.seed,
            ignore_eos=True,  # ours are among the stop tokens
            stop_token_ids=stops,
            logprobs=sampling.logprobs,
            detokenize=False,
            output_kind=self._delta,
            structured_outputs=None if sampling.guide is None else self._guide(sampling.guide),
        )
        if sampling.bad_words:
            # It wants words, to split them into the very tokens that we have already.
            parameters._bad_words_token_ids = [list(word) for word in sampling.bad_words]
        return parameters

    def _guide(self, guide: Guide) -> Any:
        match guide.kind:
            case "json":
                return self._guides(json_object=True)
            case "json_schema":
                return self._guides(json=guide.text)
            case "regex":
                return self._guides(regex=guide.text)
            case "grammar":
                return self._guides(grammar=guide.text)
            case "choice":
                return self._guides(choice=json.loads(guide.text))
        raise InvalidArgument(f"vLLM has no guide of the kind {guide.kind!r}", field=guide.field)

    def _only_ends_guide(self, request: EngineRequest, token_ids: list[int]) -> bool:
        """vLLM ends a guided output with an EOS token; nobody asked for it, so it is not part of the answer."""
        sampling = request.sampling
        asked_for = (*sampling.eos_token_ids, *sampling.stop_token_ids)
        return sampling.guide is not None and token_ids[-1:] == [self._guide_end] and token_ids[-1] not in asked_for

    def _logprobs(self, request: EngineRequest, token_ids: list[int], made: Any) -> list[TokenLogprob] | None:
        wanted = request.sampling.logprobs
        if wanted is None or made is None:
            return None
        found = []
        for token, candidates in zip(token_ids, made, strict=False):
            ranked = sorted(candidates.items(), key=lambda item: item[1].rank)
            top = tuple((other, one.logprob) for other, one in ranked if one.rank <= wanted)
            found.append(TokenLogprob(token, candidates[token].logprob, top))
        return found


def _set_environment(options: VllmOptions) -> None:
    """Before vLLM is imported, here and in its own processes."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    if options.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"


def _queued(metrics: Any) -> float:
    """Seconds from vLLM's queue to the first step; 0 before that."""
    return max(0.0, metrics.scheduled_ts - metrics.queued_ts) if metrics is not None else 0.0


def _follow(counts: Counts) -> type:
    """vLLM makes its loggers itself: a class that writes what it is told into `counts`."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Follower(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
        ) -> None:
            counts.steps += 1
            if scheduler_stats is not None:
                counts.running = scheduler_stats.num_running_reqs
                counts.waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
                counts.kv_blocks_used = round(scheduler_stats.kv_cache_usage * counts.kv_blocks_total)
                counts.prefix_lookup_tokens += scheduler_stats.prefix_cache_stats.queries
                counts.prefix_hit_tokens += scheduler_stats.prefix_cache_stats.hits
                counts.adapters_loaded = len(scheduler_stats.running_lora_adapters)
            if iteration_stats is not None:
                counts.preemptions += iteration_stats.num_preempted_reqs

        def log_engine_initialized(self) -> None:
            pass

    return Follower
