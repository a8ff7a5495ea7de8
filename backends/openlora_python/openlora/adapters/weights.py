"""Whether an adapter directory can be applied to the base model, whole and exactly; no model weights are loaded.

An adapter that passes here has, for every module that its configuration targets, one finite A/B pair of the right shape
and rank, and nothing else.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, deserialize

from ..errors import AdapterInvalid
from .base_modules import BaseModules
from .lora_config import MAX_ENTRIES, AdapterConfig, ModuleLora, parse_object
from .manifest import WEIGHTS_FILE

MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 2 * MAX_ENTRIES
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
EMBEDDING_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_embedding_[AB]")
SUPPORTED_DTYPES = ("F32", "F16", "BF16")
SHOWN = 3  # names in a message
# CPU time of a configuration's patterns on one module's name. The engine matches them again beside decoding, and `re`
# lets nobody else run meanwhile.
MATCH_SECONDS = 0.05


@dataclass(frozen=True)
class AdapterFacts:
    """What the catalog records of a valid adapter."""

    rank: int  # the highest of its modules
    target_modules: tuple[str, ...]  # last parts of their names, sorted
    parameters: int


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    dtype: str
    data: bytearray


def validate_adapter(
    name: str, directory: Path, made_for: str | None, modules: BaseModules, base_digest: str, max_rank: int
) -> AdapterFacts:
    """Check the adapter in `directory` against the base model.

    Args:
        name: for messages.
        directory: holds `adapter_config.json` and `adapter_model.safetensors`; a copy that nobody else writes.
        made_for: the `base` that its card names, if any; it must be this server's.
        modules: of the base model.
        base_digest: manifest digest of the base model.
        max_rank: highest rank that the engine takes.

    Raises:
        AdapterInvalid: naming the adapter and the exact reason.
    """
    with _told_of(name):
        _check_base(made_for, base_digest)
        expected = _targeted(AdapterConfig.read(directory), modules, max_rank)
        _check_tensors(_read(directory / WEIGHTS_FILE), expected, modules)
        return _facts(expected, modules)


def validate_config(
    name: str, directory: Path, made_for: str | None, modules: BaseModules, base_digest: str, max_rank: int
) -> AdapterFacts:
    """As `validate_adapter`, for an adapter whose weights are not here: what its configuration says of them."""
    with _told_of(name):
        _check_base(made_for, base_digest)
        return _facts(_targeted(AdapterConfig.read(directory), modules, max_rank), modules)


@contextmanager
def _told_of(name: str) -> Iterator[None]:
    try:
        yield
    except AdapterInvalid as error:
        raise AdapterInvalid(error.message, field=f"adapter {name}") from error


def _facts(expected: dict[str, ModuleLora], modules: BaseModules) -> AdapterFacts:
    return AdapterFacts(
        rank=max(lora.rank for lora in expected.values()),
        target_modules=tuple(sorted({module.rpartition(".")[2] for module in expected})),
        parameters=sum(lora.rank * sum(modules.linear[module]) for module, lora in expected.items()),
    )


def _check_base(made_for: str | None, base_digest: str) -> None:
    if made_for is None:
        return
    if not isinstance(made_for, str) or not re.fullmatch(r"[0-9a-f]{64}", made_for):
        raise AdapterInvalid(f"openlora.json: base is {made_for!r:.80}, a digest of 64 hex digits is wanted")
    if made_for != base_digest:
        raise AdapterInvalid(f"made for base model {made_for[:16]}…, this server runs {base_digest[:16]}…")


def _read(path: Path) -> dict[str, _Tensor]:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
        if size < 8 or header > size - 8:
            raise AdapterInvalid(f"{path.name} is not safetensors or cut short: {size} bytes")
        if header > MAX_HEADER_BYTES:
            raise AdapterInvalid(f"{path.name}: header of {header} bytes, at most {MAX_HEADER_BYTES} are allowed")
        file.seek(0)
        content = file.read()
    # Read here first: of a key that comes twice the library keeps one, and another reader may keep the other one.
    tree = parse_object(content[8 : 8 + header], f"{path.name}: its header", MAX_HEADER_BYTES)
    if len(tree) > MAX_TENSORS:
        raise AdapterInvalid(f"{path.name} has {len(tree)} tensors, at most {MAX_TENSORS} are allowed")
    try:
        entries = deserialize(content)
    except SafetensorError as error:
        raise AdapterInvalid(f"{path.name} is not valid safetensors: {error}") from error
    entries.sort(key=lambda entry: entry[0])  # so that of several faults always the same one is named
    return {key: _Tensor(tuple(entry["shape"]), entry["dtype"], entry["data"]) for key, entry in entries}


def _check_tensors(tensors: dict[str, _Tensor], expected: dict[str, ModuleLora], modules: BaseModules) -> None:
    pairs: dict[str, set[str]] = {}
    for key in tensors:
        module, side = _place(key, expected, modules)
        pairs.setdefault(module, set()).add(side)
    for module, sides in pairs.items():
        if len(sides) == 1:
            present = sides.pop()
            missing = "B" if present == "A" else "A"
            raise AdapterInvalid(f"{module} has lora_{present} but no lora_{missing}")
    if absent := [module for module in expected if module not in pairs]:
        raise AdapterInvalid(f"no weights for {_some(absent)}, which the configuration targets")
    for module, lora in expected.items():
        rows, columns = modules.linear[module]
        _check_matrix(f"{module}.lora_A", tensors[_key(module, "A")], 0, (lora.rank, columns), lora)
        _check_matrix(f"{module}.lora_B", tensors[_key(module, "B")], 1, (rows, lora.rank), lora)


def _targeted(config: AdapterConfig, modules: BaseModules, max_rank: int) -> dict[str, ModuleLora]:
    if config.largest_rank > max_rank:
        raise AdapterInvalid(f"rank {config.largest_rank} is over the limit of {max_rank}")
    if not config.targets_all:
        outside = [modules.output_head] if modules.output_head else []
        for name in [*modules.embeddings, *outside]:
            if config.targets(name):
                raise AdapterInvalid(f"LoRA on {name} (embeddings, output head) is not supported")
    targeted = {}
    for name in modules.linear:
        began = time.thread_time()
        if name != modules.output_head and config.targets(name):
            targeted[name] = config.of(name)
        if time.thread_time() - began > MATCH_SECONDS:
            raise AdapterInvalid(
                f"the patterns in its configuration took more than {MATCH_SECONDS * 1000:.0f} ms on {name}"
            )
    if not targeted:
        raise AdapterInvalid(f"target_modules {config.target_modules!r:.120} match no module of the base model")
    return targeted


def _place(key: str, expected: dict[str, ModuleLora], modules: BaseModules) -> tuple[str, str]:
    found = KEY.fullmatch(key)
    if embedding := EMBEDDING_KEY.fullmatch(key):
        raise AdapterInvalid(f"LoRA on {embedding['module']} (embeddings, output head) is not supported")
    if found is None:
        raise AdapterInvalid(f"unexpected tensor {key!r:.160}")
    if found["module"] == modules.output_head or found["module"] in modules.embeddings:
        raise AdapterInvalid(f"LoRA on {found['module']} (embeddings, output head) is not supported")
    if found["module"] not in modules.linear:
        raise AdapterInvalid(f"{key!r:.160} matches no module of the base model")
    if found["module"] not in expected:
        raise AdapterInvalid(f"{key!r:.160} belongs to a module that adapter_config.json does not target")
    return found["module"], found["side"]


def _check_matrix(place: str, tensor: _Tensor, rank_axis: int, wanted: tuple[int, int], lora: ModuleLora) -> None:
    if tensor.dtype not in SUPPORTED_DTYPES:
        raise AdapterInvalid(f"{place} has dtype {tensor.dtype}, one of {', '.join(SUPPORTED_DTYPES)} is wanted")
    if len(tensor.shape) != 2 or tensor.shape[1 - rank_axis] != wanted[1 - rank_axis]:
        raise AdapterInvalid(
            f"{place} has shape {list(tensor.shape)}, this base model needs {list(wanted)}: made for another base?"
        )
    if tensor.shape[rank_axis] != lora.rank:
        raise AdapterInvalid(f"{place} has rank {tensor.shape[rank_axis]}, adapter_config.json says {lora.rank}")
    if not _finite(tensor):
        raise AdapterInvalid(f"{place} holds NaN or Inf")


def _finite(tensor: _Tensor) -> bool:
    if tensor.dtype == "BF16":  # numpy has no bfloat16: an exponent of all ones is Inf or NaN
        exponent = np.uint16(0x7F80)
        return not bool(np.any(np.frombuffer(tensor.data, "<u2") & exponent == exponent))
    values = np.frombuffer(tensor.data, "<f4" if tensor.dtype == "F32" else "<f2")
    return bool(np.isfinite(values).all())


def _key(module: str, side: str) -> str:
    return f"base_model.model.{module}.lora_{side}.weight"


def _some(names: Iterable[str]) -> str:
    shown = list(names)
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return ", ".join(shown[:SHOWN]) + more
