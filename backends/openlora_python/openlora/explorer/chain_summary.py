"""What the events of the contracts say, in the words of the page: anchors, deposits, epochs and claims.

Amounts are decimal strings in the smallest unit of the token: they are larger than numbers are in most JSON readers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


class Event(Protocol):
    """As `attribution.settlement.facts.ChainEvent`."""

    block: int
    name: str
    args: Mapping[str, Any]


@dataclass
class Epoch:
    """One proposal, and what became of it."""

    number: int
    root: str
    total: int
    proposed_block: int
    allocations: list[dict[str, Any]]
    state: str = "pending"  # or vetoed, accepted
    decided_block: int | None = None


@dataclass
class ChainSummary:
    """Everything by the order of the events."""

    anchors: dict[str, dict[str, Any]] = field(default_factory=dict)  # newest by log id
    deposits: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # by log id
    settled: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # amount by log id
    claimed: dict[str, int] = field(default_factory=dict)  # cumulative by account
    epochs: list[Epoch] = field(default_factory=list)  # oldest first

    @property
    def ranges(self) -> list[tuple[str, int, int]]:
        """What the epochs that stand settle: log id, first receipt, and the one behind the last."""
        standing = (one for one in self.epochs if one.state != "vetoed")
        return [(part["log"], part["from"], part["to"]) for one in standing for part in one.allocations]


def summarise(events: Iterable[Event]) -> ChainSummary:
    """The summary of final events, given in their order."""
    summary = ChainSummary()
    for event in events:
        args = event.args
        match event.name:
            case "Anchored":
                anchor = {"size": args["size"], "root": args["root"].hex(), "block": event.block}
                summary.anchors[args["logId"].hex()] = anchor
            case "Deposited":
                summary.deposits[args["logId"].hex()] += args["amount"]
            case "Settled":
                summary.settled[args["logId"].hex()] += args["amount"]
            case "Claimed":
                summary.claimed[args["account"]] = args["cumulative"]
            case "Proposed":
                summary.epochs.append(_proposed(event))
            case "Vetoed" | "Accepted":
                _decide(summary.epochs, event)
    return summary


def _proposed(event: Event) -> Epoch:
    allocations = [
        {"log": one["logId"].hex(), "from": one["from"], "to": one["to"], "amount": str(one["amount"])}
        for one in event.args["allocations"]
    ]
    args = event.args
    return Epoch(args["epoch"], args["root"].hex(), args["total"], event.block, allocations)


def _decide(epochs: list[Epoch], event: Event) -> None:
    for epoch in reversed(epochs):
        if epoch.number == event.args["epoch"] and epoch.state == "pending":
            epoch.state = event.name.lower()
            epoch.decided_block = event.block
            return
