"""The files of a merge: sources read a module at a time, the result written a module at a time, always the same bytes.

`safetensors.serialize` wants all tensors at once and orders metadata at random, so the header is written here.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open

from ..engine.api import WEIGHT_ONE
from ..errors import AdapterInvalid, Internal
from .base_modules import BaseModules
from .lora_config import MAX_CONFIG_BYTES, AdapterConfig, ModuleLora, parse_object
from .manifest import CONFIG_FILE, WEIGHTS_FILE
from .merge_layout import BYTES_PER_VALUE, MergedModule
from .merge_methods import COMBINE, Choices, Part
from .merge_plan import RECORD_KEY, MergePlan


class _Source:
    """An adapter in the cache. Mapped, not read: nobody rewrites the cache, and a fault here would cost one merge."""

    def __init__(self, directory: Path, weight: float) -> None:
        self._file = safe_open(directory / WEIGHTS_FILE, framework="pt")
        self._weight = weight

    def part(self, module: str, scaling: float) -> Part:
        a, b = (self._file.get_tensor(key).float() for key in _keys(module))
        return Part(a, b, self._weight, scaling)


def write_merged(
    directory: Path,
    plan: MergePlan,
    sources: Sequence[Path],
    layout: Sequence[MergedModule],
    modules: BaseModules,
    progress: Callable[[int, str], None],
) -> None:
    """Merge `sources`, adapter directories in the plan's order, into the two files of an adapter in `directory`.

    Args:
        layout: from `merge_layout.lay_out` for this plan, these sources and `modules`.
        progress: gets the number of modules that are done, and the name of the last one.

    Raises:
        AdapterInvalid: the merged numbers overflow float32, naming the module.
    """
    opened = [_Source(path, source.weight / WEIGHT_ONE) for path, source in zip(sources, plan.sources, strict=True)]
    generator = None if plan.seed is None else torch.Generator().manual_seed(plan.seed)
    with open(directory / WEIGHTS_FILE, "xb") as file:
        merged = MergedWeights(file, plan.record.decode(), layout)
        for done, module in enumerate(layout, start=1):
            parts = [opened[part.source].part(module.name, part.scaling) for part in module.parts]
            choices = Choices(
                module.rank, (plan.density or WEIGHT_ONE) / WEIGHT_ONE, plan.majority_sign or "total", generator
            )
            try:
                for factor in COMBINE[plan.method](parts, choices):
                    merged.append(factor)
            except AdapterInvalid as error:
                raise AdapterInvalid(error.message, field=f"module {module.name}") from error
            progress(done, module.name)
    (directory / CONFIG_FILE).write_text(merged_config(layout, modules, _base_name(sources)))


class MergedWeights:
    """A safetensors file of float32 factors, appended in the order of `layout`, A before B."""

    def __init__(self, file: BinaryIO, record: str, layout: Sequence[MergedModule]) -> None:
        self._file = file
        self._left: list[tuple[str, tuple[int, int]]] = []
        header: dict[str, object] = {"__metadata__": {"format": "pt", RECORD_KEY: record}}
        offset = 0
        for module in layout:
            shapes = ((module.rank, module.columns), (module.rows, module.rank))
            for key, shape in zip(_keys(module.name), shapes, strict=True):
                end = offset + shape[0] * shape[1] * BYTES_PER_VALUE
                header[key] = {"dtype": "F32", "shape": shape, "data_offsets": (offset, end)}
                self._left.append((key, shape))
                offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)

    def append(self, matrix: torch.Tensor) -> None:
        """The next factor.

        Raises:
            AdapterInvalid: when it isn't finite.
            Internal: when it hasn't the shape that the header says.
        """
        key, shape = self._left.pop(0)
        if matrix.shape != shape or matrix.dtype != torch.float32:
            raise Internal(f"{key} is {matrix.dtype} {list(matrix.shape)}, float32 {list(shape)} was laid out")
        if not torch.isfinite(matrix).all():
            raise AdapterInvalid("the merged numbers overflow float32")
        self._file.write(matrix.contiguous().numpy().astype("<f4", copy=False).data)


def merged_config(layout: Sequence[MergedModule], modules: BaseModules, base_name: str | None) -> str:
    """`adapter_config.json` for a layout: scaling 1 everywhere, exactly its modules, each with its own rank.

    Raises:
        Internal: when reading it back gives anything else.
    """
    ranks = {module.name: module.rank for module in layout}
    highest = max(ranks.values())
    patterns = {_pattern(names, ranks): rank for rank, names in sorted(_by_rank(ranks).items()) if rank != highest}
    tree = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": highest,
        "lora_alpha": highest,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "target_modules": _targets(ranks, modules),
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
    }
    text = json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
    config = AdapterConfig.parse(text.encode())
    wanted = {name: ModuleLora(rank, 1.0) for name, rank in ranks.items()}
    if {name: config.of(name) for name in modules.linear if config.targets(name)} != wanted:
        raise Internal("the configuration of the merged adapter does not read back as it was meant")
    return text


def _targets(names: Iterable[str], modules: BaseModules) -> list[str]:
    """Last parts of names where they mean exactly `names`, else the whole names."""
    wanted = set(names)
    leaves = {_leaf(name) for name in wanted}
    everything = {*modules.linear, *modules.embeddings, modules.output_head}
    meant = {name for name in everything if name is not None and _leaf(name) in leaves}
    return sorted(leaves if meant == wanted else wanted)


def _by_rank(ranks: dict[str, int]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = defaultdict(list)
    for name, rank in ranks.items():
        found[rank].append(name)
    return found


def _pattern(names: Sequence[str], ranks: dict[str, int]) -> str:
    """One expression for all `names`: PEFT tries every pattern on every module."""
    everywhere = Counter(map(_leaf, ranks))
    here = Counter(map(_leaf, names))
    short = {_leaf(name) if here[_leaf(name)] == everywhere[_leaf(name)] else name for name in names}
    return "|".join(re.escape(name) for name in sorted(short))


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _keys(module: str) -> tuple[str, str]:
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def _base_name(sources: Sequence[Path]) -> str | None:
    """What all sources call their base model; None when they don't agree."""
    trees = [parse_object((path / CONFIG_FILE).read_bytes(), CONFIG_FILE, MAX_CONFIG_BYTES) for path in sources]
    (name, *others) = {str(tree.get("base_model_name_or_path") or "") for tree in trees}
    return name if name and not others else None
