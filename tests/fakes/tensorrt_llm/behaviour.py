"""How it behaves, trap by trap, as the source of the versions says."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import torch

from .oracle import AdapterMemory
from .signatures_kinds import bind, config_class, parameter_class, signature

BURST = 3  # steps that arrive together, as from a busy executor
BLOCK = 32


class RequestError(RuntimeError):
    """Comes out of the iteration, not out of the call."""


class Logprob:
    def __init__(self, logprob: float, rank: int) -> None:
        self.logprob, self.rank = logprob, rank


def make_names(table: dict[str, Any]) -> dict[str, type]:
    """Everything that the modules of this version hold."""
    names: dict[str, type] = {name: config_class(name, fields) for name, fields in table["configs"].items()}
    names.update({name: parameter_class(name, fields) for name, fields in table["parameters"].items()})
    names["RequestError"] = RequestError
    names["LoRARequest"] = _lora_request_class(table)
    shared = {"table": table, "generate_signature": signature(table["calls"]["generate_async"]), "names": names}
    names["LLM"] = type("LLM", (_Llm,), {**shared, "backend": "pytorch"})
    names["BuiltEngineLLM"] = type("LLM", (_Llm,), {**shared, "backend": "tensorrt"})
    return names


def _lora_request_class(table: dict[str, Any]) -> type:
    recorded = signature(table["calls"]["LoRARequest"])

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        self.__dict__.update(bind(recorded, args, kwargs))
        if not Path(self.lora_path).exists():
            raise ValueError(f"lora_path {self.lora_path} does not exist")

    return type("LoRARequest", (), {"__init__": __init__})


class _Llm:
    """`LLM(model, tokenizer=None, …, **kwargs)`."""

    table: dict[str, Any]
    generate_signature: Any
    names: dict[str, type]
    backend: str

    def __init__(self, model: str, **given: Any) -> None:
        known = self.table["llm"]
        own, other = ("pytorch_only", "tensorrt_only")[:: 1 if self.backend == "pytorch" else -1]
        for name in given:
            if name in known[other]:
                raise ValueError(f"{name} is not an argument of the {self.backend} backend's LLM")
            if name not in known["common"] and name not in known[own]:
                raise ValueError(f"LLM got invalid argument: {name}")
        self.arguments = {**known["common"], **known[own], **given}
        lora = self.arguments["lora_config"]
        kv = self.arguments["kv_cache_config"]
        if lora is not None and not lora.lora_dir:
            assert lora.lora_target_modules, "Expecting at least one lora target module"
        if lora is not None and lora.max_loras:
            room = self.arguments["peft_cache_config"]
            assert room is None or room.max_adapter_size >= lora.max_lora_rank, (
                "Not enough space allocated to device LoRA cache to hold 1 max sized LoRA"
            )
        if self.backend == "tensorrt":
            assert kv is None or kv.dtype == "auto", "KvCacheConfig.dtype must be auto"
            built = json.loads((Path(model) / "config.json").read_text())
            assert {"pretrained_config", "build_config"} <= built.keys(), "not an engine directory"
            model = built["pretrained_config"]["hf_dir"]
        self._has_tokenizer = not self.arguments["skip_tokenizer_init"]
        self._reuses = kv is None or kv.enable_block_reuse
        self.memory = AdapterMemory(model, lora)
        self.requests: list[dict[str, Any]] = []
        self.active: set[_Result] = set()
        self._blocks: set[Any] = set()
        self.closed = False

    def generate_async(self, *args: Any, **kwargs: Any) -> _Result:
        given = bind(self.generate_signature, args, kwargs)
        parameters, lora = given["sampling_params"], given["lora_request"]
        if lora is not None and not isinstance(lora, self.names["LoRARequest"]):
            raise TypeError(f"lora_request must be a LoRARequest, got {type(lora).__name__}")
        if parameters.end_id is None and not self._has_tokenizer:
            raise ValueError("end_id is None and there is no tokenizer to take it from")
        if parameters.pad_id is None and not self._has_tokenizer:
            raise ValueError("pad_id is None and there is no tokenizer to take it from")
        if parameters.detokenize and not self._has_tokenizer:
            raise ValueError("detokenize needs a tokenizer")
        if len(given["inputs"]) > self.arguments["max_num_tokens"] and not self.arguments["enable_chunked_prefill"]:
            raise ValueError("the prompt length is over max_num_tokens")
        if self.backend == "tensorrt" and parameters.logprobs and not self.arguments["gather_generation_logits"]:
            raise ValueError("logprobs need gather_generation_logits")
        self.requests.append(given)
        return _Result(self, given)

    def reused(self, tokens: list[int], lora: Any, salt: str | None) -> int:
        """Prompt tokens in blocks that someone with the same adapter id and salt has left."""
        if not self._reuses:
            return 0
        task = None if lora is None or self.memory.lora_config is None else lora.lora_int_id
        keys = [(task, salt, tuple(tokens[:end])) for end in range(BLOCK, len(tokens), BLOCK)]
        found = sum(key in self._blocks for key in keys)
        self._blocks.update(keys)
        return found * BLOCK

    def get_stats_async(self, timeout: float | None = None) -> Any:
        if self.backend == "pytorch" and not self.arguments["enable_iter_perf_stats"]:
            raise RuntimeError("enable_iter_perf_stats is off")

        async def told() -> Any:
            yield {
                "numActiveRequests": len(self.active),
                "numQueuedRequests": 0,
                "kvCacheStats": {"usedNumBlocks": len(self.active), "maxNumBlocks": 1000},
            }

        return told()

    def shutdown(self) -> None:
        self.closed = True


class _Completion:
    def __init__(self) -> None:
        self.index = 0
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Logprob]] = []
        self.token_ids_diff: list[int] = []
        self.logprobs_diff: list[dict[int, Logprob]] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | None = None


class _Result:
    """A `RequestOutput`: awaited step by step, itself what every step yields."""

    def __init__(self, llm: _Llm, given: dict[str, Any]) -> None:
        self._llm, self._given = llm, given
        self.prompt_token_ids = list(given["inputs"])
        self.outputs = [_Completion()]
        self.finished = False
        self.cached_tokens = 0
        self.abort_calls = 0
        self._steps: list[tuple[list[int], list[dict[int, Logprob]], str | None]] = []
        self._parameters = given["sampling_params"]
        self._generator = torch.Generator().manual_seed((self._parameters.seed or 0) % 2**63)
        self._tokens = list(self.prompt_token_ids)
        try:
            asyncio.get_running_loop()
            self._has_queue = True
        except RuntimeError:
            self._has_queue = False
        llm.active.add(self)
        self._started = False

    def abort(self) -> None:
        self.abort_calls += 1
        if not self.finished:
            self._end("cancelled")

    def aborted(self) -> bool:
        return self.outputs[0].finish_reason == "cancelled"

    def __aiter__(self) -> _Result:
        return self

    async def __anext__(self) -> _Result:
        assert self._has_queue, "generate_async was not called from a coroutine: there is no queue to wait on"
        if self.finished:
            raise StopAsyncIteration
        if not self._steps:
            await asyncio.sleep(0)
            if self.finished:
                raise StopAsyncIteration
            self._compute()
        tokens, logprobs, reason = self._steps.pop(0)
        made = self.outputs[0]
        # What the step before gave is gone: the same lists hold other things now.
        made.token_ids_diff[:] = tokens
        made.logprobs_diff[:] = logprobs
        made.token_ids += tokens
        made.logprobs += logprobs
        if not self._given["streaming"]:
            return await self.__anext__() if reason is None else self._last(reason)
        return self if reason is None else self._last(reason)

    def _last(self, reason: str) -> _Result:
        self._end(reason)
        return self

    def _end(self, reason: str) -> None:
        self.outputs[0].finish_reason = reason
        self.finished = True
        self._llm.active.discard(self)

    def _compute(self) -> None:
        """The steps that arrive next."""
        if not self._started:
            self._started = True
            lora = self._given["lora_request"]
            self.cached_tokens = self._llm.reused(self.prompt_token_ids, lora, self._given["cache_salt"])
        for _ in range(BURST):
            token, logprob = self._next_token()
            self._tokens.append(token)
            reason = self._reason(token)
            cut = reason == "stop" and not self._parameters.include_stop_str_in_output
            self._steps.append(([] if cut else [token], [] if cut or logprob is None else [logprob], reason))
            if reason:
                return

    def _reason(self, token: int) -> str | None:
        made = len(self._tokens) - len(self.prompt_token_ids)
        if token in (self._parameters.stop_token_ids or ()):
            return "stop"
        limit = self._llm.arguments["max_seq_len"] or 2**31
        return "length" if made >= self._parameters.max_tokens or len(self._tokens) >= limit else None

    def _next_token(self) -> tuple[int, dict[int, Logprob] | None]:
        parameters = self._parameters
        try:
            raw = self._llm.memory.logits(self._tokens, self._given["lora_request"])
        except Exception as error:
            self._llm.active.discard(self)
            raise RequestError(str(error)) from error
        logits = self._penalized(raw.clone())
        if len(self._tokens) - len(self.prompt_token_ids) < (parameters.min_tokens or 0):
            logits[list(parameters.stop_token_ids or ())] = -torch.inf
        if not parameters.temperature or parameters.top_k == 1:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial(self._probabilities(logits), 1, generator=self._generator))
        return token, None if parameters.logprobs is None else _logprobs(raw, token, parameters.logprobs)

    def _penalized(self, logits: torch.Tensor) -> torch.Tensor:
        parameters = self._parameters
        made = self._tokens[len(self.prompt_token_ids) :]
        for token in set(self._tokens) if parameters.repetition_penalty else ():
            logits[token] *= parameters.repetition_penalty ** (1 if logits[token] < 0 else -1)
        for token in set(made):
            logits[token] -= (parameters.presence_penalty or 0) + (parameters.frequency_penalty or 0) * made.count(
                token
            )
        return logits

    def _probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        parameters = self._parameters
        chances = (logits / parameters.temperature).softmax(-1)
        if parameters.top_k:
            chances[chances < chances.topk(min(parameters.top_k, len(chances))).values[-1]] = 0
        if parameters.top_p:
            ordered, order = chances.sort(descending=True)
            chances[order[(ordered.cumsum(-1) - ordered) > parameters.top_p]] = 0
        if parameters.min_p:
            chances[chances < parameters.min_p * chances.max()] = 0
        return chances / chances.sum()


def _logprobs(logits: torch.Tensor, token: int, count: int) -> dict[int, Logprob]:
    values = logits.log_softmax(-1)
    best = values.topk(min(count, len(values)))
    found = {int(one): Logprob(float(value), rank + 1) for rank, (value, one) in enumerate(zip(*best, strict=True))}
    if token not in found:
        found[token] = Logprob(float(values[token]), int((values > values[token]).sum()) + 1)
    return found
