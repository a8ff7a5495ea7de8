"""A PEFT adapter directory read into memory, whole or not at all.

Ingest validates adapters before they get a digest; the engine checks again, because applying part of an adapter
means that the base model answers in its place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from ..errors import AdapterInvalid, Unavailable
from .adaptable import AdaptableLinear
from .lora import Adapter, LoraCompute, LoraPair, module_rank, module_scaling

_PREFIX = "base_model.model."

# Fields of adapter_config.json that change nothing in what is computed, or that are handled here.
_ACCEPTED = frozenset({
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "use_rslora",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core", "loftq_config",
    "eva_config", "runtime_config", "qalora_group_size", "init_lora_weights", "bias",
})  # fmt: skip
# Initialisations that leave the base weights as they are; the others (PiSSA, OLoRA, CorDA, LoftQ …) change them.
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


class AdapterReader:
    """Reads adapters for one base model: its linears by name, its dtype and device, and the highest rank allowed."""

    def __init__(
        self,
        linears: Mapping[str, AdaptableLinear],
        lora: LoraCompute,
        dtype: torch.dtype,
        device: torch.device,
        max_rank: int,
    ) -> None:
        self.shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
        self.lora = lora
        self.dtype = dtype
        self.device = device
        self.max_rank = max_rank

    def read(self, digest: str, path: str) -> Adapter:
        """The adapter in directory `path`.

        Raises:
            AdapterInvalid: naming the digest and what is wrong; nothing of the adapter is used then.
            Unavailable: the file system failed.
        """
        try:
            config = self._config(_read(path, "adapter_config.json"))
            tensors = load_safetensors(_read(path, "adapter_model.safetensors"))
            return self.lora.prepare(digest, self._pairs(config, tensors))
        except SafetensorError as error:
            raise AdapterInvalid(f"adapter {digest}: adapter_model.safetensors can't be read: {error}") from error
        except re.error as error:
            raise AdapterInvalid(f"adapter {digest}: adapter_config.json has a bad pattern: {error}") from error
        except _Refused as refusal:
            raise AdapterInvalid(f"adapter {digest}: {refusal}") from refusal
        except OSError as error:
            raise Unavailable(f"adapter {digest}: can't be read: {error.strerror}", retry_after_ms=1000) from error

    def _config(self, data: bytes) -> LoraConfig:
        try:
            values = json.loads(data)
        except ValueError as error:
            raise _Refused(f"adapter_config.json is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise _Refused("adapter_config.json is not an object")
        _refuse_unsupported(values)
        known = {field.name for field in fields(LoraConfig)}
        try:
            config = LoraConfig(**{name: value for name, value in values.items() if name in known})
        except (TypeError, ValueError) as error:
            raise _Refused(f"adapter_config.json: {error}") from error
        patterns = [config.rank_pattern, config.alpha_pattern]
        if not all(isinstance(pattern, dict) for pattern in patterns):
            raise _Refused("rank_pattern and alpha_pattern must be objects")
        ranks = [config.r, *config.rank_pattern.values()]
        if not all(type(rank) is int and rank > 0 for rank in ranks):
            raise _Refused(f"ranks must be positive integers, found {ranks}")
        if max(ranks) > self.max_rank:
            raise _Refused(f"rank {max(ranks)} is over the limit of {self.max_rank}")
        alphas = [config.lora_alpha, *config.alpha_pattern.values()]
        if not all(type(alpha) in (int, float) and abs(alpha) < float("inf") for alpha in alphas):
            raise _Refused(f"lora_alpha must be finite numbers, found {alphas}")
        return config

    def _pairs(self, config: LoraConfig, tensors: dict[str, torch.Tensor]) -> dict[str, LoraPair]:
        halves: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            module, side = self._place(key)
            halves.setdefault(module, {})[side] = tensor
        targets = self._targets(config)
        if not halves:
            raise _Refused("adapter_model.safetensors is empty")
        if missing := sorted(targets - halves.keys()):
            raise _Refused(f"no weights for {len(missing)} targeted modules, the first is {missing[0]}")
        if surplus := sorted(halves.keys() - targets):
            raise _Refused(f"weights for {len(surplus)} modules not in target_modules, the first is {surplus[0]}")
        return {module: self._pair(config, module, sides) for module, sides in sorted(halves.items())}

    def _place(self, key: str) -> tuple[str, str]:
        """The module and side (A or B) that a key of the file belongs to."""
        for side in ("A", "B"):
            module = key.removeprefix(_PREFIX).removesuffix(f".lora_{side}.weight")
            if key == f"{_PREFIX}{module}.lora_{side}.weight" and module in self.shapes:
                return module, side
        raise _Refused(f"key {key} matches no adaptable linear of the base model")

    def _targets(self, config: LoraConfig) -> set[str]:
        if config.target_modules == "all-linear":
            return set(self.shapes)
        return {name for name in self.shapes if check_target_module_exists(config, name)}

    def _pair(self, config: LoraConfig, module: str, sides: dict[str, torch.Tensor]) -> LoraPair:
        out_features, in_features = self.shapes[module]
        rank = module_rank(config, module)
        for side, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
            name = f"{module}.lora_{side}"
            if side not in sides:
                raise _Refused(f"{name} is missing")
            if tuple(sides[side].shape) != shape:
                raise _Refused(f"{name} has shape {tuple(sides[side].shape)}, {shape} is right")
            if not sides[side].is_floating_point():
                raise _Refused(f"{name} has dtype {sides[side].dtype}, a floating-point type is right")
        # Checked after the conversion: a large fp32 number may be infinite in fp16.
        converted = {side: tensor.to(self.device, self.dtype).contiguous() for side, tensor in sides.items()}
        for side, tensor in converted.items():
            if not torch.isfinite(tensor).all():
                raise _Refused(f"{module}.lora_{side} holds NaN or Inf (as {self.dtype})")
        return LoraPair(converted["A"], converted["B"], module_scaling(config, module))


class _Refused(Exception):
    """Why an adapter is refused; `read` puts the digest in front."""


def _read(path: str, name: str) -> bytes:
    """The whole file. It is never mapped: a mapped file that someone rewrites is a SIGBUS for every request."""
    try:
        return Path(path, name).read_bytes()
    except FileNotFoundError as error:
        raise _Refused(f"{name} is missing") from error


def _refuse_unsupported(values: dict[str, Any]) -> None:
    if values.get("peft_type") != "LORA":
        raise _Refused(f"peft_type is {values.get('peft_type')!r}, 'LORA' is right")
    if values.get("bias", "none") != "none":
        raise _Refused(f"bias is {values['bias']!r}, 'none' is right")
    init = values.get("init_lora_weights")
    if not any(init is plain or (isinstance(init, str) and init == plain) for plain in _PLAIN_INITS):
        raise _Refused(f"init_lora_weights {init!r} changes the base weights; convert the adapter to plain LoRA")
    for name, value in values.items():
        if name not in _ACCEPTED and value not in (None, False, [], {}, ""):
            raise _Refused(f"{name} = {json.dumps(value)} is not supported")
