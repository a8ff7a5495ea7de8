"""How an adapter lies in memory: one block with all of its matrices, in the order in which a step reads them.

Its layout follows from the ranks of its modules alone, so the memory that an adapter takes is known before any of its
weights are read, and each matrix goes from the file straight to its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch
from torch.nn import functional

from .kernels.pages import occupied, streamed

PAIR = np.dtype(
    [("a", "u8"), ("b", "u8"), ("rank", "i4"), ("column", "i4"), ("columns", "i4"), ("scaling", "f4")], align=True
)
"""`Pair` of kernels/lora.h."""
STRIP = 64  # outputs; see there
_LINE = 64  # bytes of a cache line: every matrix begins with one


@dataclass(frozen=True)
class Member:
    """One linear of a group of linears that share their input: its name, and its columns in the group's output."""

    name: str
    column: int
    columns: int


@dataclass(frozen=True)
class LoraShape:
    """What is known of a module's two matrices without their numbers."""

    rank: int
    in_features: int
    scaling: float


@dataclass(frozen=True)
class LoraPair:
    """The two matrices of one module and their scaling."""

    a: torch.Tensor  # [rank, in_features]
    b: torch.Tensor  # [out_features, rank], or the strips of kernels/lora.h
    scaling: float


@dataclass(frozen=True)
class _Matrix:
    """A matrix in a block: its first element and its shape there."""

    start: int
    shape: tuple[int, ...]

    def of(self, block: torch.Tensor) -> torch.Tensor:
        return block[self.start : self.start + prod(self.shape)].view(self.shape)


@dataclass(frozen=True)
class _Place:
    a: _Matrix
    b: _Matrix
    scaling: float


@dataclass(frozen=True, eq=False)
class AdapterLayout:
    """Where a block `[elements]` of `dtype` has each module's A and B.

    `table` and `width` are for the native kernel, which wants B in strips: PAIR `[groups, members]` with bytes from the
    beginning of the block in the place of addresses; the largest sum of (even) ranks in a group.
    """

    dtype: torch.dtype
    places: Mapping[str, _Place]  # by the module's name
    elements: int
    table: np.ndarray | None
    width: int

    @property
    def nbytes(self) -> int:
        """Memory of an adapter that lies so: what its block takes, in whole pages, and its table."""
        block = occupied(self._allocated * self.dtype.itemsize)
        return block + (0 if self.table is None else self.table.nbytes)

    @property
    def _allocated(self) -> int:
        return self.elements + _LINE // self.dtype.itemsize

    def allocate(self) -> torch.Tensor:
        """A block of zeros."""
        memory = streamed(self._allocated, dtype=self.dtype)
        first = -memory.data_ptr() % _LINE // self.dtype.itemsize
        return memory[first : first + self.elements]

    def write(self, block: torch.Tensor, module: str, side: str, matrix: torch.Tensor) -> None:
        """Put side A `[rank, in_features]` or B `[out_features, rank]` of a module, of any floating-point type, where
        it belongs in a block that held zeros there."""
        place = self.places[module]
        if side == "A":
            place.a.of(block).copy_(matrix)
        elif self.table is None:
            place.b.of(block).copy_(matrix)
        else:
            _write_strips(place.b.of(block), matrix.to(self.dtype))

    def matrices(self, block: torch.Tensor, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of a module as they lie in the block."""
        place = self.places[module]
        return place.a.of(block), place.b.of(block)


@dataclass(frozen=True, eq=False)
class Adapter:
    """A loaded adapter: a block of memory, on the host or on a device, and what lies where in it."""

    digest: str
    layout: AdapterLayout
    block: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes

    @cached_property
    def pairs(self) -> Mapping[str, LoraPair]:
        """By the module's name in the base model."""
        return {
            module: LoraPair(*self.layout.matrices(self.block, module), place.scaling)
            for module, place in self.layout.places.items()
        }

    @cached_property
    def table(self) -> np.ndarray:
        """PAIR `[groups, members]` with the addresses of the matrices."""
        table = self.layout.table.copy()
        present = table["rank"] > 0
        for side in ("a", "b"):
            table[side][present] += np.uint64(self.block.data_ptr())
        return table

    def to(self, device: torch.device) -> Adapter:
        """The same adapter there: itself where it already is."""
        return self if self.block.device == device else Adapter(self.digest, self.layout, self.block.to(device))


def make_layout(
    groups: Sequence[Sequence[Member]], shapes: Mapping[str, LoraShape], dtype: torch.dtype, *, strips: bool
) -> AdapterLayout:
    """The layout of an adapter with these modules; `strips` says that B lies as kernels/lora.h reads it."""
    table = np.zeros((len(groups), max(map(len, groups))), PAIR)
    places: dict[str, _Place] = {}
    end = 0

    def matrix(shape: tuple[int, ...]) -> _Matrix:
        nonlocal end
        line = _LINE // dtype.itemsize
        start, end = end, end + -(-prod(shape) // line) * line
        return _Matrix(start, shape)

    for index, group in enumerate(groups):
        for number, member in enumerate(group):
            if (shape := shapes.get(member.name)) is None:
                continue
            a = matrix((shape.rank, shape.in_features))
            b = matrix(_strip_shape(member.columns, shape.rank, dtype) if strips else (member.columns, shape.rank))
            places[member.name] = _Place(a, b, shape.scaling)
            addresses = a.start * dtype.itemsize, b.start * dtype.itemsize
            table[index, number] = (*addresses, shape.rank, member.column, member.columns, shape.scaling)
    ranks = table["rank"] + table["rank"] % 2
    return AdapterLayout(dtype, places, end, table if strips else None, int(ranks.sum(axis=1).max()))


def _strip_shape(outputs: int, rank: int, dtype: torch.dtype) -> tuple[int, ...]:
    """B in strips of 64 outputs: float32 `[strips, rank, 64]`, bfloat16 `[strips, ⌈rank / 2⌉, 64, 2]`."""
    strips = -(-outputs // STRIP)
    return (strips, -(-rank // 2), STRIP, 2) if dtype == torch.bfloat16 else (strips, rank, STRIP)


def _write_strips(strips: torch.Tensor, b: torch.Tensor) -> None:
    """B `[out_features, rank]` into its strips; what fills up the last one, and an odd rank, is zeros."""
    rows, rank = b.shape
    together = 2 if b.dtype == torch.bfloat16 else 1  # ranks in one lane
    if rows % STRIP or rank % together:
        b = functional.pad(b, (0, -rank % together, 0, -rows % STRIP))
    if together == 2:
        # As numbers of 32 bits: elements that move together are copied together.
        b, strips = b.contiguous().view(torch.int32), strips.view(torch.int32)[..., 0]
    strips.copy_(b.view(-1, STRIP, b.shape[1]).transpose(1, 2))
