"""How many adapters TensorRT-LLM gets room for: its own default, 2 % of the device, is known to be too small."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from ..errors import InvalidArgument, UnsupportedModel
from .one_adapter.base_shapes import BaseShapes
from .tensorrt_llm_options import TensorrtLlmOptions
from .tensorrt_llm_surface import AUTO_ADDED, Names

BYTES_PER_VALUE = 2  # adapters are fp16 or bf16


@dataclass(frozen=True)
class AdapterRoom:
    """Room for adapters of `max_rank` on `modules` (TensorRT-LLM's names) of every layer."""

    modules: tuple[str, ...]
    with_added: tuple[str, ...]  # and those that it adds, which take room too
    leaves: frozenset[str]  # of the same, as Hugging Face calls them
    max_rank: int
    max_loras: int  # on the device
    max_cpu_loras: int
    module_layers_per_adapter: int

    @property
    def device_module_layers(self) -> int:
        return self.module_layers_per_adapter * self.max_loras

    @property
    def host_module_layers(self) -> int:
        return self.module_layers_per_adapter * self.max_cpu_loras


def adapter_room(shapes: BaseShapes, known: Mapping[str, str], options: TensorrtLlmOptions) -> AdapterRoom:
    """What `options` ask for, within the memory that they allow.

    A module layer is a unit of one rank of one module in one layer: an adapter takes max_rank · layers · modules.

    Raises:
        InvalidArgument: naming the option that asks for too much, or a module that the base model lacks.
    """
    present = {module.rpartition(".")[2] for module in shapes.linears}
    for name in options.lora_target_modules:
        if known.get(name) not in present:
            right = ", ".join(name for name, leaf in known.items() if leaf in present)
            raise InvalidArgument(
                f"{name!r} is not in the base model, some of {right} are", field="lora_target_modules"
            )
    modules = options.lora_target_modules or tuple(name for name, leaf in known.items() if leaf in present)
    leaves = frozenset(known[name] for name in modules)
    added = tuple(name for name in AUTO_ADDED if known[name] in present and name not in modules)
    with_added = (*modules, *added)
    size = _adapter_bytes(shapes, {known[name] for name in with_added}, options.max_rank)
    room = {}
    for field, count, limit in (
        ("max_adapters", options.max_adapters, options.device_adapter_bytes),
        ("host_adapters", options.adapters_in_host_memory, options.host_adapter_bytes),
    ):
        room[field] = count if limit is None else min(count, limit // size)
        if room[field] < 1:
            raise InvalidArgument(
                f"an adapter of rank {options.max_rank} takes {size} bytes, {limit} hold none", field=field
            )
    return AdapterRoom(
        modules,
        with_added,
        leaves,
        options.max_rank,
        room["max_adapters"],
        max(room["host_adapters"], room["max_adapters"]),
        options.max_rank * shapes.layers * len(with_added),
    )


def lora_config(names: Names, room: AdapterRoom) -> Any:
    """Always given: without it every adapter is ignored in silence."""
    return _make(
        names.lora_config,
        lora_target_modules=list(room.modules),
        # With those that it adds: a map that is given is the whole map to it.
        trtllm_modules_to_hf_modules={name: names.surface.lora_modules[name] for name in room.with_added},
        max_lora_rank=room.max_rank,
        max_loras=room.max_loras,
        max_cpu_loras=room.max_cpu_loras,
    )


def peft_cache_config(names: Names, room: AdapterRoom) -> Any:
    return _make(
        names.peft_cache_config,
        num_device_module_layer=room.device_module_layers,
        num_host_module_layer=room.host_module_layers,
        optimal_adapter_size=min(8, room.max_rank),
        max_adapter_size=room.max_rank,
    )


def _make(kind: type, **given: Any) -> Any:
    """An instance, where the class has these fields: a dataclass in some versions, pydantic's in others.

    Raises:
        UnsupportedModel: naming a field that this version lacks.
    """
    known = {field.name for field in fields(kind)} if is_dataclass(kind) else set(kind.model_fields)
    if missing := sorted(given.keys() - known):
        raise UnsupportedModel(f"{kind.__name__} of this build of tensorrt_llm has no field {missing[0]}")
    return kind(**given)


def _adapter_bytes(shapes: BaseShapes, leaves: set[str], rank: int) -> int:
    values = sum(
        sum(shapes.shape(module) or (0, 0)) for module in shapes.linears if module.rpartition(".")[2] in leaves
    )
    return max(1, values * rank * BYTES_PER_VALUE)
