"""A PEFT adapter directory, checked whole before an engine sees it: these engines skip what they do not know, or die of
it.

Arrays are numpy's in 32 bit; the engine brings them to its own dtype.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

import msgspec
import numpy as np

from ...adapters.lora_config import MAX_CONFIG_BYTES, AdapterConfig
from ...errors import AdapterInvalid, Unavailable
from .base_shapes import BaseShapes

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MANIFEST_DOMAIN = b"openlora/manifest/v1"
PREFIX = "base_model.model."
LARGEST = {"float32": float(np.finfo(np.float32).max), "bfloat16": 3.3895313892515355e38, "float16": 65504.0}
_LENGTH_BYTES = 8
_DTYPES = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter that was checked: its matrices by module, A `[rank, in]` and B `[out, rank]`."""

    digest: str
    rank: int  # the largest of its modules
    modules: dict[str, tuple[np.ndarray, np.ndarray]]
    scalings: dict[str, float]
    plain: bool  # every module has the rank r and the scaling that r and lora_alpha say


def read_adapter(digest: str, path: str, shapes: BaseShapes, dtype: str, max_rank: int) -> PeftAdapter:
    """The adapter in directory `path`: rank, keys, dimensions, numbers and bytes are what they must be.

    Args:
        digest: its manifest digest.
        dtype: the one that the engine computes in; numbers must be finite in it.

    Raises:
        AdapterInvalid: naming the digest and what is wrong.
        Unavailable: the file system failed.
    """
    try:
        config_bytes = _bytes(path, CONFIG_FILE)
        if len(config_bytes) > MAX_CONFIG_BYTES:
            raise AdapterInvalid(f"{CONFIG_FILE} is over {MAX_CONFIG_BYTES} bytes")
        config = AdapterConfig.parse(config_bytes)
        if config.largest_rank > max_rank:
            raise AdapterInvalid(f"rank {config.largest_rank} is over the limit of {max_rank}")
        weights = _bytes(path, WEIGHTS_FILE)
        found = manifest_digest(config_bytes, weights)
        if found != digest:
            raise AdapterInvalid(
                f"its files in the cache are not the ones that were checked, they are {found}: add it again"
            )
        modules = _modules(_tensors(weights), config, shapes, dtype)
    except AdapterInvalid as error:
        raise AdapterInvalid(f"adapter {digest}: {error.message}") from error
    except OSError as error:
        raise Unavailable(f"adapter {digest}: can't be read: {error.strerror}", retry_after_ms=1000) from error
    scalings = {module: config.of(module).scaling for module in modules}
    rank = max(len(a) for a, _ in modules.values())
    return PeftAdapter(digest, rank, modules, scalings, not config.rank_pattern and not config.alpha_pattern)


def manifest_digest(config: bytes, weights: bytes) -> str:
    """`adapters.manifest.Manifest.digest` of an adapter's two files, without the library that sorts JSON."""
    files = [
        {"path": name, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        for name, data in ((CONFIG_FILE, config), (WEIGHTS_FILE, weights))
    ]
    text = json.dumps({"files": files}, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(MANIFEST_DOMAIN + text.encode()).hexdigest()


def _bytes(path: str, name: str) -> bytes:
    file = Path(path, name)
    if not file.exists():
        raise AdapterInvalid(f"{name} is missing")
    if not file.is_file():
        raise AdapterInvalid(f"{name} can't be read: it is not a regular file")
    return file.read_bytes()


def _tensors(data: bytes) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file, in 32 bit."""
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    start = _LENGTH_BYTES + length
    try:
        raw = msgspec.json.decode(data[_LENGTH_BYTES:start], type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in raw.items()}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise AdapterInvalid(f"{WEIGHTS_FILE} can't be read: its header is not what safetensors writes") from error
    tensors = {}
    for name, entry in entries.items():
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            raise AdapterInvalid(f"{name} has dtype {entry.dtype}, one of {', '.join(_DTYPES)} is right")
        begin, end = (start + offset for offset in entry.data_offsets)
        if min(entry.shape, default=0) < 0 or end - begin != prod(entry.shape) * dtype.itemsize or end > len(data):
            raise AdapterInvalid(f"{WEIGHTS_FILE} can't be read: {name} does not lie in it as its header says")
        flat = np.frombuffer(data, dtype, prod(entry.shape), begin)
        if entry.dtype == "BF16":
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):
            tensors[name] = flat.astype(np.float32).reshape(entry.shape)
    return tensors


def _modules(
    tensors: dict[str, np.ndarray], config: AdapterConfig, shapes: BaseShapes, dtype: str
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    halves: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        module, side = _place(key, shapes)
        halves.setdefault(module, {})[side] = tensor
    if not halves:
        raise AdapterInvalid(f"{WEIGHTS_FILE} is empty")
    if missing := sorted(module for module in shapes.linears - halves.keys() if config.targets(module)):
        raise AdapterInvalid(f"no weights for {len(missing)} targeted modules, the first is {missing[0]}")
    if surplus := sorted(module for module in halves if not config.targets(module)):
        raise AdapterInvalid(f"weights for {len(surplus)} modules not in target_modules, the first is {surplus[0]}")
    found = {}
    for module, sides in sorted(halves.items()):
        rank, shape = config.of(module).rank, shapes.shape(module)
        out_features, in_features = shape or (None, None)
        for side, wanted in (("A", (rank, in_features)), ("B", (out_features, rank))):
            matrix = sides.get(side)
            name = f"{module}.lora_{side}"
            if matrix is None:
                raise AdapterInvalid(f"{name} is missing")
            if matrix.ndim != 2 or any(want not in (None, got) for want, got in zip(wanted, matrix.shape, strict=True)):
                raise AdapterInvalid(f"{name} has shape {matrix.shape}, {wanted} is right")
            if not np.abs(matrix).max(initial=0.0) <= LARGEST[dtype]:
                raise AdapterInvalid(f"{name} holds NaN or Inf (as torch.{dtype})")
        found[module] = sides["A"], sides["B"]
    return found


def _place(key: str, shapes: BaseShapes) -> tuple[str, str]:
    for side in ("A", "B"):
        module = key.removeprefix(PREFIX).removesuffix(f".lora_{side}.weight")
        if key == f"{PREFIX}{module}.lora_{side}.weight" and module in shapes.linears:
            return module, side
    raise AdapterInvalid(f"key {key} matches no adaptable linear of the base model")
