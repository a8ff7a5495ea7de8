"""What the facts say of each log and of the distributor: anchors, deposits, what is settled, what is proposed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from .facts import ChainFacts

ZERO32 = bytes(32)


@dataclass(frozen=True)
class Allocation:
    """How far an epoch goes in one log: receipts [start, stop), and the sum of the paid prices among them."""

    log_id: bytes
    start: int  # `from` on the chain
    stop: int  # `to`
    amount: int

    @property
    def words(self) -> tuple[bytes, int, int, int]:
        """As the contract takes it."""
        return self.log_id, self.start, self.stop, self.amount


@dataclass(frozen=True)
class Proposal:
    """An epoch as it is proposed, attested and accepted; amounts in the smallest unit of the token."""

    epoch: int
    root: bytes
    total: int
    allocations: tuple[Allocation, ...]


@dataclass(frozen=True)
class Anchor:
    size: int
    root: bytes
    block: int


@dataclass
class LogState:
    """One log on the chain; only registered logs are."""

    log_id: bytes
    owner: str
    payee: str
    anchors: list[Anchor] = field(default_factory=list)  # sizes grow
    deposited: int = 0
    settled_size: int = 0
    settled_amount: int = 0

    @property
    def available(self) -> int:
        """Of the deposits, what is not settled."""
        return self.deposited - self.settled_amount

    @cached_property
    def _sizes(self) -> list[int]:
        return [anchor.size for anchor in self.anchors]

    def first_covering(self, index: int) -> Anchor | None:
        """The first anchor of a tree that has leaf `index`."""
        place = bisect_right(self._sizes, index)
        return self.anchors[place] if place < len(self.anchors) else None


@dataclass
class ChainState:
    """All logs by id, and the distributor: cumulative total, root, the epoch numbers given out, what is pending."""

    logs: dict[bytes, LogState] = field(default_factory=dict)
    total: int = 0
    root: bytes = ZERO32
    epoch: int = 0  # of the newest proposal, whatever became of it
    pending: Proposal | None = None
    claimed: dict[str, int] = field(default_factory=dict)  # cumulative, by checksummed address


def read_state(facts: ChainFacts) -> ChainState:
    """The state after all events of the facts."""
    state = ChainState()
    for event in facts.events:
        args = event.args
        if event.contract == "AttributionLog" and event.name == "LogRegistered":
            state.logs[args["logId"]] = LogState(args["logId"], args["owner"], args["payee"])
        elif event.contract == "AttributionLog" and event.name == "Anchored":
            state.logs[args["logId"]].anchors.append(Anchor(args["size"], args["root"], event.block))
        elif event.contract == "RewardDistributor":
            _follow(state, event.name, args)
    return state


def _follow(state: ChainState, name: str, args: Mapping[str, Any]) -> None:
    if name == "Deposited":
        state.logs[args["logId"]].deposited += args["amount"]
    elif name == "Proposed":
        state.epoch = args["epoch"]
        allocations = _allocations(args["allocations"])
        state.pending = Proposal(args["epoch"], args["root"], args["total"], allocations)
    elif name == "Vetoed":
        state.pending = None
    elif name == "Settled":
        log = state.logs[args["logId"]]
        log.settled_size = args["to"]
        log.settled_amount += args["amount"]
    elif name == "Accepted":
        state.pending, state.root, state.total = None, args["root"], args["total"]
    elif name == "Claimed":
        state.claimed[args["account"]] = args["cumulative"]


def _allocations(structs: Sequence[Mapping[str, Any]]) -> tuple[Allocation, ...]:
    return tuple(Allocation(one["logId"], one["from"], one["to"], one["amount"]) for one in structs)
