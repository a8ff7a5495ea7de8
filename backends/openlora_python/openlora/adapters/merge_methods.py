"""The arithmetic of merging adapters, one module at a time; `COMBINE` is the registry.

A source i changes a module by Δᵢ = wᵢ·sᵢ·BᵢAᵢ: its weight, its own scaling there (alpha / rank, alpha / √rank for
rsLoRA, by `rank_pattern` and `alpha_pattern`) and its matrices. A source without that module changes it by zero. A
method returns A and B with ΣΔᵢ ≈ BA, at scaling 1. Weights may be negative. Everything is float32, summed in the order
of the sources; with one version of torch, what is no SVD gives the same bits on every machine.

The results are those of PEFT 0.21's `add_weighted_adapter` in float32, with these differences on purpose:

- *rsLoRA*: PEFT's result inherits `use_rslora` from the first source and is then √rank too strong. Ours is plain.
- *Ranks*: PEFT compares the highest rank of each configuration; with `rank_pattern` it may then fail in the middle, or
  save matrices that don't fit its configuration. Here ranks are compared, and kept, module by module.
- *Targets*: PEFT takes `layers_to_transform` and `exclude_modules` from the first source, and can't mix lists with
  patterns. Here the result lists exactly the modules that some source changes.
- *One source*: PEFT then computes `linear` whatever was asked for. Here the method is applied.
- *`cat`*: PEFT pads with zeros where a source lacks a module; here those rows aren't there.
- *SVD*: PEFT decomposes the full matrix in float32; `svd` here decomposes in the space of the factors, in float64. Both
  are the nearest matrix of that rank (Eckart–Young). Signs of singular vectors are fixed, by a rule.
- *DARE*: PEFT draws from torch's global generator after the initialisation of the new adapter has drawn from it, so a
  seed set before the call isn't what decides. Here a generator of our own draws in PEFT's order (modules in the base
  model's order; A of each source, then B of each): equal to PEFT with `torch.manual_seed(seed)` after that point.

What PEFT computes as it says, but which isn't what the name suggests, is the same here:

- *`linear`* is no sum of changes: (Σ√|cᵢ|·Bᵢ)(Σ±√|cᵢ|·Aᵢ), c = w·s, has all cross terms BᵢAⱼ. For unrelated
  adapters of weight 1/2 each its error is as large as the sum itself. `cat` is the sum.
- *`ties`, `dare_*`, `magnitude_prune`* work on A and B apart, whose entries depend on the basis that training happened
  to find (BR⁻¹ and RA are the same adapter), and choose before scalings and weights are applied. `ties_svd` works on
  sᵢBᵢAᵢ.
- *Signs are elected before weights*: a negative weight turns a source after its entries have won or lost.
- *TIES averages* over the sources that agree, without dividing by their weights: weights of 1 and 1 give a mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from ..errors import AdapterInvalid

Factors = tuple[torch.Tensor, torch.Tensor]  # A [rank, in], B [out, rank]


@dataclass(frozen=True)
class Part:
    """What one source brings to a module."""

    a: torch.Tensor  # [rank, in], float32
    b: torch.Tensor  # [out, rank], float32
    weight: float
    scaling: float

    @property
    def coefficient(self) -> float:
        return self.weight * self.scaling


@dataclass(frozen=True)
class Choices:
    """A method's settings for one module; those that it doesn't have are not looked at."""

    rank: int  # of the result
    density: float = 1.0
    majority_sign: str = "total"
    generator: torch.Generator | None = None


Combine = Callable[[Sequence[Part], Choices], Factors]
Mix = Callable[[Sequence[torch.Tensor], Sequence[float], Choices], torch.Tensor]


def cat(parts: Sequence[Part], choices: Choices) -> Factors:
    """Exact: A = [c₁A₁; c₂A₂; …], B = [B₁ B₂ …], so BA = Σ cᵢBᵢAᵢ for any ranks."""
    return torch.cat([part.a * part.coefficient for part in parts]), torch.cat([part.b for part in parts], dim=1)


def svd(parts: Sequence[Part], choices: Choices) -> Factors:
    """The nearest BA of the rank to Σ cᵢBᵢAᵢ in Frobenius and spectral norm (Eckart & Young 1936).

    With stacked factors B = Q₁R₁ and Aᵀ = Q₂R₂ the sum is Q₁(R₁R₂ᵀ)Q₂ᵀ: only the small middle is decomposed.
    """
    a, b = cat([Part(part.a.double(), part.b.double(), part.weight, part.scaling) for part in parts], choices)
    left, upper = torch.linalg.qr(b)  # [out, k], [k, total]
    right, lower = torch.linalg.qr(a.T)  # [in, k'], [k', total]
    a, b = _truncated(upper @ lower.T, choices.rank)
    return (a @ right.T).float(), (left @ b).float()


def ties_svd(parts: Sequence[Part], choices: Choices) -> Factors:
    """TIES on the full changes sᵢBᵢAᵢ, then the nearest matrix of the rank. Holds a full matrix a source."""
    changes = [(part.b @ part.a).mul_(part.scaling) for part in parts]  # [out, in]
    return _truncated(_ties(changes, [part.weight for part in parts], choices), choices.rank)


def _on_factors(mix: Mix) -> Combine:
    """`mix` on the As and on the Bs; √|c| goes to both, the sign of c to A only."""

    def combine(parts: Sequence[Part], choices: Choices) -> Factors:
        roots = [math.sqrt(abs(part.coefficient)) for part in parts]
        signed = [math.copysign(root, part.coefficient) for root, part in zip(roots, parts, strict=True)]
        a = mix([part.a for part in parts], signed, choices)
        return a, mix([part.b for part in parts], roots, choices)

    return combine


def _weighted_sum(tensors: Sequence[torch.Tensor], weights: Sequence[float], choices: Choices) -> torch.Tensor:
    """Task arithmetic (Ilharco 2022, arXiv 2212.04089): Σ wᵢ·τᵢ."""
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total += tensor * weight
    return total


def _agreeing_mean(tensors: Sequence[torch.Tensor], weights: Sequence[float], choices: Choices) -> torch.Tensor:
    """TIES's sign election and disjoint mean: Σ wᵢ·τᵢ over the entries of the elected sign, over their number.

    The sign is that of Σ τᵢ (`total`) or of Σ sign τᵢ (`frequency`); plus where that is zero.
    """
    score = torch.zeros_like(tensors[0])
    for tensor in tensors:
        score += tensor if choices.majority_sign == "total" else tensor.sign()
    elected = torch.where(score >= 0, 1.0, -1.0)
    total = torch.zeros_like(score)
    agreeing = torch.zeros_like(score)
    for tensor, weight in zip(tensors, weights, strict=True):
        agrees = tensor.sign() == elected
        total += tensor * weight * agrees
        agreeing += agrees
    return total / agreeing.clamp(min=1.0)


def _magnitude_prune(tensors: Sequence[torch.Tensor], weights: Sequence[float], choices: Choices) -> torch.Tensor:
    return _weighted_sum([keep_largest(tensor, choices.density) for tensor in tensors], weights, choices)


def _ties(tensors: Sequence[torch.Tensor], weights: Sequence[float], choices: Choices) -> torch.Tensor:
    """TIES (Yadav 2023, arXiv 2306.01708): trim, elect sign, disjoint mean."""
    return _agreeing_mean([keep_largest(tensor, choices.density) for tensor in tensors], weights, choices)


def _dare_linear(tensors: Sequence[torch.Tensor], weights: Sequence[float], choices: Choices) -> torch.Tensor:
    """DARE (Yu 2023, arXiv 2311.03099): drop and rescale, then sum."""
    return _weighted_sum([keep_random(tensor, choices) for tensor in tensors], weights, choices)


def _dare_ties(tensors: Sequence[torch.Tensor], weights: Sequence[float], choices: Choices) -> torch.Tensor:
    return _agreeing_mean([keep_random(tensor, choices) for tensor in tensors], weights, choices)


def keep_largest(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """The ⌊density·n⌋ entries of largest magnitude, the others zero; of equal ones those that come first."""
    if density >= 1:
        return tensor
    size = tensor.abs().reshape(-1)
    kept = int(density * size.numel())
    if kept == 0:
        return torch.zeros_like(tensor)
    smallest = torch.kthvalue(size, size.numel() - kept + 1).values
    mask = size > smallest
    mask[(size == smallest).nonzero()[: kept - int(mask.sum()), 0]] = True
    return tensor * mask.reshape(tensor.shape)


def keep_random(tensor: torch.Tensor, choices: Choices) -> torch.Tensor:
    """Each entry with probability `density`, divided by it, so that the expected value stays."""
    if choices.density >= 1:
        return tensor
    mask = torch.bernoulli(torch.full_like(tensor, choices.density), generator=choices.generator)
    return tensor * mask / choices.density


def _truncated(matrix: torch.Tensor, rank: int) -> Factors:
    """A = Vᵀ and B = US of the `rank` largest singular values; the largest entry of each row of A is positive."""
    if not torch.isfinite(matrix).all():
        raise AdapterInvalid("the merged numbers overflow float32")
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    a, b = right[:rank], left[:, :rank] * values[:rank]
    sign = a.gather(1, a.abs().argmax(dim=1, keepdim=True)).sign()  # [rank, 1]
    return a * sign, b * sign.T


COMBINE: Mapping[str, Combine] = MappingProxyType(
    {
        "cat": cat,
        "linear": _on_factors(_weighted_sum),
        "svd": svd,
        "ties": _on_factors(_ties),
        "ties_svd": ties_svd,
        "dare_linear": _on_factors(_dare_linear),
        "dare_ties": _on_factors(_dare_ties),
        "magnitude_prune": _on_factors(_magnitude_prune),
    }
)
"""By name, as in `merge_plan.METHODS`."""
