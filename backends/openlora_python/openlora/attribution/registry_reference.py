"""What `registryRef` of a receipt is the SHA-256 of: a registry, and the final block whose state it goes by."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from eth_utils import is_checksum_address, to_checksum_address

from ..errors import InvalidArgument

PREIMAGE_BYTES = 128

_WORD = 32
_MAX_NUMBER = 1 << 53  # so that JSON holds it everywhere
_HASH = re.compile(r"0x[0-9a-f]{64}")


@dataclass(frozen=True)
class RegistryReference:
    """One block of one registry. InvalidArgument: a value is out of form or range."""

    chain_id: int
    registry: str  # checksummed address
    block_number: int
    block_hash: bytes  # 32 bytes

    def __post_init__(self) -> None:
        for name in ("chain_id", "block_number"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < _MAX_NUMBER:
                raise InvalidArgument(f"{value!r} is not an integer from 0 to 2^53 - 1", field=f"registry.{name}")
        if not is_checksum_address(self.registry):
            raise InvalidArgument(f"{self.registry!r} is not a checksummed address", field="registry.registry")
        if type(self.block_hash) is not bytes or len(self.block_hash) != _WORD:
            raise InvalidArgument(f"{self.block_hash!r} is not 32 bytes", field="registry.block_hash")

    @property
    def preimage(self) -> bytes:
        """u256(chain id) ‖ u256(registry) ‖ u256(block number) ‖ block hash, 128 bytes."""
        numbers = (self.chain_id, int(self.registry, 16), self.block_number)
        return b"".join([number.to_bytes(_WORD, "big") for number in numbers]) + self.block_hash

    @classmethod
    def parse(cls, preimage: bytes) -> RegistryReference:
        """The reference that has exactly these 128 bytes. InvalidArgument: none has."""
        if len(preimage) != PREIMAGE_BYTES:
            raise InvalidArgument(f"{len(preimage)} bytes instead of {PREIMAGE_BYTES}", field="registry")
        chain_id, registry, block_number = (
            int.from_bytes(preimage[place : place + _WORD], "big") for place in range(0, 3 * _WORD, _WORD)
        )
        if registry >> 160:
            raise InvalidArgument(f"{registry:#x} is more than an address", field="registry.registry")
        return cls(chain_id, to_checksum_address(f"0x{registry:040x}"), block_number, preimage[3 * _WORD :])

    @property
    def document(self) -> dict[str, Any]:
        """The JSON form, as it stands in a receipt's document."""
        return {
            "chain_id": self.chain_id,
            "registry": self.registry,
            "block_number": self.block_number,
            "block_hash": "0x" + self.block_hash.hex(),
        }

    @classmethod
    def from_document(cls, document: Any) -> RegistryReference:
        """The reference of a JSON form from a stranger. InvalidArgument: it is something else."""
        names = ("chain_id", "registry", "block_number", "block_hash")
        if not isinstance(document, dict) or document.keys() != set(names):
            raise InvalidArgument(f"wants exactly {', '.join(names)}", field="registry")
        block_hash = document["block_hash"]
        if not isinstance(block_hash, str) or _HASH.fullmatch(block_hash) is None:
            raise InvalidArgument(f"{block_hash!r} is not 0x and 64 hex digits", field="registry.block_hash")
        if not isinstance(document["registry"], str):
            raise InvalidArgument(f"{document['registry']!r} is not an address", field="registry.registry")
        return cls(document["chain_id"], document["registry"], document["block_number"], bytes.fromhex(block_hash[2:]))
