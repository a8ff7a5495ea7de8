"""Where the names that we use live in the versions of `tensorrt_llm` that we know, and what each version can do."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedModel

_MODULES = {
    "attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_dense": "o_proj",
    "mlp_h_to_4h": "gate_proj", "mlp_gate": "up_proj", "mlp_4h_to_h": "down_proj", "mlp_gate_up": "gate_up_proj",
}  # fmt: skip
AUTO_ADDED = ("attn_q", "attn_k", "attn_v")  # it adds those that are missing of these


@dataclass(frozen=True)
class Surface:
    """One version's. Each name has the modules where it may be, the newest first."""

    lora_config: tuple[str, ...]
    built_engines: bool  # tensorrt_llm._tensorrt_engine
    lora_modules: dict[str, str]  # its names of linears -> the last part of Hugging Face's
    lora_request: tuple[str, ...] = ("tensorrt_llm.executor.request",)


SURFACES = {
    (1, 1): Surface(("tensorrt_llm.lora_helper",), True, _MODULES),
    (1, 2): Surface(("tensorrt_llm.lora_helper",), True, _MODULES),
    (1, 3): Surface(
        ("tensorrt_llm._torch.peft.lora.config", "tensorrt_llm.lora_helper"),
        False,
        {**_MODULES, "attn_qkv": "qkv_proj"},
    ),
}


@dataclass(frozen=True)
class Names:
    """What was imported."""

    version: str
    surface: Surface
    llm: type
    sampling_params: type
    guided_decoding_params: type
    kv_cache_config: type
    peft_cache_config: type
    lora_config: type
    lora_request: type


def import_names(*, built_engine: bool) -> Names:
    """Import `tensorrt_llm` and find everything.

    Raises:
        UnsupportedModel: a version that we don't know, or one that can't load built engines when one is wanted.
    """
    import tensorrt_llm

    version = tensorrt_llm.__version__
    known = ", ".join(f"{major}.{minor}" for major, minor in SURFACES)
    found = re.match(r"(\d+)\.(\d+)", version)
    surface = SURFACES.get((int(found[1]), int(found[2]))) if found else None
    if surface is None:
        raise UnsupportedModel(f"tensorrt_llm {version} is not supported, one of {known} is right")
    if built_engine and not surface.built_engines:
        raise UnsupportedModel(
            f"tensorrt_llm {version} loads no built engines any more: give the checkpoint, or use 1.2"
        )
    return Names(
        version=version,
        surface=surface,
        llm=_find("LLM", ("tensorrt_llm._tensorrt_engine" if built_engine else "tensorrt_llm",)),
        sampling_params=_find("SamplingParams", ("tensorrt_llm",)),
        guided_decoding_params=_find("GuidedDecodingParams", ("tensorrt_llm.llmapi",)),
        kv_cache_config=_find("KvCacheConfig", ("tensorrt_llm.llmapi",)),
        peft_cache_config=_find("PeftCacheConfig", ("tensorrt_llm.llmapi.llm_args",)),
        lora_config=_find("LoraConfig", surface.lora_config),
        lora_request=_find("LoRARequest", surface.lora_request),
    )


def _find(name: str, modules: tuple[str, ...]) -> Any:
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except (ModuleNotFoundError, AttributeError):
            continue
    raise UnsupportedModel(f"this build of tensorrt_llm has no {name} in {' or '.join(modules)}")
