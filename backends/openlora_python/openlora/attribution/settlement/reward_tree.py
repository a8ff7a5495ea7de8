"""The tree of rewards: OpenZeppelin's standard Merkle tree (keccak256) over all accounts' cumulative amounts.

leaf = keccak256(keccak256(abi.encode(uint256 chainId, address distributor, address account, uint256 cumulative)));
leaves ascend by hash and fill an array of 2n − 1 from its end; a node is keccak256 of its children, the lower first.
"""

from __future__ import annotations

from collections.abc import Mapping

from eth_hash.auto import keccak

from ...errors import InvalidArgument
from .registry import account

ZERO_ROOT = bytes(32)


def reward_leaf(chain_id: int, distributor: str, earner: bytes, cumulative: int) -> bytes:
    """The leaf of one account (20 bytes). OverflowError: `cumulative` is 2^256 or more."""
    words = (chain_id.to_bytes(32, "big"), _word(account(distributor)), _word(earner), cumulative.to_bytes(32, "big"))
    return keccak(keccak(b"".join(words)))


class RewardTree:
    """The tree over all amounts above zero; without any its root is zero."""

    def __init__(self, chain_id: int, distributor: str, amounts: Mapping[bytes, int]) -> None:
        leaves = {who: reward_leaf(chain_id, distributor, who, amount) for who, amount in amounts.items() if amount > 0}
        ascending = sorted(leaves, key=lambda who: leaves[who])
        count = len(leaves)
        self._nodes = [b""] * max(2 * count - 1, 0)
        self._places: dict[bytes, int] = {}
        for position, who in enumerate(ascending):
            self._places[who] = 2 * count - 2 - position
            self._nodes[self._places[who]] = leaves[who]
        for place in range(count - 2, -1, -1):
            pair = sorted(self._nodes[2 * place + 1 : 2 * place + 3])
            self._nodes[place] = keccak(pair[0] + pair[1])

    @property
    def root(self) -> bytes:
        return self._nodes[0] if self._nodes else ZERO_ROOT

    def proof(self, earner: bytes) -> list[bytes]:
        """The siblings from the account's leaf upwards. InvalidArgument: it has none."""
        place = self._places.get(earner)
        if place is None:
            raise InvalidArgument(f"0x{earner.hex()} has earned nothing", field="account")
        siblings = []
        while place > 0:
            siblings.append(self._nodes[place + 1 if place % 2 else place - 1])
            place = (place - 1) // 2
        return siblings


def _word(address: bytes) -> bytes:
    return address.rjust(32, b"\0")
