"""What the chain says, as settlement takes it: events of final blocks, and the headers of the blocks that are named.

The JSON form is complete: whoever has it and the logs' exports recomputes every number without a chain.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...errors import InvalidArgument
from ...strict_json import refuse_depth

FACTS_SCHEMA = 1


@dataclass(frozen=True)
class ChainEvent:
    """One event. `contract` and `name` as in docs/settlement.md, 2.

    In `args`, bytes32 are bytes, addresses checksummed text, numbers int, structs dicts and arrays lists.
    """

    block: int
    index: int  # in its block
    contract: str
    name: str
    args: Mapping[str, Any]


@dataclass(frozen=True)
class BlockHeader:
    """A block's number, hash (32 bytes) and time (seconds since 1970)."""

    number: int
    hash: bytes
    timestamp: int


@dataclass(frozen=True)
class ChainFacts:
    """Everything up to block `head`, in the chain's order. Contracts are checksummed addresses."""

    chain_id: int
    registry: str
    attribution_log: str
    distributor: str
    head: int
    events: tuple[ChainEvent, ...]
    headers: Mapping[int, BlockHeader]

    def of(self, contract: str, *names: str) -> Iterator[ChainEvent]:
        """The events of a contract, in order; of these names alone if any are given."""
        return (one for one in self.events if one.contract == contract and (not names or one.name in names))

    def header(self, number: int) -> BlockHeader:
        """Of a block up to the head. InvalidArgument: it is not among these facts."""
        found = self.headers.get(number)
        if found is None:
            raise InvalidArgument(
                f"the facts lack the header of block {number}, which a receipt or an event names", field="facts"
            )
        return found

    def with_headers(self, headers: Iterable[BlockHeader]) -> ChainFacts:
        """The same with more headers."""
        return replace(self, headers={**self.headers, **{one.number: one for one in headers}})

    def to_json(self) -> str:
        """One JSON object and a newline. Bytes are {"bytes": hex}; integers may be larger than 2^53."""
        tree = {
            "schema": FACTS_SCHEMA,
            "chain_id": self.chain_id,
            "registry": self.registry,
            "attribution_log": self.attribution_log,
            "distributor": self.distributor,
            "head": self.head,
            "events": [
                {"block": one.block, "index": one.index, "contract": one.contract, "name": one.name, "args": one.args}
                for one in self.events
            ],
            "headers": [
                {"number": one.number, "hash": one.hash, "timestamp": one.timestamp}
                for _, one in sorted(self.headers.items())
            ],
        }
        return json.dumps(tree, default=_tagged, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> ChainFacts:
        """The facts of such an object. InvalidArgument: it is none."""
        try:
            text = text.decode() if isinstance(text, bytes) else text
            refuse_depth(text)
            tree = json.loads(text, object_hook=_untagged)
            if tree.pop("schema") != FACTS_SCHEMA:
                raise ValueError(f"schema is not {FACTS_SCHEMA}")
            events = tuple(ChainEvent(**one) for one in tree.pop("events"))
            headers = [BlockHeader(**one) for one in tree.pop("headers")]
            facts = cls(**tree, events=events, headers={one.number: one for one in headers})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidArgument(f"not the JSON of chain facts: {error}", field="facts") from error
        places = [(one.block, one.index) for one in facts.events]
        if any(one >= other for one, other in zip(places, places[1:], strict=False)):
            raise InvalidArgument("the events are not in the chain's order", field="facts")
        if places and places[-1][0] > facts.head:
            raise InvalidArgument(f"event in block {places[-1][0]}, over the head {facts.head}", field="facts")
        return facts


def _tagged(value: Any) -> dict[str, str]:
    if not isinstance(value, bytes):
        raise TypeError(f"{type(value).__name__} is no part of an event")
    return {"bytes": value.hex()}


def _untagged(tree: dict[str, Any]) -> Any:
    return bytes.fromhex(tree["bytes"]) if tree.keys() == {"bytes"} else tree
