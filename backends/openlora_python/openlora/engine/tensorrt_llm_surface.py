"""Where the names that we use live in the versions of `tensorrt_llm` that we know, and what each version can do."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedModel
from .tensorrt_llm_abilities import (
    BUILT_ENGINE,
    TORCH_SAMPLER,
    TORCH_SAMPLER_WITH_PENALTIES,
    TORCH_SAMPLER_WITH_SEEDS,
    Abilities,
)

_MODULES = {
    "attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_dense": "o_proj",
    "mlp_h_to_4h": "gate_proj", "mlp_gate": "up_proj", "mlp_4h_to_h": "down_proj", "mlp_gate_up": "gate_up_proj",
}  # fmt: skip
AUTO_ADDED = ("attn_q", "attn_k", "attn_v")  # it adds those that are missing of these


@dataclass(frozen=True)
class Surface:
    """One release's, and those after it. Each name has the modules where it may be, the newest first."""

    lora_config: tuple[str, ...]
    lora_modules: dict[str, str]  # its names of linears -> the last part of Hugging Face's
    pytorch: Abilities
    built_engine: Abilities | None  # tensorrt_llm._tensorrt_engine, where there is one
    lora_request: tuple[str, ...] = ("tensorrt_llm.executor.request",)

    def abilities(self, backend: str) -> Abilities:
        found = self.built_engine if backend == "tensorrt" else self.pytorch
        assert found is not None, "import_names refuses built engines where there are none"
        return found


_LORA_HELPER = ("tensorrt_llm.lora_helper",)
_NEW_LORA = ("tensorrt_llm._torch.peft.lora.config", "tensorrt_llm.lora_helper")
_NEW_MODULES = {**_MODULES, "attn_qkv": "qkv_proj"}

# By the first release that is so; a final one comes after its candidates.
SURFACES = {
    "1.1": Surface(_LORA_HELPER, _MODULES, TORCH_SAMPLER, BUILT_ENGINE),
    "1.2": Surface(_LORA_HELPER, _MODULES, TORCH_SAMPLER, BUILT_ENGINE),
    "1.3": Surface(_NEW_LORA, _NEW_MODULES, TORCH_SAMPLER, None),
    "1.3.0rc24": Surface(_NEW_LORA, _NEW_MODULES, TORCH_SAMPLER_WITH_PENALTIES, None),
    "1.3.0rc26": Surface(_NEW_LORA, _NEW_MODULES, TORCH_SAMPLER_WITH_SEEDS, None),
}


def surface_of(version: str) -> Surface:
    """Raises UnsupportedModel: no surface of this minor version is known."""
    order = _order(version)
    known = [first for first in SURFACES if order and _order(first)[:2] == order[:2] and _order(first) <= order]
    if not known:
        minors = ", ".join(first for first in SURFACES if first.count(".") == 1)
        raise UnsupportedModel(f"tensorrt_llm {version} is not supported, one of {minors} is right")
    return SURFACES[known[-1]]


def _order(version: str) -> tuple[int, ...]:
    """Of `1.3`, which is before all that begins so, `1.3.0rc24` and `1.3.0`; () of what is none of them."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+)(?:rc(\d+)|(\.?dev))?)?", version)
    if found is None:
        return ()
    major, minor, patch, candidate, development = found.groups()
    if patch is None or development:
        return int(major), int(minor)
    return int(major), int(minor), int(patch), int(candidate) if candidate else 1 << 30


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
    request_error: type[Exception]  # of one request alone


def import_names(*, built_engine: bool) -> Names:
    """Import `tensorrt_llm` and find everything.

    Raises:
        UnsupportedModel: a version that we don't know, or one that can't load built engines when one is wanted.
    """
    import tensorrt_llm

    version = tensorrt_llm.__version__
    surface = surface_of(version)
    if built_engine and surface.built_engine is None:
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
        request_error=_find("RequestError", ("tensorrt_llm.llmapi",)),
    )


def _find(name: str, modules: tuple[str, ...]) -> Any:
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except (ModuleNotFoundError, AttributeError):
            continue
    raise UnsupportedModel(f"this build of tensorrt_llm has no {name} in {' or '.join(modules)}")
