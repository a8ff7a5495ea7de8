"""`adapter_config.json` as PEFT writes it: what this server computes exactly, and a refusal for the rest.

PEFT loads an adapter by its configuration and drops what does not fit; here every setting is either known to change
nothing at inference, or computed, or refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import AdapterInvalid
from ..strict_json import parse_strict

MAX_CONFIG_BYTES = 1 << 20
MAX_ENTRIES = 2048  # of a list of names or patterns: far more than any base model has modules
FLOAT32_MAX = (2 - 2**-23) * 2.0**127
ALL_LINEAR = "all-linear"  # PEFT's short form: every linear module but the output head
Number = TypeVar("Number", int, float)
Patterns = tuple[tuple[re.Pattern[str], Number], ...]

# Initialisations that leave the base weights as they were; the others train against a changed base.
PLAIN_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")
# No effect on inference, or read below.
NEUTRAL = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
REFUSALS = {
    "use_dora": "DoRA is not supported",
    "modules_to_save": "it brings whole modules (modules_to_save), only LoRA matrices are supported",
    "trainable_token_indices": "trained token embeddings are not supported",
    "layer_replication": "layer replication changes the base model and is not supported",
    "lora_bias": "biases of LoRA matrices (lora_bias) are not supported",
    "alora_invocation_tokens": "activated LoRA (aLoRA) is not supported",
    "megatron_config": "Megatron adapters are not supported",
    "loftq_config": "LoftQ changes the base weights and is not supported",
    "target_parameters": "LoRA on bare parameters (target_parameters) is not supported",
}


@dataclass(frozen=True)
class ModuleLora:
    """What the configuration says of one targeted module: y += scaling · (x Aᵀ) Bᵀ."""

    rank: int
    scaling: float


@dataclass(frozen=True)
class AdapterConfig:
    """A configuration that this server can compute with."""

    rank: int
    alpha: float
    rank_stabilized: bool
    target_modules: str | tuple[str, ...]  # a pattern, or names and endings of names
    exclude_modules: str | tuple[str, ...]
    layers: tuple[int, ...] | None  # None = all
    layers_pattern: tuple[str, ...]
    rank_pattern: Patterns[int]  # of ends of names, from a dot on; the first match counts
    alpha_pattern: Patterns[float]

    @classmethod
    def read(cls, directory: Path) -> AdapterConfig:
        """The configuration in `directory`.

        Raises:
            AdapterInvalid: with the reason, when it isn't plain LoRA.
        """
        return cls.parse((directory / "adapter_config.json").read_bytes())

    @classmethod
    def parse(cls, text: bytes) -> AdapterConfig:
        tree = parse_object(text, "adapter_config.json", MAX_CONFIG_BYTES)
        _refuse_unsupported(tree)
        layers = tree.get("layers_to_transform")
        layers = [layers] if isinstance(layers, int) else layers
        if layers is not None and not (isinstance(layers, list) and all(type(layer) is int for layer in layers)):
            raise AdapterInvalid(f"layers_to_transform is {layers!r:.80}, a list of layer numbers is wanted")
        _check_length(layers or (), "layers_to_transform")
        targets = _names(tree, "target_modules")
        if not targets:
            raise AdapterInvalid("target_modules is missing: the names of the modules that it changes are wanted")
        if isinstance(targets, str) and not (layers is None and tree.get("layers_pattern") is None):
            raise AdapterInvalid("layers_to_transform and layers_pattern need a list of target_modules, not a pattern")
        if tree.get("layers_pattern") and not layers:
            raise AdapterInvalid("layers_pattern needs layers_to_transform")
        if not 0 <= _number(tree.get("lora_dropout", 0), "lora_dropout") <= 1:
            raise AdapterInvalid(f"lora_dropout is {tree['lora_dropout']!r:.40}, a number from 0 to 1 is wanted")
        return cls(
            rank=_rank(tree.get("r"), "r"),
            alpha=_number(tree.get("lora_alpha"), "lora_alpha"),
            rank_stabilized=_flag(tree, "use_rslora"),
            target_modules=targets,
            exclude_modules=_names(tree, "exclude_modules"),
            layers=tuple(layers) if layers else None,
            layers_pattern=_as_tuple(_names(tree, "layers_pattern")),
            rank_pattern=_patterns(tree, "rank_pattern", _rank),
            alpha_pattern=_patterns(tree, "alpha_pattern", _number),
        )

    @property
    def largest_rank(self) -> int:
        return max([self.rank, *(rank for _, rank in self.rank_pattern)])

    @property
    def targets_all(self) -> bool:
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def targets(self, module: str) -> bool:
        """Whether `module` (a dotted name inside the base model) gets LoRA matrices, by PEFT's rules.

        `all-linear` says yes to every module: only who knows the base model can leave its output head out.
        """
        if _matches(self.exclude_modules, module):
            return False
        if self.targets_all:
            return True
        if not _matches(self.target_modules, module):
            return False
        if self.layers is None or isinstance(self.target_modules, str) or module in self.target_modules:
            return True
        layer = self._layer(module)
        return layer is not None and layer in self.layers

    def of(self, module: str) -> ModuleLora:
        """Rank and scaling of a targeted module: alpha / rank, rank-stabilized alpha / √rank."""
        rank = _first_match(self.rank_pattern, module, self.rank)
        alpha = _first_match(self.alpha_pattern, module, self.alpha)
        return ModuleLora(rank, alpha / math.sqrt(rank) if self.rank_stabilized else alpha / rank)

    def _layer(self, module: str) -> int | None:
        patterns = [rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\." for pattern in self.layers_pattern]
        for pattern in patterns or [r".*?\.[^.]*\.(?P<layer>\d+)\."]:
            if found := _compiled(pattern, "layers_pattern").match(module):
                return int(found["layer"])
        return None


def parse_object(text: bytes, name: str, limit: int) -> dict[str, Any]:
    """A JSON object of at most `limit` bytes in UTF-8: see `parse_strict`.

    Raises:
        AdapterInvalid: naming the file and the fault.
    """
    if len(text) > limit:
        raise AdapterInvalid(f"{name} is {len(text)} bytes, at most {limit} are allowed")
    try:
        tree = parse_strict(text)
    except ValueError as error:
        raise AdapterInvalid(f"{name} is not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise AdapterInvalid(f"{name} holds a {type(tree).__name__}, a JSON object is wanted")
    return tree


def _refuse_unsupported(tree: dict[str, Any]) -> None:
    if tree.get("peft_type") != "LORA":
        raise AdapterInvalid(f"peft_type is {tree.get('peft_type')!r:.40}, only 'LORA' is supported")
    if tree.get("task_type") not in (None, "CAUSAL_LM"):
        raise AdapterInvalid(f"task_type is {tree['task_type']!r:.40}, only 'CAUSAL_LM' is supported")
    if tree.get("bias", "none") != "none":
        raise AdapterInvalid(f"bias is {tree['bias']!r:.40}, only 'none' is supported")
    initialisation = tree.get("init_lora_weights", True)
    if not (isinstance(initialisation, bool | str) and initialisation in PLAIN_INITIALISATIONS):
        raise AdapterInvalid(
            f"init_lora_weights {initialisation!r:.40} trains against changed base weights; convert it with "
            "save_pretrained(path_initial_model_for_weight_conversion=…)"
        )
    for key, value in tree.items():
        if key in NEUTRAL or value is None or value is False or value in ({}, []):
            continue
        raise AdapterInvalid(REFUSALS.get(key, f"the setting {key} = {value!r:.60} is not supported"))


def _names(tree: dict[str, Any], key: str) -> str | tuple[str, ...]:
    value = tree.get(key) or ()
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) and item for item in value):
        raise AdapterInvalid(f"{key} is {value!r:.80}, a pattern or a list of names is wanted")
    _check_length(value, key)
    return tuple(value)


def _check_length(entries: Sized, key: str) -> None:
    if len(entries) > MAX_ENTRIES:
        raise AdapterInvalid(f"{key} has {len(entries)} entries, at most {MAX_ENTRIES} are allowed")


def _as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _patterns(tree: dict[str, Any], key: str, read: Callable[[Any, str], Number]) -> Patterns[Number]:
    value = tree.get(key, {})
    if not isinstance(value, dict):
        raise AdapterInvalid(f"{key} is {value!r:.80}, an object of patterns is wanted")
    _check_length(value, key)
    return tuple(
        (_compiled(rf"(.*\.)?({pattern})$", key), read(item, f"{key}[{pattern!r:.80}]"))
        for pattern, item in value.items()
    )


def _matches(names: str | tuple[str, ...], module: str) -> bool:
    if isinstance(names, str):
        return names != "" and _compiled(names, "target_modules").fullmatch(module) is not None
    return module in names or any(module.endswith(f".{name}") for name in names)


def _first_match(patterns: Patterns[Number], module: str, default: Number) -> Number:
    """PEFT's `get_pattern_key`."""
    return next((value for pattern, value in patterns if pattern.match(module)), default)


def _compiled(pattern: str, key: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterInvalid(f"{key}: {pattern!r:.80} is not a pattern: {error}") from error


def _rank(value: Any, key: str) -> int:
    if type(value) is not int or value < 1:
        raise AdapterInvalid(f"rank {key} is {value!r:.40}, a whole number of at least 1 is wanted")
    return value


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise AdapterInvalid(f"{key} is {value!r:.40}, a number is wanted")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= FLOAT32_MAX:
        raise AdapterInvalid(f"{key} is out of range, a finite number of 32 bits is wanted")
    return number


def _flag(tree: dict[str, Any], key: str) -> bool:
    value = tree.get(key) or False
    if value is not True and value is not False:
        raise AdapterInvalid(f"{key} is {value!r:.40}, true or false is wanted")
    return value
