"""A PEFT adapter directory read into memory, whole or not at all, and beside decoding.

What an adapter is and what memory it takes is known from its configuration and the header of its weights; then they go
to their places one matrix at a time, so that little more memory is taken than the adapter's own, and Python's lock
is free for nearly all of the time.

Ingest validates adapters before they get a digest; the engine checks again, bytes and all, because applying part of an
adapter, or another one, means that something else answers in its place.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..adapters.lora_config import MAX_CONFIG_BYTES, AdapterConfig
from ..adapters.manifest import CONFIG_FILE, WEIGHTS_FILE, Manifest, ManifestFile
from ..errors import AdapterInvalid, Unavailable
from .adaptable import AdaptableLinear
from .adapter_block import Adapter, AdapterLayout, LoraShape
from .lora import LoraCompute
from .tensor_file import BadTensorFile, StoredTensor, TensorFile

_PREFIX = "base_model.model."
_KEPT_PLANS = 64
_CHECKED_ELEMENTS = 1 << 18  # of a block, checked for NaN and Inf at once


@dataclass(frozen=True)
class _Plan:
    """What a configuration says of an adapter for this base model."""

    shapes: Mapping[str, LoraShape]  # of the targeted modules
    layout: AdapterLayout


class AdapterReader:
    """Opens adapters for one base model: its linears by name, its dtype, and the highest rank allowed. Only for one
    thread."""

    def __init__(
        self, linears: Mapping[str, AdaptableLinear], lora: LoraCompute, dtype: torch.dtype, max_rank: int
    ) -> None:
        self.shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
        self.lora = lora
        self.dtype = dtype
        self.max_rank = max_rank
        # By the bytes of the configuration: thousands of adapters share a few.
        self._plans: OrderedDict[bytes, _Plan] = OrderedDict()

    @contextmanager
    def open(self, digest: str, path: str) -> Iterator[OpenAdapter]:
        """The adapter in directory `path`, checked but for its numbers.

        Raises:
            AdapterInvalid: naming the digest and what is wrong; nothing of the adapter is used then.
            Unavailable: the file system failed.
        """
        with _told_of(digest):
            config = _read(path, CONFIG_FILE, MAX_CONFIG_BYTES)
            plan = self._plan(config)
            file = _tensor_file(path)
        with file:
            with _told_of(digest):
                matrices = self._matrices(file.tensors, plan)
            yield OpenAdapter(digest, hashlib.sha256(config).hexdigest(), len(config), file, plan.layout, matrices)

    def read(self, digest: str, path: str) -> Adapter:
        """The adapter in directory `path`, on the host; raises what `open` does."""
        with self.open(digest, path) as adapter:
            return adapter.read()

    def _plan(self, data: bytes) -> _Plan:
        plan = self._plans.get(data)
        if plan is None:
            config = AdapterConfig.parse(data)
            if config.largest_rank > self.max_rank:
                raise AdapterInvalid(f"rank {config.largest_rank} is over the limit of {self.max_rank}")
            shapes = {
                name: LoraShape(config.of(name).rank, in_features, config.of(name).scaling)
                for name, (_, in_features) in self.shapes.items()
                if config.targets(name)
            }
            plan = self._plans[data] = _Plan(shapes, self.lora.layout(shapes, self.dtype))
            if len(self._plans) > _KEPT_PLANS:
                self._plans.popitem(last=False)
        else:
            self._plans.move_to_end(data)
        return plan

    def _matrices(self, tensors: list[StoredTensor], plan: _Plan) -> list[_StoredMatrix]:
        """Every tensor of a file as the matrix that it is, in the order of the file: what the plan wants, no more and
        no less."""
        halves: dict[str, dict[str, StoredTensor]] = {}
        matrices = []
        for tensor in tensors:
            module, side = self._place(tensor.name)
            halves.setdefault(module, {})[side] = tensor
            matrices.append(_StoredMatrix(tensor, module, side))
        if not halves:
            raise AdapterInvalid("adapter_model.safetensors is empty")
        if missing := sorted(plan.shapes.keys() - halves.keys()):
            raise AdapterInvalid(f"no weights for {len(missing)} targeted modules, the first is {missing[0]}")
        if surplus := sorted(halves.keys() - plan.shapes.keys()):
            raise AdapterInvalid(f"weights for {len(surplus)} modules not in target_modules, the first is {surplus[0]}")
        for module, sides in sorted(halves.items()):
            self._check_pair(module, plan.shapes[module].rank, sides)
        return matrices

    def _place(self, key: str) -> tuple[str, str]:
        """The module and side (A or B) that a key of the file belongs to."""
        for side in ("A", "B"):
            module = key.removeprefix(_PREFIX).removesuffix(f".lora_{side}.weight")
            if key == f"{_PREFIX}{module}.lora_{side}.weight" and module in self.shapes:
                return module, side
        raise AdapterInvalid(f"key {key} matches no adaptable linear of the base model")

    def _check_pair(self, module: str, rank: int, sides: Mapping[str, StoredTensor]) -> None:
        out_features, in_features = self.shapes[module]
        for side, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
            name = f"{module}.lora_{side}"
            if side not in sides:
                raise AdapterInvalid(f"{name} is missing")
            if sides[side].shape != shape:
                raise AdapterInvalid(f"{name} has shape {sides[side].shape}, {shape} is right")
            if not sides[side].dtype.is_floating_point:
                raise AdapterInvalid(f"{name} has dtype {sides[side].dtype}, a floating-point type is right")


@dataclass(frozen=True)
class _StoredMatrix:
    tensor: StoredTensor
    module: str
    side: str  # A or B


@dataclass(frozen=True)
class OpenAdapter:
    """An adapter of which everything is known but its numbers."""

    digest: str
    _config_sha256: str
    _config_size: int
    _file: TensorFile
    _layout: AdapterLayout
    _matrices: list[_StoredMatrix]

    @property
    def nbytes(self) -> int:
        """Memory that it takes once it is read."""
        return self._layout.nbytes

    def read(self) -> Adapter:
        """The adapter, on the host. Raises what `AdapterReader.open` does."""
        block = self._layout.allocate()
        with _told_of(self.digest):
            for matrix in self._matrices:  # in the order of the file, so that its bytes are hashed as they come
                self._layout.write(block, matrix.module, matrix.side, self._file.read(matrix.tensor))
            self._check_digest()
            # Checked after the conversion: a large fp32 number may be infinite in fp16.
            if not all(_finite(part) for part in block.split(_CHECKED_ELEMENTS)):
                self._refuse_numbers(block)
        return Adapter(self.digest, self._layout, block)

    def _check_digest(self) -> None:
        """The cache is private, but who checked its bytes was another process, another time ago."""
        read = Manifest.of(
            [
                ManifestFile(CONFIG_FILE, self._config_size, self._config_sha256),
                ManifestFile(WEIGHTS_FILE, self._file.size, self._file.sha256()),
            ]
        )
        if read.digest != self.digest:
            raise AdapterInvalid(
                f"its files in the cache are not the ones that were checked, they are {read.digest}: add it again"
            )

    def _refuse_numbers(self, block: torch.Tensor) -> None:
        for module in sorted(self._layout.places):
            for side, matrix in zip("AB", self._layout.matrices(block, module), strict=True):
                if not _finite(matrix):
                    raise AdapterInvalid(f"{module}.lora_{side} holds NaN or Inf (as {block.dtype})")


def _finite(tensor: torch.Tensor) -> bool:
    """In one pass and without a copy: NaN and Inf are always the least or the greatest."""
    return all(bool(torch.isfinite(bound)) for bound in torch.aminmax(tensor))


@contextmanager
def _told_of(digest: str) -> Iterator[None]:
    """Errors as they are told to users, with the digest in front."""
    try:
        yield
    except BadTensorFile as error:
        raise AdapterInvalid(f"adapter {digest}: {WEIGHTS_FILE} can't be read: {error}") from error
    except AdapterInvalid as error:
        raise AdapterInvalid(f"adapter {digest}: {error.message}") from error
    except OSError as error:
        raise Unavailable(f"adapter {digest}: can't be read: {error.strerror}", retry_after_ms=1000) from error


def _read(path: str, name: str, limit: int) -> bytes:
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


def _tensor_file(path: str) -> TensorFile:
    try:
        return TensorFile(Path(path, WEIGHTS_FILE))
    except FileNotFoundError as error:
        raise AdapterInvalid(f"{WEIGHTS_FILE} is missing") from error
