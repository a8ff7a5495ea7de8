"""Keys and values of a prompt's beginning, used again by whoever may: same base, same adapters, same salt, same tokens.

The key of a full block is a hash chain over all that its content depends on:

    root  = SHA-256(domain ‖ base digest ‖ adapters ‖ salt)
    block = SHA-256(key of the block before, or root ‖ token ids)

Adapters are named by digest and weight, so two versions under one name, or two weights, never meet.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from hashlib import sha256

from .api import AdapterUse, EngineRequest
from .block_pool import BlockPool

_DOMAIN = b"openlora prefix cache v1"
_METHOD = b"cat"  # the one way in which adapters of a request are combined; others are adapters of their own


def root_key(base_digest: str, adapters: Sequence[AdapterUse], salt: str) -> bytes:
    """The key before the first block, 32 bytes.

    Adapters are sorted by (digest, weight): a sum does not depend on their order. Every field is preceded by its
    length, so no two lists of fields give the same bytes.
    """
    fields = [_DOMAIN, base_digest.encode(), salt.encode(), _METHOD]
    for digest, weight in sorted((use.digest, use.weight) for use in adapters):
        fields += [digest.encode(), struct.pack("<q", weight)]
    return sha256(b"".join(struct.pack("<I", len(field)) + field for field in fields)).digest()


def block_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of a full block after the one with key `parent`, 32 bytes."""
    return sha256(parent + array("I", token_ids).tobytes()).digest()


class KeyChain:
    """The keys of one sequence's full blocks, made as its tokens become known."""

    def __init__(self, root: bytes, block_size: int) -> None:
        self._root = root
        self._block_size = block_size
        self._keys: list[bytes] = []
        self.published = 0  # leading blocks that have been offered to others

    def of(self, index: int, token_ids: Sequence[int]) -> bytes:
        """The key of block `index` of a sequence that begins with `token_ids`, all of that block among them."""
        while len(self._keys) <= index:
            start = len(self._keys) * self._block_size
            parent = self._keys[-1] if self._keys else self._root
            self._keys.append(block_key(parent, token_ids[start : start + self._block_size]))
        return self._keys[index]


class PrefixCache:
    """Finds and publishes blocks of a pool by what they hold. `enabled` false: nothing is found, nothing published."""

    def __init__(self, pool: BlockPool, block_size: int, base_digest: str, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self.lookup_tokens = 0  # of prompts that were looked up …
        self.hit_tokens = 0  # … and those among them that need not be computed
        self._pool = pool
        self._block_size = block_size
        self._base_digest = base_digest

    def chain(self, request: EngineRequest) -> KeyChain:
        return KeyChain(root_key(self._base_digest, request.adapters, request.cache_salt), self._block_size)

    def match(self, chain: KeyChain, token_ids: Sequence[int], first: int, end: int) -> list[int]:
        """Published blocks for blocks `first` to `end` of a sequence, up to the first gap; each is held once more."""
        if not self.enabled:
            return []
        found = []
        for index in range(first, end):
            block = self._pool.find(chain.of(index, token_ids))
            if block is None:
                break
            self._pool.hold(block)
            found.append(block)
        return found

    def publish(self, chain: KeyChain, token_ids: Sequence[int], computed: int, blocks: Sequence[int]) -> None:
        """Offer the blocks of a sequence of which all tokens are computed."""
        if not self.enabled:
            return
        for index in range(chain.published, computed // self._block_size):
            self._pool.publish(blocks[index], chain.of(index, token_ids))
        chain.published = max(chain.published, computed // self._block_size)

    def withdraw(self, blocks: Sequence[int]) -> None:
        """Nobody may use these any more: what made them is in doubt."""
        for block in blocks:
            self._pool.withdraw(block)
