"""What is known of TensorRT-LLM's versions, of GPUs, and of the modules that adapters may change.

Sources are named beside the facts: files of NVIDIA/TensorRT-LLM, its documentation, its pull requests (#…), and
`docs/introduction/compatibility.md` of triton-inference-server/server for containers. None of it was executed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import InvalidArgument
from .shape import ModelShape

GIB = 1 << 30
MIB = 1 << 20

Architecture = Literal["Ampere", "Ada", "Hopper", "Blackwell"]
Weights = Literal["none", "fp8", "int8-weight-only", "nvfp4"]
KvCache = Literal["auto", "fp8", "nvfp4"]


@dataclass(frozen=True)
class Gpu:
    """`memory` is what nvidia-smi reports as total, in bytes; `compute` the capability, 90 for 9.0."""

    name: str
    architecture: Architecture
    compute: int
    memory: int


# Memory: NVML's totals, published for all but the last two, which are from memory and to be compared with the
# machine's.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100-40GB", "Ampere", 80, 40_960 * MIB),
        Gpu("A100-80GB", "Ampere", 80, 81_920 * MIB),
        Gpu("L4", "Ada", 89, 23_034 * MIB),
        Gpu("L40S", "Ada", 89, 46_068 * MIB),
        Gpu("H100-80GB", "Hopper", 90, 81_559 * MIB),
        Gpu("H200-141GB", "Hopper", 90, 143_771 * MIB),
        Gpu("B200-180GB", "Blackwell", 100, 183_359 * MIB),
        Gpu("RTX-PRO-6000-96GB", "Blackwell", 120, 97_887 * MIB),
    )
}


@dataclass(frozen=True)
class Version:
    """One release of TensorRT-LLM.

    engine_path: trtllm-build and `_tensorrt_engine.LLM` exist (removed on main in July 2026, #15763 to #16369).
    containers: `nvcr.io/nvidia/tritonserver` tags that hold it, newest first; their stubs are CPython 3.12.3.
    leaks_adapters: every distinct adapter leaves a copy in GPU memory (fixed by #12815 in 1.3.0rc12).
    qwen3_mlp_adapters: Qwen 3's MLP gives its layer index to its adapters (#12785, 1.3.0rc12).
    adapters_in_graphs: CUDA graphs with adapters: `wrong` (#5480), `unverified` (whether the release has #8279 was not
        established), `right`.
    fp8_llama_tensor_parallel: adapters beside Llama in FP8 at TP > 1 (#9808, reviewed until 2026-01-21).
    """

    name: str
    containers: tuple[str, ...]
    engine_path: bool
    leaks_adapters: bool
    qwen3_mlp_adapters: bool
    adapters_in_graphs: Literal["wrong", "unverified", "right"]
    fp8_llama_tensor_parallel: Literal["wrong", "unverified", "right"]


VERSIONS = {
    version.name: version
    for version in (
        Version("1.1.0", ("26.02", "26.01", "25.12"), True, True, False, "wrong", "wrong"),
        Version("1.2.0", ("26.03",), True, True, False, "unverified", "unverified"),
        Version("1.2.1", ("26.07", "26.06", "26.05", "26.04"), True, True, False, "unverified", "unverified"),
        Version("1.3.0", (), False, False, True, "right", "right"),
    )
}


def gpu_named(name: str) -> Gpu:
    """Raises InvalidArgument: there is none of that name here."""
    if name not in GPUS:
        raise InvalidArgument(f"{name!r} is not in the catalogue, one of {', '.join(GPUS)} is right", field="gpu")
    return GPUS[name]


def version_named(name: str) -> Version:
    """Raises InvalidArgument: it is not in the catalogue."""
    if name not in VERSIONS:
        known = ", ".join(VERSIONS)
        raise InvalidArgument(f"{name!r} is not in the catalogue, one of {known} is right", field="version")
    return VERSIONS[name]


# Bytes of one stored value, scales included. NVFP4: 16 values share one FP8 scale; the FP32 scale of a tensor is left
# out.
WEIGHT_BYTES: dict[Weights, float] = {"none": 2.0, "fp8": 1.0, "int8-weight-only": 1.0, "nvfp4": 0.5 + 1 / 16}
KV_BYTES: dict[KvCache, float] = {"auto": 2.0, "fp8": 1.0, "nvfp4": 0.5 + 1 / 16}

QKV = ("attn_q", "attn_k", "attn_v")
MLP = ("mlp_h_to_4h", "mlp_gate", "mlp_4h_to_h")
# Fused projections of models that have them (Phi 3); the families of these recipes have none.
FUSED = ("attn_qkv", "mlp_gate_up")
MIXTURE = ("moe_h_to_4h", "moe_4h_to_h", "moe_gate", "moe_router", "mlp_router")
MODULES = (*QKV, "attn_dense", *MLP)


@dataclass(frozen=True)
class AdapterModule:
    """One linear layer that an adapter may change: A is [rank, inputs], B is [outputs, rank].

    A column-parallel layer's outputs are split over the ranks of tensor parallelism, a row-parallel one's inputs.
    Source: `LoraModule::createLoraModules`, cpp/tensorrt_llm/runtime/loraModule.cpp (there attn_dense takes `hidden`
    features: the same number for every family here).
    """

    name: str
    inputs: int
    outputs: int
    row_parallel: bool

    def size_on_rank(self, tensor_parallel: int) -> int:
        """`localInDim + localOutDim` of the C++ cache: parameters that one unit of rank takes on one GPU."""
        if self.row_parallel:
            return self.inputs // tensor_parallel + self.outputs
        return self.inputs + self.outputs // tensor_parallel


def adapter_module(name: str, shape: ModelShape) -> AdapterModule:
    """TensorRT-LLM's own names; `mlp_h_to_4h` is Hugging Face's gate_proj, and `mlp_gate` its up_proj
    (lora_helper.py)."""
    columns = {"attn_q": shape.query_size, "attn_k": shape.kv_size, "attn_v": shape.kv_size}
    columns |= {"mlp_h_to_4h": shape.mlp, "mlp_gate": shape.mlp}
    rows = {"attn_dense": shape.query_size, "mlp_4h_to_h": shape.mlp}
    if name in rows:
        return AdapterModule(name, rows[name], shape.hidden, row_parallel=True)
    return AdapterModule(name, shape.hidden, columns[name], row_parallel=False)
