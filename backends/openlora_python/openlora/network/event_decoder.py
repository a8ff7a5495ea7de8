"""From a chain's logs to events, by the contracts' own descriptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eth_abi.codec import ABIDecoder
from eth_abi.decoding import StringDecoder
from eth_abi.exceptions import DecodingError
from eth_abi.registry import registry as abi_types
from eth_utils import event_abi_to_log_topic, to_checksum_address
from eth_utils.abi import collapse_if_tuple

from ..attribution.settlement.facts import ChainEvent
from ..errors import Unavailable
from .artifacts import load_artifact
from .deployment import Deployment
from .rpc import RETRY_MS, place

if TYPE_CHECKING:
    from web3.types import LogReceipt

# docs/settlement.md, 2: what settlement and the catalog go by. Roles and pauses are no part of either.
EVENTS = {
    "AdapterRegistry": ("ModelRegistered", "TermsPublished", "AccessChanged", "ModelRevoked", "ParametersPublished"),
    "AttributionLog": ("LogRegistered", "SubmitterChanged", "Anchored"),
    "RewardDistributor": ("Deposited", "Proposed", "Vetoed", "Accepted", "Settled", "Claimed"),
}


class EventDecoder:
    """Of one deployment. `addresses`: the contracts whose logs it reads, with their names."""

    def __init__(self, deployment: Deployment) -> None:
        self.addresses: dict[str, str] = {}
        self._place = place(deployment.rpc_url)
        self._events: dict[tuple[str, bytes], Mapping[str, Any]] = {}
        # The contracts take any bytes as text, from anybody: what is not UTF-8 stays apart, as lone surrogates.
        types = abi_types.copy()
        types.unregister_decoder("string")
        types.register_decoder("string", StringDecoder(handle_string_errors="surrogateescape"))
        self._abi = ABIDecoder(types)
        for name in EVENTS:
            address = getattr(deployment.contracts, name).address
            self.addresses[address] = name
            for entry in load_artifact(name).abi:
                if entry["type"] == "event" and entry["name"] in EVENTS[name]:
                    topic = bytes(event_abi_to_log_topic(entry))
                    self._events[address, topic] = entry

    def event(self, log: LogReceipt) -> ChainEvent | None:
        """None: one that is no part of the facts. Unavailable: no such event can look like this."""
        number, index = log["blockNumber"], log["logIndex"]
        entry = self._events.get((log["address"], bytes(log["topics"][0]) if log["topics"] else b""))
        if entry is None:
            return None
        try:
            args = self._args(entry["inputs"], log)
        except (DecodingError, ValueError) as error:
            raise Unavailable(
                f"{self._place} gave event {index} of block {number}, which is no {entry['name']}: {error}",
                retry_after_ms=RETRY_MS,
            ) from error
        return ChainEvent(number, index, self.addresses[log["address"]], entry["name"], args)

    def _args(self, parts: Sequence[Mapping[str, Any]], log: LogReceipt) -> dict[str, Any]:
        topics = b"".join(bytes(topic) for topic in log["topics"][1:])  # of our events: all of one word
        values: dict[str, Any] = {}
        for indexed, content in ((True, topics), (False, bytes(log["data"]))):
            here = [part for part in parts if part["indexed"] is indexed]
            found = self._abi.decode([collapse_if_tuple(part) for part in here], content)
            values |= {part["name"]: _plain(part, value) for part, value in zip(here, found, strict=True)}
        return {part["name"]: values[part["name"]] for part in parts}


def _plain(part: Mapping[str, Any], value: Any) -> Any:
    """bytes, int, str, bool; addresses checksummed, structs as dicts, arrays as lists."""
    if part["type"].endswith("[]"):
        return [_plain({**part, "type": part["type"][:-2]}, item) for item in value]
    if part["type"] == "tuple":
        return {one["name"]: _plain(one, item) for one, item in zip(part["components"], value, strict=True)}
    return to_checksum_address(value) if part["type"] == "address" else value
