"""LoRA applied beside the base model's linears, never merged: y = xWᵀ + Σᵢ wᵢ·sᵢ·(xAᵢᵀ)Bᵢᵀ per token.

The tokens of a step lie sorted by adapter, so an adapter's tokens are a few contiguous runs (segments). Each segment
costs its own adapter's rank; tokens of the base model cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional

from .kernels import Kernels
from .kernels.pages import streamed

PAIR = np.dtype(
    [("a", "u8"), ("b", "u8"), ("rank", "i4"), ("column", "i4"), ("columns", "i4"), ("scaling", "f4")], align=True
)
SEGMENT = np.dtype([("pairs", "u8"), ("start", "i4"), ("stop", "i4"), ("weight", "f4"), ("unused", "i4")], align=True)
"""`Pair` and `Segment` of kernels/lora.h."""
STRIP = 64  # outputs; see there


@dataclass(frozen=True)
class LoraPair:
    """The two matrices of one module and their scaling."""

    a: torch.Tensor  # [rank, in_features]
    b: torch.Tensor  # [out_features, rank], or what `pack_expand` makes of it
    scaling: float


@dataclass(frozen=True, eq=False)
class Adapter:
    """A loaded adapter, in the form that the engine's `LoraCompute` gave it."""

    digest: str
    pairs: Mapping[str, LoraPair]  # by the module's name in the base model
    table: np.ndarray | None = None  # PAIR [groups, members], for the native kernel
    width: int = 0  # the largest sum of (even) ranks in a group

    @property
    def nbytes(self) -> int:
        """Memory of the weights."""
        weights = sum(pair.a.nbytes + pair.b.nbytes for pair in self.pairs.values())
        return weights + (0 if self.table is None else self.table.nbytes)


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter as one request uses it."""

    adapter: Adapter
    weight: float

    @property
    def key(self) -> tuple[str, float]:
        return self.adapter.digest, self.weight


@dataclass
class Segment:
    """Consecutive tokens of a step that use one adapter with one weight."""

    use: WeightedAdapter
    start: int
    stop: int


@dataclass(frozen=True)
class Member:
    """One linear of a group: its name, and its columns in the group's output."""

    name: str
    column: int
    columns: int


class LoraCompute(Protocol):
    """How the adapters of a step are added to the outputs of groups of linears that share their input:

    outputs[rows, columns] += w·s·(inputs[rows]·Aᵀ)·Bᵀ for each segment and each member of a group.
    """

    def prepare(self, digest: str, pairs: Mapping[str, LoraPair]) -> Adapter:
        """An adapter in the form in which it is added."""

    def begin(self, segments: Sequence[Segment]) -> None:
        """Set the segments of the step that follows; none ends it."""


def make_lora(groups: Sequence[Sequence[Member]], kernels: Kernels | None) -> TorchLora | NativeLora:
    """The form that goes with the linears' (`linear.Pack`)."""
    return TorchLora(groups) if kernels is None else NativeLora(groups)


class TorchLora:
    """Two products a segment and module: the reference, and what runs where there is no kernel."""

    def __init__(self, groups: Sequence[Sequence[Member]]) -> None:
        self._groups = groups
        self._segments: Sequence[Segment] = ()

    def prepare(self, digest: str, pairs: Mapping[str, LoraPair]) -> Adapter:
        return Adapter(digest, pairs)

    def begin(self, segments: Sequence[Segment]) -> None:
        self._segments = segments

    def add(self, group: int, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """`inputs` is `[1, tokens, in_features]`, `outputs` `[1, tokens, Σ columns]`, dense, changed in place."""
        for segment in self._segments:
            rows = slice(segment.start, segment.stop)
            for member in self._groups[group]:
                pair = segment.use.adapter.pairs.get(member.name)
                if pair is not None:
                    shrunk = inputs[0, rows] @ pair.a.t()  # [tokens, rank]
                    part = outputs[0, rows, member.column : member.column + member.columns]
                    part.addmm_(shrunk, pair.b.t(), alpha=segment.use.weight * pair.scaling)


class NativeLora:
    """Part of the native kernels' operation of a group of linears (kernels/lora.h)."""

    def __init__(self, groups: Sequence[Sequence[Member]]) -> None:
        self._groups = groups
        self._members = max(map(len, groups))
        self._scratch = torch.empty(0, dtype=torch.int32)
        self.begin([])

    def prepare(self, digest: str, pairs: Mapping[str, LoraPair]) -> Adapter:
        table = np.zeros((len(self._groups), self._members), PAIR)
        places = [
            (index, place, member)
            for index, group in enumerate(self._groups)
            for place, member in enumerate(group)
            if member.name in pairs
        ]
        # In the order in which a step reads them.
        matrices = [
            matrix for *_, member in places for matrix in (pairs[member.name].a, pack_expand(pairs[member.name].b))
        ]
        placed = iter(_together(matrices))
        kept: dict[str, LoraPair] = {}
        for (index, place, member), a, b in zip(places, placed, placed, strict=True):
            scaling = pairs[member.name].scaling
            table[index, place] = (a.data_ptr(), b.data_ptr(), len(a), member.column, member.columns, scaling)
            kept[member.name] = LoraPair(a, b, scaling)
        ranks = table["rank"] + table["rank"] % 2
        return Adapter(digest, kept, table, int(ranks.sum(axis=1).max()))

    def begin(self, segments: Sequence[Segment]) -> None:
        self._held = segments  # what the addresses belong to
        self._segments = np.array(
            [(s.use.adapter.table.ctypes.data, s.start, s.stop, s.use.weight, 0) for s in segments], SEGMENT
        )
        size = sum((segment.stop - segment.start) * segment.use.adapter.width for segment in segments)
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=torch.int32)

    def describe(self, step: np.ndarray) -> None:
        """Enter the segments into a STEP `[1]`; they must live until it is computed."""
        step["segments"], step["segment_count"] = self._segments.ctypes.data, len(self._segments)
        step["members"], step["shrunk"] = self._members, self._scratch.data_ptr()


def _together(matrices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same matrices in one block of memory, each from the beginning of a cache line."""
    line = 64 // matrices[0].element_size()
    starts = list(accumulate((-(-matrix.numel() // line) * line for matrix in matrices), initial=0))
    memory = streamed(starts[-1] + line, dtype=matrices[0].dtype)
    first = -memory.data_ptr() % 64 // memory.element_size()
    return [
        memory[first + start : first + start + matrix.numel()].view(matrix.shape).copy_(matrix)
        for start, matrix in zip(starts, matrices, strict=False)
    ]


def pack_expand(b: torch.Tensor) -> torch.Tensor:
    """B `[out_features, rank]` as kernels/lora.h reads it, in strips of 64 outputs, the last one filled up with
    zeros: float32 `[strips, rank, 64]`, bfloat16 `[strips, ⌈rank / 2⌉, 64, 2]`."""
    together = 2 if b.dtype == torch.bfloat16 else 1  # ranks in one lane
    rows, rank = b.shape
    padded = functional.pad(b, (0, -rank % together, 0, -rows % STRIP))
    strips = padded.view(-1, STRIP, padded.shape[1] // together, together)
    return strips.transpose(1, 2).contiguous()


def build_segments(spans: Sequence[tuple[int, tuple[WeightedAdapter, ...]]]) -> list[Segment]:
    """Runs of equal (adapter, weight) over `spans`, the (tokens, adapters) of each sequence in batch order."""
    latest: dict[tuple[str, float], Segment] = {}
    segments: list[Segment] = []
    row = 0
    for tokens, uses in spans:
        for use in uses:
            segment = latest.get(use.key)
            if segment is not None and segment.stop == row:
                segment.stop = row + tokens
            else:
                latest[use.key] = Segment(use, row, row + tokens)
                segments.append(latest[use.key])
        row += tokens
    # By adapter, so that what several adapters add to a row has one order in every batch.
    return sorted(segments, key=lambda segment: (segment.use.key, segment.start))
