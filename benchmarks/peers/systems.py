"""What is compared: the workloads, the systems, and which of them do which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RANK = 16  # of the adapters that all systems run


@dataclass(frozen=True)
class Shape:
    """The files that `make_shape.py` made."""

    root: Path

    @property
    def model(self) -> str:
        return str(self.root / "model")

    def adapters(self, rank: int) -> list[str]:
        return [str(path) for path in sorted((self.root / f"r{rank}").iterdir())]


@dataclass(frozen=True)
class Workload:
    """`adapters(shape, requests)` names an adapter or None for each request; `prefill` asks for one new token only."""

    name: str
    adapters: Callable[[Shape, int], list[str | None]]
    prefill: bool = False


def _base(shape: Shape, requests: int) -> list[str | None]:
    return [None] * requests


def _identical(shape: Shape, requests: int) -> list[str | None]:
    return shape.adapters(RANK)[:1] * requests


def _distinct(rank: int) -> Callable[[Shape, int], list[str | None]]:
    def of(shape: Shape, requests: int) -> list[str | None]:
        adapters = shape.adapters(rank)
        return [adapters[number % len(adapters)] for number in range(requests)]

    return of


def _one_large(shape: Shape, requests: int) -> list[str | None]:
    return [*_distinct(8)(shape, requests)[:-1], shape.adapters(64)[0]]


BASE = Workload("base", _base)
PREFILL = Workload("base prefill", _base, prefill=True)
LOADED = Workload("base, adapters loaded", _base)
IDENTICAL = Workload("identical", _identical)
DISTINCT = Workload("distinct", _distinct(RANK))
RANK8 = Workload("distinct, rank 8", _distinct(8))
MIXED = Workload("one rank 64 among rank 8", _one_large)
WORKLOADS = (BASE, PREFILL, LOADED, IDENTICAL, DISTINCT, RANK8, MIXED)
DECODE = Workload("base decode", _base)  # never run: what BASE takes beyond PREFILL


@dataclass(frozen=True)
class System:
    """One way to run the work, as a process of its own: `worker` is its script, `ranks` the adapters that it loads."""

    name: str
    worker: str
    workloads: tuple[Workload, ...]
    environment: str = "project"  # or "vllm"
    ranks: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)


_WITHOUT, _WITH = (BASE, PREFILL), (LOADED, IDENTICAL, DISTINCT)

OURS, OURS_LORA, OURS_INT8 = "openlora", "openlora+lora", "openlora int8"
VLLM, VLLM_LORA = ("vllm eager", "vllm compiled"), ("vllm+lora eager", "vllm+lora compiled")

_OURS = System(OURS, "openlora", _WITHOUT, options={"quantization": "none"})

GROUPS = (
    (
        _OURS,
        System(OURS_INT8, "openlora", _WITHOUT, options={"quantization": "int8"}),
        System(VLLM[0], "vllm", _WITHOUT, "vllm", options={"eager": True}),
        System(VLLM[1], "vllm", _WITHOUT, "vllm", options={"eager": False}),
        System("transformers", "transformers", _WITHOUT, options={"continuous": False}),
        System("transformers continuous", "transformers", _WITHOUT, options={"continuous": True}),
    ),
    (
        _OURS,
        System(OURS_LORA, "openlora", (*_WITH, RANK8, MIXED), ranks=(RANK, 8, 64), options={"quantization": "none"}),
        System(VLLM_LORA[0], "vllm", _WITH, "vllm", (RANK,), {"eager": True}),
        System(VLLM_LORA[1], "vllm", _WITH, "vllm", (RANK,), {"eager": False}),
        System("peft", "peft", _WITH, ranks=(RANK,)),
    ),
)  # fmt: skip
"""Systems of one group are loaded at the same time and take turns; groups follow one another, for the memory's sake."""


@dataclass(frozen=True)
class Claim:
    """A ratio that is wanted: one system's rate over the best of some others', on workloads of the same run."""

    name: str
    ours: tuple[str, Workload]
    others: tuple[tuple[str, Workload], ...]
    goal: float


CLAIMS = (
    Claim("base / best vllm base", (OURS, BASE), tuple((name, BASE) for name in VLLM), 1.3),
    Claim("distinct / own base", (OURS_LORA, DISTINCT), ((OURS, BASE),), 0.80),
    Claim("distinct / best vllm+lora", (OURS_LORA, DISTINCT), tuple((name, DISTINCT) for name in VLLM_LORA), 3.0),
    Claim("distinct / peft", (OURS_LORA, DISTINCT), (("peft", DISTINCT),), 5.0),
    Claim("identical / own base", (OURS_LORA, IDENTICAL), ((OURS, BASE),), 0.92),
    Claim("base with adapters loaded / own base", (OURS_LORA, LOADED), ((OURS, BASE),), 0.98),
    Claim("one rank 64 among rank 8 / all rank 8", (OURS_LORA, MIXED), ((OURS_LORA, RANK8),), 0.95),
    Claim("int8 / bf16, decode", (OURS_INT8, DECODE), ((OURS, DECODE),), 1.10),
    Claim("int8 / bf16, prefill", (OURS_INT8, PREFILL), ((OURS, PREFILL),), 1.35),
)
