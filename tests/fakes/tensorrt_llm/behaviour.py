"""How it behaves, trap by trap, as the source of the versions says."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from .oracle import AdapterMemory
from .result import RequestError, Result
from .sampler import Sampler
from .signatures_kinds import bind, config_class, parameter_class, signature

BLOCK = 32
DEATH = "FAKE_TENSORRT_LLM_DEATH"  # a file: once it is there, its text is the error of the next iteration


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
        recorded = self.table["backends"][self.backend]
        guides = self.arguments["guided_decoding_backend"]
        if guides is not None and guides not in recorded["guided_decoding_backends"]:
            raise ValueError(f"Unsupported guided decoding backend {guides}")
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
        self.sampler = Sampler(recorded)
        self.requests: list[dict[str, Any]] = []
        self.active: set[Result] = set()
        self._told: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._blocks: set[Any] = set()
        self.closed = False

    def generate_async(self, *args: Any, **kwargs: Any) -> Result:
        given = bind(self.generate_signature, args, kwargs)
        parameters, lora = given["sampling_params"], given["lora_request"]
        if self.closed:
            raise RuntimeError("the executor has been shut down")
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
        if parameters.guided_decoding is not None and self.arguments["guided_decoding_backend"] is None:
            raise ValueError("a guided decoding request needs guided_decoding_backend")
        self.requests.append(given)
        return Result(self, given)

    def reused(self, tokens: list[int], lora: Any, salt: str | None) -> int:
        """Prompt tokens in blocks that someone with the same adapter id and salt has left."""
        if not self._reuses:
            return 0
        task = None if lora is None or self.memory.lora_config is None else lora.lora_int_id
        keys = [(task, salt, tuple(tokens[:end])) for end in range(BLOCK, len(tokens), BLOCK)]
        found = sum(key in self._blocks for key in keys)
        self._blocks.update(keys)
        return found * BLOCK

    def iterate(self) -> None:
        """One iteration of the executor: it counts when it begins, and there is none while nothing is active.

        A background error shuts everything down; one of a step is answered to its requests, and the next step fails
        like it.
        """
        if self.closed:
            raise RuntimeError("the executor has been shut down")
        self._told.put_nowait(
            {
                "numActiveRequests": len(self.active),
                "numQueuedRequests": 0,
                "kvCacheStats": {"usedNumBlocks": len(self.active), "maxNumBlocks": 1000},
            }
        )
        death = os.environ.get(DEATH)
        if death is not None and Path(death).exists():
            error = Path(death).read_text()
            self.closed = not error.startswith("CUDA")
            raise RuntimeError(error)

    def get_stats_async(self, timeout: float | None = None) -> Any:
        """The iterations since the last look, until for `timeout` seconds there is none."""
        if self.backend == "pytorch" and not self.arguments["enable_iter_perf_stats"]:
            raise RuntimeError("enable_iter_perf_stats is off")

        async def told() -> AsyncIterator[dict[str, Any]]:
            while True:
                try:
                    async with asyncio.timeout(timeout):
                        figures = await self._told.get()
                except TimeoutError:
                    return
                yield figures

        return told()

    def shutdown(self) -> None:
        self.closed = True
