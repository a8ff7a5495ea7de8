"""LoRA applied beside the base model's linears, never merged: y = xWᵀ + Σᵢ wᵢ·sᵢ·(xAᵢᵀ)Bᵢᵀ per token.

The tokens of a step lie sorted by adapter, so an adapter's tokens are a few contiguous runs (segments). Each segment
costs its own adapter's rank; tokens of the base model cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import nn
from torch.nn import functional


@dataclass(frozen=True)
class LoraPair:
    """The two matrices of one module and their scaling."""

    a: torch.Tensor  # [rank, in_features]
    b: torch.Tensor  # [out_features, rank]
    scaling: float


@dataclass(frozen=True, eq=False)
class Adapter:
    """A loaded adapter: one pair per module that it touches, by the module's name in the base model."""

    digest: str
    pairs: dict[str, LoraPair]


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


@dataclass
class LoraStep:
    """The segments of the running step, shared by all wrapped linears of one model."""

    segments: list[Segment] = field(default_factory=list)


class LoraLinear(nn.Module):
    """A base linear with the adapters of the running step beside it."""

    def __init__(self, base: nn.Linear, name: str, step: LoraStep) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.step = step

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[1, tokens, in_features]` to `[1, tokens, out_features]`."""
        outputs = self.base(inputs)
        for segment in self.step.segments:
            pair = segment.use.adapter.pairs.get(self.name)
            if pair is not None:
                rows = slice(segment.start, segment.stop)
                shrunk = functional.linear(inputs[0, rows], pair.a)  # [tokens, rank]
                outputs[0, rows].addmm_(shrunk, pair.b.t(), alpha=segment.use.weight * pair.scaling)
        return outputs


def wrap_linears(model: nn.Module, step: LoraStep) -> dict[str, nn.Linear]:
    """Put a `LoraLinear` around every linear of `model` except its output layer; returns the base linears by name."""
    output_layer = model.get_output_embeddings()
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not output_layer
    }
    for name, linear in linears.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, LoraLinear(linear, name, step))
    return linears


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
    return segments


def module_rank(config: LoraConfig, module: str) -> int:
    """The rank of one module: `rank_pattern` where it matches (PEFT's rules), else `r`."""
    return config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), module), config.r)


def module_scaling(config: LoraConfig, module: str) -> float:
    """alpha / rank, or alpha / √rank for rsLoRA (arXiv 2312.03732); alpha is `lora_alpha` where no pattern matches."""
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), module), config.lora_alpha)
    rank = module_rank(config, module)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
