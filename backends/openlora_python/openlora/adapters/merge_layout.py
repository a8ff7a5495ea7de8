"""What a merge will be, module by module, before any weights are read: ranks, sizes, and what can't be done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import AdapterInvalid, InvalidArgument
from .base_modules import BaseModules
from .lora_config import AdapterConfig
from .merge_plan import METHODS, MergeLimits, MergePlan

BYTES_PER_VALUE = 4  # merged weights are float32
SVD_WORKSPACE = 10  # matrices of the size of a module that an SVD of it holds at its peak, generously


@dataclass(frozen=True)
class SourcePart:
    """A source's LoRA on one module. `source` counts the plan's sources from 0."""

    source: int
    rank: int
    scaling: float


@dataclass(frozen=True)
class MergedModule:
    """One module of the merged adapter: A is `[rank, columns]`, B is `[rows, rank]`."""

    name: str
    rows: int  # out features
    columns: int  # in features
    rank: int
    parts: tuple[SourcePart, ...]  # of the sources that change it; the others count as zero

    @property
    def bytes(self) -> int:
        return self.rank * (self.rows + self.columns) * BYTES_PER_VALUE


def lay_out(
    plan: MergePlan,
    names: Sequence[str],
    configs: Sequence[AdapterConfig],
    modules: BaseModules,
    max_rank: int,
    limits: MergeLimits,
) -> tuple[MergedModule, ...]:
    """The modules that any source changes, in the base model's own order.

    Args:
        names: of the sources, for messages.
        configs: of the sources.
        max_rank: highest rank that the engine takes.

    Raises:
        InvalidArgument: a rank over the limit, ranks that differ where the method needs equal ones (naming the module
            and the adapters), or more memory at work than `limits` allow.
        AdapterInvalid: no source changes any module of this base model.
    """
    parts = {name: _parts(name, configs) for name in modules.linear if name != modules.output_head}
    parts = {name: found for name, found in parts.items() if found}
    if not parts:
        raise AdapterInvalid(f"{', '.join(names)}: no module of the base model is changed by them")
    asked = plan.rank or max(part.rank for found in parts.values() for part in found)
    merged = tuple(
        MergedModule(name, *modules.linear[name], _rank(plan, name, *modules.linear[name], found, asked, names), found)
        for name, found in parts.items()
    )
    _check_rank(plan, max(merged, key=lambda module: module.rank), max_rank)
    needed = max([working_bytes(plan, module) for module in merged] + [3 * sum(module.bytes for module in merged)])
    if needed > limits.max_memory_bytes:
        raise InvalidArgument(
            f"this merge would hold {needed >> 20} MiB in memory, {limits.max_memory_bytes >> 20} MiB are allowed here",
            field="method",
        )
    return merged


def working_bytes(plan: MergePlan, module: MergedModule) -> int:
    """An upper bound of what merging one module holds at a time."""
    stacked = sum(part.rank for part in module.parts) * (module.rows + module.columns) * BYTES_PER_VALUE
    if METHODS[plan.method].space == "dense":
        return module.rows * module.columns * BYTES_PER_VALUE * (len(module.parts) + SVD_WORKSPACE)
    return stacked * (8 if METHODS[plan.method].space == "low_rank" else 4)


def _parts(module: str, configs: Sequence[AdapterConfig]) -> tuple[SourcePart, ...]:
    found = [(number, config.of(module)) for number, config in enumerate(configs) if config.targets(module)]
    return tuple(SourcePart(number, lora.rank, lora.scaling) for number, lora in found)


def _rank(
    plan: MergePlan,
    module: str,
    rows: int,
    columns: int,
    parts: tuple[SourcePart, ...],
    asked: int,
    names: Sequence[str],
) -> int:
    total = sum(part.rank for part in parts)
    match METHODS[plan.method].space:
        case "rows":
            return total
        case "low_rank":
            return min(asked, rows, columns, total)  # the sum has no higher rank than that
        case "dense":
            return min(asked, rows, columns)
    if len({part.rank for part in parts}) > 1:
        ranks = ", ".join(f"{names[part.source]} has {part.rank}" for part in parts)
        raise InvalidArgument(
            f"{plan.method!r} needs equal ranks, in {module} {ranks}: use 'cat', 'svd' or 'ties_svd'", field="method"
        )
    return parts[0].rank


def _check_rank(plan: MergePlan, widest: MergedModule, max_rank: int) -> None:
    if widest.rank <= max_rank:
        return
    if plan.rank is not None:
        raise InvalidArgument(f"{plan.rank} is over the limit of {max_rank}", field="rank")
    raise InvalidArgument(
        f"{plan.method!r} gives rank {widest.rank} in {widest.name}, the limit is {max_rank}: "
        f"'svd' with rank {max_rank} comes nearest",
        field="method",
    )
