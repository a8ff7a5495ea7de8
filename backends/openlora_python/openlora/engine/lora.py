"""LoRA applied beside the base model's linears, never merged: y = xWᵀ + Σᵢ wᵢ·sᵢ·(xAᵢᵀ)Bᵢᵀ per token.

The tokens of a step lie sorted by adapter, so an adapter's tokens are a few contiguous runs (segments). Each segment
costs its own adapter's rank; tokens of the base model cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from .adapter_block import Adapter, AdapterLayout, LoraShape, Member, make_layout
from .kernels import Kernels

SEGMENT = np.dtype([("pairs", "u8"), ("start", "i4"), ("stop", "i4"), ("weight", "f4"), ("unused", "i4")], align=True)
"""`Segment` of kernels/lora.h."""


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


class LoraCompute(Protocol):
    """How the adapters of a step are added to the outputs of groups of linears that share their input:

    outputs[rows, columns] += w·s·(inputs[rows]·Aᵀ)·Bᵀ for each segment and each member of a group.
    """

    def layout(self, shapes: Mapping[str, LoraShape], dtype: torch.dtype) -> AdapterLayout:
        """How an adapter with these modules must lie in memory."""

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

    def layout(self, shapes: Mapping[str, LoraShape], dtype: torch.dtype) -> AdapterLayout:
        return make_layout(self._groups, shapes, dtype, strips=False)

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

    def layout(self, shapes: Mapping[str, LoraShape], dtype: torch.dtype) -> AdapterLayout:
        return make_layout(self._groups, shapes, dtype, strips=True)

    def begin(self, segments: Sequence[Segment]) -> None:
        self._held = segments  # what the addresses belong to
        self._segments = np.array(
            [(s.use.adapter.table.ctypes.data, s.start, s.stop, s.use.weight, 0) for s in segments], SEGMENT
        )
        size = sum((segment.stop - segment.start) * segment.use.adapter.layout.width for segment in segments)
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=torch.int32)

    def describe(self, step: np.ndarray) -> None:
        """Enter the segments into a STEP `[1]`; they must live until it is computed."""
        step["segments"], step["segment_count"] = self._segments.ctypes.data, len(self._segments)
        step["members"], step["shrunk"] = self._members, self._scratch.data_ptr()


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
