"""A PEFT adapter directory read into memory, whole or not at all, and beside decoding.

What an adapter is and what memory it takes is known from its configuration and the header of its weights; then they go
to their places one matrix at a time, so that little more memory is taken than the adapter's own, and Python's lock
is free for nearly all of the time.

Ingest validates adapters before they get a digest; the engine checks again, because applying part of an adapter
means that the base model answers in its place.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from ..errors import AdapterInvalid, Unavailable
from .adaptable import AdaptableLinear
from .adapter_block import Adapter, AdapterLayout, LoraShape
from .lora import LoraCompute, module_rank, module_scaling
from .tensor_file import BadTensorFile, StoredTensor, TensorFile

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
            plan = self._plan(_read(path, "adapter_config.json"))
            with _tensor_file(path) as file:
                yield OpenAdapter(digest, file, plan.layout, self._matrices(file.tensors, plan))

    def read(self, digest: str, path: str) -> Adapter:
        """The adapter in directory `path`, on the host; raises what `open` does."""
        with self.open(digest, path) as adapter:
            return adapter.read()

    def _plan(self, data: bytes) -> _Plan:
        plan = self._plans.get(data)
        if plan is None:
            config = self._config(data)
            shapes = {
                name: LoraShape(module_rank(config, name), self.shapes[name][1], module_scaling(config, name))
                for name in self._targets(config)
            }
            plan = self._plans[data] = _Plan(shapes, self.lora.layout(shapes, self.dtype))
            if len(self._plans) > _KEPT_PLANS:
                self._plans.popitem(last=False)
        else:
            self._plans.move_to_end(data)
        return plan

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
            raise _Refused("adapter_model.safetensors is empty")
        if missing := sorted(plan.shapes.keys() - halves.keys()):
            raise _Refused(f"no weights for {len(missing)} targeted modules, the first is {missing[0]}")
        if surplus := sorted(halves.keys() - plan.shapes.keys()):
            raise _Refused(f"weights for {len(surplus)} modules not in target_modules, the first is {surplus[0]}")
        for module, sides in sorted(halves.items()):
            self._check_pair(module, plan.shapes[module].rank, sides)
        return matrices

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

    def _check_pair(self, module: str, rank: int, sides: Mapping[str, StoredTensor]) -> None:
        out_features, in_features = self.shapes[module]
        for side, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
            name = f"{module}.lora_{side}"
            if side not in sides:
                raise _Refused(f"{name} is missing")
            if sides[side].shape != shape:
                raise _Refused(f"{name} has shape {sides[side].shape}, {shape} is right")
            if not sides[side].dtype.is_floating_point:
                raise _Refused(f"{name} has dtype {sides[side].dtype}, a floating-point type is right")


@dataclass(frozen=True)
class _StoredMatrix:
    tensor: StoredTensor
    module: str
    side: str  # A or B


@dataclass(frozen=True)
class OpenAdapter:
    """An adapter of which everything is known but its numbers."""

    digest: str
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
        for matrix in self._matrices:
            self._layout.write(block, matrix.module, matrix.side, self._file.read(matrix.tensor))
        # Checked after the conversion: a large fp32 number may be infinite in fp16.
        if not all(_finite(part) for part in block.split(_CHECKED_ELEMENTS)):
            self._refuse_numbers(block)
        return Adapter(self.digest, self._layout, block)

    def _refuse_numbers(self, block: torch.Tensor) -> None:
        for module in sorted(self._layout.places):
            for side, matrix in zip("AB", self._layout.matrices(block, module), strict=True):
                if not _finite(matrix):
                    raise _Refused(f"{module}.lora_{side} holds NaN or Inf (as {block.dtype})")


def _finite(tensor: torch.Tensor) -> bool:
    """In one pass and without a copy: NaN and Inf are always the least or the greatest."""
    return all(bool(torch.isfinite(bound)) for bound in torch.aminmax(tensor))


@contextmanager
def _told_of(digest: str) -> Iterator[None]:
    """Errors as they are told to users, with the digest in front."""
    try:
        yield
    except BadTensorFile as error:
        raise AdapterInvalid(f"adapter {digest}: adapter_model.safetensors can't be read: {error}") from error
    except re.error as error:
        raise AdapterInvalid(f"adapter {digest}: adapter_config.json has a bad pattern: {error}") from error
    except _Refused as refusal:
        raise AdapterInvalid(f"adapter {digest}: {refusal}") from refusal
    except OSError as error:
        raise Unavailable(f"adapter {digest}: can't be read: {error.strerror}", retry_after_ms=1000) from error


class _Refused(Exception):
    """Why an adapter is refused; `_told_of` puts the digest in front."""


def _read(path: str, name: str) -> bytes:
    try:
        return Path(path, name).read_bytes()
    except FileNotFoundError as error:
        raise _Refused(f"{name} is missing") from error


def _tensor_file(path: str) -> TensorFile:
    try:
        return TensorFile(Path(path, "adapter_model.safetensors"))
    except FileNotFoundError as error:
        raise _Refused("adapter_model.safetensors is missing") from error


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
