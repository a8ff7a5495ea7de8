"""TensorRT-LLM's `LLM` behind our protocol, versions 1.1 to 1.3: `openlora serve --engine tensorrt_llm`.

Its traps, each of which a test holds against a fake that has them: arguments by keyword only; a result is one object
that changes with every step; without `lora_config` a request's adapter is ignored in silence; an id means the first
weights that came with it for ever; modules that it was not told of are skipped with a warning.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import InvalidArgument
from .api import EngineInfo, EngineRequest, Guide, Sampling, TokenLogprob
from .one_adapter.engine import Backend, Counts, OneAdapterEngine, Step
from .one_adapter.options import options_of
from .one_adapter.placing import PlacedAdapter
from .tensorrt_llm_cache import adapter_room, lora_config, peft_cache_config
from .tensorrt_llm_failures import MEANINGS, is_fatal
from .tensorrt_llm_options import TensorrtLlmOptions
from .tensorrt_llm_surface import import_names


class TensorrtLlmEngine(OneAdapterEngine):
    """`engine.api.Engine` over `tensorrt_llm.LLM`; options are those of `TensorrtLlmOptions`."""

    def __init__(self, model_dir: str, base_digest: str, **options: Any) -> None:
        super().__init__(model_dir, base_digest, options_of(TensorrtLlmOptions, options))

    async def open_backend(self, model_dir: str, base_digest: str) -> Backend:
        return TensorrtLlmBackend(model_dir, base_digest, self._options, self._shapes)


class TensorrtLlmBackend:
    meanings = MEANINGS

    def __init__(self, model_dir: str, base_digest: str, options: TensorrtLlmOptions, shapes: Any) -> None:
        _check(options)
        self._backend = options.backend
        self._names = names = import_names(built_engine=options.backend == "tensorrt")
        self._has_tokenizer = Path(model_dir, "tokenizer.json").is_file()
        room = adapter_room(shapes, names.surface.lora_modules, options)
        shapes.restrict(room.leaves)
        config = json.loads(Path(model_dir, "config.json").read_text())
        longest = config.get("text_config", config).get("max_position_embeddings")
        self.info = EngineInfo(
            engine="tensorrt_llm",
            version=f"openlora {__version__}, tensorrt_llm {names.version}, {options.backend}",
            base_digest=base_digest,
            dtype=_dtype(options, config),
            quantization=_quantization(model_dir),
            device="cuda",
            max_model_len=min(options.max_model_len or longest, longest),
            vocab_size=config.get("text_config", config)["vocab_size"],
            max_rank=options.max_rank,
            max_adapters=room.max_loras,
            one_adapter=True,
        )
        if options.backend == "tensorrt":
            arguments = self._built_engine_arguments(model_dir, options)
        else:
            arguments = self._arguments(model_dir, options)
        self._llm = names.llm(
            **arguments, lora_config=lora_config(names, room), peft_cache_config=peft_cache_config(names, room)
        )
        self._abilities = names.surface.abilities(options.backend)
        self._max_batch = options.max_batch
        self._active = 0  # requests that it works on or has queued: its own count is that of its last iteration's begin
        self._counts = Counts()
        self._failure: Exception | None = None
        self._following = asyncio.ensure_future(self._follow(options.stats_seconds))

    @property
    def failure(self) -> Exception | None:
        return self._failure

    def check(self, request: EngineRequest) -> None:
        guide = request.sampling.guide
        self._abilities.check(request, f"TensorRT-LLM {self._names.version} ({self._backend})")
        if guide is not None and not self._has_tokenizer:
            raise InvalidArgument("the model has no tokenizer.json, which structured output needs", field=guide.field)

    async def generate(self, request: EngineRequest, adapter: PlacedAdapter | None) -> AsyncIterator[Step]:
        self._active += 1
        try:
            async with aclosing(self._outputs(request, adapter)) as outputs:
                async for output in outputs:
                    made = output.outputs[0]
                    self._counts.steps += 1
                    reason = made.finish_reason or ""
                    if reason not in ("", "stop", "length"):
                        raise RuntimeError(f"TensorRT-LLM ended the request with {reason!r}")
                    # Copies: the next step changes this very object.
                    token_ids = list(made.token_ids_diff)
                    yield Step(token_ids, reason, self._logprobs(request, token_ids, made), output.cached_tokens or 0)
        finally:
            self._active -= 1

    async def _outputs(self, request: EngineRequest, adapter: PlacedAdapter | None) -> AsyncIterator[Any]:
        """Its own, step by step. What it raises that is not of this request alone is the end of the engine."""
        result = None
        try:
            # By keyword: the third positional argument is the adapter in some versions and `streaming` in old examples.
            result = self._llm.generate_async(
                list(request.prompt),
                sampling_params=self._parameters(request),
                lora_request=None if adapter is None else self._lora_request(adapter),
                streaming=True,
                cache_salt=request.cache_salt or None,
            )
            async for output in result:
                yield output
        except Exception as error:
            if is_fatal(error, self._names.request_error):
                self._failure = self._failure or error
            raise
        finally:
            if result is not None and not result.finished and self._failure is None:
                result.abort()

    def counts(self) -> Counts:
        self._counts.running = min(self._active, self._max_batch)
        self._counts.waiting = self._active - self._counts.running
        if not self._active:
            self._counts.kv_blocks_used = 0
        return self._counts

    async def close(self) -> None:
        self._following.cancel()
        await asyncio.wait([self._following])
        await asyncio.get_running_loop().run_in_executor(None, self._llm.shutdown)

    def _arguments(self, model_dir: str, options: TensorrtLlmOptions) -> dict[str, Any]:
        """Of the PyTorch backend. `quant_config` is none of them, whatever the manual shows."""
        arguments: dict[str, Any] = {
            "model": model_dir,
            "dtype": options.dtype,
            "skip_tokenizer_init": not self._has_tokenizer,
            "tensor_parallel_size": options.tensor_parallel_size,
            "pipeline_parallel_size": options.pipeline_parallel_size,
            "max_batch_size": options.max_batch,
            "max_num_tokens": options.max_step_tokens,
            "max_seq_len": self.info.max_model_len,
            "enable_chunked_prefill": options.enable_chunked_prefill,
            "enable_iter_perf_stats": True,
            "kv_cache_config": self._names.kv_cache_config(
                enable_block_reuse=options.prefix_cache,
                free_gpu_memory_fraction=options.free_gpu_memory_fraction,
                max_gpu_total_bytes=options.kv_cache_bytes or 0,
                dtype=options.kv_cache_dtype,
            ),
        }
        if self._has_tokenizer:
            arguments["guided_decoding_backend"] = "llguidance"
        if not options.cuda_graph:
            arguments["cuda_graph_config"] = None
        return arguments

    def _built_engine_arguments(self, model_dir: str, options: TensorrtLlmOptions) -> dict[str, Any]:
        """Parallelism, lengths and precision are the built engine's own."""
        return {
            "model": options.engine_dir,
            "tokenizer": model_dir if self._has_tokenizer else None,
            "skip_tokenizer_init": not self._has_tokenizer,
            "enable_lora": True,
            "max_batch_size": options.max_batch,
            "max_num_tokens": options.max_step_tokens,
            "enable_chunked_prefill": options.enable_chunked_prefill,
            "gather_generation_logits": True,  # for log-probabilities
            "kv_cache_config": self._names.kv_cache_config(
                enable_block_reuse=options.prefix_cache, free_gpu_memory_fraction=options.free_gpu_memory_fraction
            ),
        }

    def _lora_request(self, adapter: PlacedAdapter) -> Any:
        return self._names.lora_request(lora_name=adapter.name, lora_int_id=adapter.number, lora_path=adapter.path)

    def _parameters(self, request: EngineRequest) -> Any:
        sampling = request.sampling
        room = self.info.max_model_len - len(request.prompt)
        ends = [*sampling.eos_token_ids, *sampling.stop_token_ids]
        given: dict[str, Any] = {
            "max_tokens": min(sampling.max_tokens, room),
            "end_id": -1,  # ours are stop tokens, so that they are part of the answer
            "pad_id": 0,
            "stop_token_ids": ends or None,
            "include_stop_str_in_output": True,
            "detokenize": False,
            "temperature": sampling.temperature,
            "top_k": 1 if sampling.temperature == 0 else sampling.top_k or None,
            "top_p": self._top_p(sampling),
            "min_p": sampling.min_p or None,
            "repetition_penalty": None if sampling.repetition_penalty == 1 else sampling.repetition_penalty,
            "presence_penalty": sampling.presence_penalty or None,
            "frequency_penalty": sampling.frequency_penalty or None,
            "seed": sampling.seed,
            "logprobs": None if sampling.logprobs is None else max(1, sampling.logprobs),
            "guided_decoding": None if sampling.guide is None else self._guide(sampling.guide),
        }
        return self._names.sampling_params(**{name: value for name, value in given.items() if value is not None})

    def _top_p(self, sampling: Sampling) -> float | None:
        """1 is said where nothing else makes a draw of it: temperature alone is greedy to some samplers."""
        nothing_to_say = sampling.temperature == 0 or (sampling.top_p == 1 and sampling.top_k)
        return None if nothing_to_say else sampling.top_p

    def _guide(self, guide: Guide) -> Any:
        kind = self._names.guided_decoding_params
        match guide.kind:
            case "json":
                return kind(json_object=True)
            case "json_schema":
                return kind(json=guide.text)
            case "regex":
                return kind(regex=guide.text)
        return kind(grammar=guide.text)

    def _logprobs(self, request: EngineRequest, token_ids: list[int], made: Any) -> list[TokenLogprob] | None:
        wanted = request.sampling.logprobs
        if wanted is None:
            return None
        found = []
        for token, candidates in zip(token_ids, made.logprobs_diff, strict=True):
            ranked = sorted(candidates.items(), key=lambda item: -item[1].logprob)
            top = tuple((other, one.logprob) for other, one in ranked[:wanted])
            found.append(TokenLogprob(token, candidates[token].logprob, top))
        return found

    async def _follow(self, seconds: float) -> None:
        """Take over its statistics of the KV cache as they come: there are none while it is idle."""
        while True:
            async for told in self._llm.get_stats_async(timeout=seconds):
                figures = json.loads(told) if isinstance(told, str) else told
                blocks = figures.get("kvCacheStats") or {}
                self._counts.kv_blocks_used = blocks.get("usedNumBlocks", self._counts.kv_blocks_used)
                self._counts.kv_blocks_total = blocks.get("maxNumBlocks", self._counts.kv_blocks_total)
            await asyncio.sleep(seconds)


def _check(options: TensorrtLlmOptions) -> None:
    if options.quantization != "none":
        raise InvalidArgument(
            f"{options.quantization!r} is not made here: give a checkpoint that ModelOpt has quantized, with 'none'",
            field="quantization",
        )
    if (options.backend == "tensorrt") != (options.engine_dir is not None):
        raise InvalidArgument("the backend 'tensorrt', and no other, takes a built engine", field="engine_dir")
    if options.backend == "tensorrt" and options.kv_cache_dtype != "auto":
        raise InvalidArgument("a built engine has its own, 'auto' is right", field="kv_cache_dtype")


def _dtype(options: TensorrtLlmOptions, config: dict[str, Any]) -> str:
    if options.dtype != "auto":
        return options.dtype
    return config.get("dtype") or config.get("torch_dtype") or "bfloat16"


def _quantization(model_dir: str) -> str:
    """As ModelOpt has written it beside the checkpoint."""
    file = Path(model_dir, "hf_quant_config.json")
    if not file.is_file():
        return "none"
    return str(json.loads(file.read_text()).get("quantization", {}).get("quant_algo") or "none").lower()
