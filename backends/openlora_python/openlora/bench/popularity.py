"""Which adapter each request of a batch asks for: the named workloads of Punica (arXiv 2310.18547, section 7).

A generator is `(requests, adapters, draw) -> [index of an adapter, or None for the base model] * requests`.
"""

from __future__ import annotations

import random
from collections.abc import Callable

ZIPF_EXPONENT = 1.5

Popularity = Callable[[int, int, random.Random], list[int | None]]


def base(requests: int, adapters: int, draw: random.Random) -> list[int | None]:
    """No request has an adapter."""
    return [None] * requests


def identical(requests: int, adapters: int, draw: random.Random) -> list[int | None]:
    """All requests have the same adapter."""
    return [0] * requests


def distinct(requests: int, adapters: int, draw: random.Random) -> list[int | None]:
    """Every request has an adapter of its own; with fewer adapters than requests they take turns."""
    return [number % adapters for number in range(requests)]


def uniform(requests: int, adapters: int, draw: random.Random) -> list[int | None]:
    """Every request draws among all adapters, each as likely as the others."""
    return [draw.randrange(adapters) for _ in range(requests)]


def skewed(requests: int, adapters: int, draw: random.Random) -> list[int | None]:
    """Every request draws by Zipf's law: the k-th most popular adapter with probability ∝ k^-1.5."""
    weights = [(number + 1) ** -ZIPF_EXPONENT for number in range(adapters)]
    return [*draw.choices(range(adapters), weights, k=requests)]


POPULARITIES: dict[str, Popularity] = {
    generator.__name__: generator for generator in (base, identical, distinct, uniform, skewed)
}
