"""How many adapters TensorRT-LLM gets room for: its own default, 2 % of the device, is known to be too small."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import InvalidArgument
from .one_adapter.base_shapes import BaseShapes
from .tensorrt_llm_options import TensorrtLlmOptions
from .tensorrt_llm_surface import AUTO_ADDED

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


def _adapter_bytes(shapes: BaseShapes, leaves: set[str], rank: int) -> int:
    values = sum(
        sum(shapes.shape(module) or (0, 0)) for module in shapes.linears if module.rpartition(".")[2] in leaves
    )
    return max(1, values * rank * BYTES_PER_VALUE)
