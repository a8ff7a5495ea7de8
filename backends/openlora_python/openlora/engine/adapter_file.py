"""A PEFT adapter directory read into memory, whole or not at all.

Ingest validates adapters before they get a digest; the engine checks again, because applying part of an adapter
means that the base model answers in its place.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from ..adapters.lora_config import MAX_CONFIG_BYTES, AdapterConfig
from ..adapters.manifest import CONFIG_FILE, WEIGHTS_FILE, Manifest, ManifestFile
from ..adapters.weights import MAX_HEADER_BYTES
from ..errors import AdapterInvalid, Unavailable
from .adaptable import AdaptableLinear
from .lora import Adapter, LoraCompute, LoraPair

_PREFIX = "base_model.model."
_WIDEST = 8  # bytes of a value


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
        self._max_bytes = sum(map(sum, self.shapes.values())) * max_rank * _WIDEST + MAX_HEADER_BYTES

    def read(self, digest: str, path: str) -> Adapter:
        """The adapter in directory `path`, if its bytes are those that `digest` names.

        Raises:
            AdapterInvalid: naming the digest and what is wrong; nothing of the adapter is used then.
            Unavailable: the file system failed.
        """
        try:
            config = _read(path, CONFIG_FILE, MAX_CONFIG_BYTES)
            weights = _read(path, WEIGHTS_FILE, self._max_bytes)
            _check_digest(digest, config, weights)
            return self.lora.prepare(digest, self._pairs(self._config(config), load_safetensors(weights)))
        except SafetensorError as error:
            raise AdapterInvalid(f"adapter {digest}: {WEIGHTS_FILE} can't be read: {error}") from error
        except AdapterInvalid as error:
            raise AdapterInvalid(f"adapter {digest}: {error.message}") from error
        except OSError as error:
            raise Unavailable(f"adapter {digest}: can't be read: {error.strerror}", retry_after_ms=1000) from error

    def _config(self, data: bytes) -> AdapterConfig:
        config = AdapterConfig.parse(data)
        if config.largest_rank > self.max_rank:
            raise AdapterInvalid(f"rank {config.largest_rank} is over the limit of {self.max_rank}")
        return config

    def _pairs(self, config: AdapterConfig, tensors: dict[str, torch.Tensor]) -> dict[str, LoraPair]:
        halves: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            module, side = self._place(key)
            halves.setdefault(module, {})[side] = tensor
        targets = {name for name in self.shapes if config.targets(name)}
        if not halves:
            raise AdapterInvalid("adapter_model.safetensors is empty")
        if missing := sorted(targets - halves.keys()):
            raise AdapterInvalid(f"no weights for {len(missing)} targeted modules, the first is {missing[0]}")
        if surplus := sorted(halves.keys() - targets):
            raise AdapterInvalid(f"weights for {len(surplus)} modules not in target_modules, the first is {surplus[0]}")
        return {module: self._pair(config, module, sides) for module, sides in sorted(halves.items())}

    def _place(self, key: str) -> tuple[str, str]:
        """The module and side (A or B) that a key of the file belongs to."""
        for side in ("A", "B"):
            module = key.removeprefix(_PREFIX).removesuffix(f".lora_{side}.weight")
            if key == f"{_PREFIX}{module}.lora_{side}.weight" and module in self.shapes:
                return module, side
        raise AdapterInvalid(f"key {key} matches no adaptable linear of the base model")

    def _pair(self, config: AdapterConfig, module: str, sides: dict[str, torch.Tensor]) -> LoraPair:
        out_features, in_features = self.shapes[module]
        lora = config.of(module)
        for side, shape in (("A", (lora.rank, in_features)), ("B", (out_features, lora.rank))):
            name = f"{module}.lora_{side}"
            if side not in sides:
                raise AdapterInvalid(f"{name} is missing")
            if tuple(sides[side].shape) != shape:
                raise AdapterInvalid(f"{name} has shape {tuple(sides[side].shape)}, {shape} is right")
            if not sides[side].is_floating_point():
                raise AdapterInvalid(f"{name} has dtype {sides[side].dtype}, a floating-point type is right")
        # Checked after the conversion: a large fp32 number may be infinite in fp16.
        converted = {side: tensor.to(self.device, self.dtype).contiguous() for side, tensor in sides.items()}
        for side, tensor in converted.items():
            if not torch.isfinite(tensor).all():
                raise AdapterInvalid(f"{module}.lora_{side} holds NaN or Inf (as {self.dtype})")
        return LoraPair(converted["A"], converted["B"], lora.scaling)


def _check_digest(digest: str, config: bytes, weights: bytes) -> None:
    """The cache is private, but who checked its bytes was another process, another time ago."""
    read = Manifest.of(
        ManifestFile(name, len(data), hashlib.sha256(data).hexdigest())
        for name, data in ((CONFIG_FILE, config), (WEIGHTS_FILE, weights))
    )
    if read.digest != digest:
        raise AdapterInvalid(
            f"its files in the cache are not the ones that were checked, they are {read.digest}: add it again"
        )


def _read(path: str, name: str, limit: int) -> bytes:
    """The whole file. It is never mapped: a mapped file that someone rewrites is a SIGBUS for every request."""
    try:
        # O_NONBLOCK: opening a named pipe must not wait for its other end
        handle = os.open(Path(path, name), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise AdapterInvalid(f"{name} is missing") from error
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            raise AdapterInvalid(f"{name} is not a regular file of at most {limit} bytes: add it again")
        return file.read(limit)
