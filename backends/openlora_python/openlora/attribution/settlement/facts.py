"""What the chain says, as settlement takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ChainEvent:
    block: int
    index: int
    contract: str
    name: str
    args: Mapping[str, Any]


@dataclass(frozen=True)
class BlockHeader:
    number: int
    hash: bytes
    timestamp: int


@dataclass(frozen=True)
class ChainFacts:
    chain_id: int
    registry: str
    attribution_log: str
    distributor: str
    head: int
    events: tuple[ChainEvent, ...]
    headers: Mapping[int, BlockHeader]
