"""Settings of the TensorRT-LLM engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .one_adapter.options import OneAdapterOptions


@dataclass(frozen=True, kw_only=True)
class TensorrtLlmOptions(OneAdapterOptions):
    """Settings of TensorRT-LLM beside the common ones, under its own names.

    `engine_dir` is a built engine (1.1 and 1.2 only): then the backend is `tensorrt`, and its limits are the engine's.
    """

    backend: Literal["pytorch", "tensorrt"] = "pytorch"
    engine_dir: str | None = None
    lora_target_modules: tuple[str, ...] = ()  # TensorRT-LLM's names; () = all that it knows of the base model
    device_adapter_bytes: int | None = None  # at most, for the device slots; None = what max_adapters takes
    host_adapter_bytes: int | None = None
    pipeline_parallel_size: int = 1
    free_gpu_memory_fraction: float = 0.9  # of what weights and adapters leave, for the KV cache
    kv_cache_dtype: str = "auto"
    enable_chunked_prefill: bool = True
    cuda_graph: bool = True
    stats_seconds: float = 1.0  # between two looks at its statistics
