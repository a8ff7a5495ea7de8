"""Settings of the vLLM engine."""

from __future__ import annotations

from dataclasses import dataclass

from .one_adapter.options import OneAdapterOptions


@dataclass(frozen=True, kw_only=True)
class VllmOptions(OneAdapterOptions):
    """Settings of vLLM beside the common ones, under its own names."""

    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False
    block_size: int | None = None
