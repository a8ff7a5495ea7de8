"""What a chain says, read with web3 and the events that docs/settlement.md declares: no reading of the product's.

The second implementation (`second_settlement.py`) is fed with this.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from eth_abi import decode
from eth_utils import to_checksum_address
from second_settlement import Chain, Event, keccak
from web3 import Web3

ALLOCATION = ("logId", "from", "to", "amount")
ALLOCATIONS = "(bytes32,uint64,uint64,uint256)[]"
# docs/settlement.md, 2
EVENTS = (
    "ModelRegistered(address indexed owner, bytes32 indexed digest, bytes32 base, string name, string uri)",
    "TermsPublished(address indexed owner, bytes32 indexed digest, uint32 version, bytes32 termsHash, "
    "uint64 effectiveAt, string document)",
    "AccessChanged(address indexed owner, bytes32 indexed digest, string document)",
    "ModelRevoked(address indexed owner, bytes32 indexed digest)",
    "ParametersPublished(uint32 indexed version, bytes32 digest, uint64 effectiveAt, string document)",
    "LogRegistered(bytes32 indexed logId, address indexed owner, address submitter, address payee)",
    "SubmitterChanged(bytes32 indexed logId, address submitter)",
    "Anchored(bytes32 indexed logId, uint64 size, bytes32 root, uint64 previousSize)",
    "Deposited(bytes32 indexed logId, address indexed from, uint256 amount)",
    "Proposed(uint256 indexed epoch, bytes32 root, uint256 total, Allocation[] allocations)",
    "Vetoed(uint256 indexed epoch)",
    "Accepted(uint256 indexed epoch, bytes32 root, uint256 total)",
    "Settled(bytes32 indexed logId, uint64 from, uint64 to, uint256 amount)",
    "Claimed(address indexed account, uint256 amount, uint256 cumulative)",
)


class _Shape:
    """One event: its topic, and names and types of what is indexed and what is not."""

    def __init__(self, declared: str) -> None:
        self.name, _, rest = declared.rstrip(")").partition("(")
        parts = [part.split() for part in re.split(", ", rest)]
        types = [ALLOCATIONS if part[0] == "Allocation[]" else part[0] for part in parts]
        self.topic = keccak(f"{self.name}({','.join(types)})".encode())
        self.indexed = [(part[-1], kind) for part, kind in zip(parts, types, strict=True) if "indexed" in part]
        self.data = [(part[-1], kind) for part, kind in zip(parts, types, strict=True) if "indexed" not in part]

    def read(self, topics: list[bytes], data: bytes) -> dict[str, Any]:
        values = [decode([kind], topic)[0] for (_, kind), topic in zip(self.indexed, topics, strict=True)]
        values += decode(["bytes" if kind == "string" else kind for _, kind in self.data], data)
        shapes = [*self.indexed, *self.data]
        return {name: _plain(kind, value) for (name, kind), value in zip(shapes, values, strict=True)}


def _plain(kind: str, value: Any) -> Any:
    if kind == "string":
        return value.decode(errors="surrogateescape")  # docs/settlement.md, 2: what is not UTF-8
    if kind == "address":
        return to_checksum_address(value)
    return [dict(zip(ALLOCATION, one, strict=True)) for one in value] if kind == ALLOCATIONS else value


SHAPES = {shape.topic: shape for shape in map(_Shape, EVENTS)}


def read_chain(web3: Web3, deployment_file: Path) -> Chain:
    """All events of the three contracts and all headers, from the first block to the newest."""
    contracts = json.loads(deployment_file.read_text())["contracts"]
    names = ("AdapterRegistry", "AttributionLog", "RewardDistributor")
    addresses = [contracts[name]["address"] for name in names]
    head = web3.eth.block_number
    events = []
    for log in web3.eth.get_logs({"fromBlock": 0, "toBlock": head, "address": addresses}):
        topics = [bytes(topic) for topic in log["topics"]]
        if shape := SHAPES.get(topics[0]):  # others are of roles and pauses
            arguments = shape.read(topics[1:], bytes(log["data"]))
            events.append(Event(log["blockNumber"], log["logIndex"], shape.name, arguments))
    headers = {}
    for number in range(head + 1):
        block = web3.eth.get_block(number)
        headers[number] = (bytes(block["hash"]), block["timestamp"])
    return Chain(web3.eth.chain_id, addresses[0], addresses[2], events, headers)
