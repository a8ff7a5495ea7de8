"""The Merkle tree of RFC 6962 (SHA-256) over leaf hashes: roots, proofs, and what verifies them.

A leaf's hash is SHA-256(0x00 ‖ leaf) (`receipt.leaf_hash`), a node's SHA-256(0x01 ‖ left ‖ right); the root of no
leaves is SHA-256 of nothing.

Size 0: the empty tree is consistent with every tree by the empty proof, as the witness protocol has it, where the old
root is really that of the empty tree. RFC 6962 defines no proof from 0, and some verifiers refuse it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

from ..errors import InvalidArgument

HASH_BYTES = 32
EMPTY_ROOT = hashlib.sha256(b"").digest()

_sha256 = hashlib.sha256


def node_hash(left: bytes, right: bytes) -> bytes:
    """SHA-256(0x01 ‖ left ‖ right)."""
    return _sha256(b"\1" + left + right).digest()


class Frontier:
    """The right edge of a growing tree: enough to add leaves and to know the root, in O(log n) memory."""

    def __init__(self) -> None:
        self.size = 0
        self._peaks: list[bytes] = []  # roots of the perfect subtrees, the largest first

    def append(self, leaf_hash: bytes) -> None:
        """Add one leaf; O(1) on average."""
        trailing_ones = self.size
        while trailing_ones & 1:
            leaf_hash = _sha256(b"\1" + self._peaks.pop() + leaf_hash).digest()
            trailing_ones >>= 1
        self._peaks.append(leaf_hash)
        self.size += 1

    def root(self) -> bytes:
        return _fold(self._peaks)


class MerkleTree:
    """A whole tree in memory, 64 bytes a leaf: its root at every size, and proofs between any of them in O(log n)."""

    def __init__(self, leaf_hashes: Iterable[bytes] = ()) -> None:
        self._levels: list[bytearray] = [bytearray()]  # level k: the roots of all perfect subtrees of 2^k leaves
        self.size = 0
        for one in leaf_hashes:
            self.append(one)

    def append(self, leaf_hash: bytes) -> None:
        """Add one leaf; O(1) on average."""
        level, index = 0, self.size
        self._levels[0] += leaf_hash
        while index & 1:
            below = self._levels[level]
            level, index = level + 1, index >> 1
            if level == len(self._levels):
                self._levels.append(bytearray())
            self._levels[level] += _sha256(b"\1" + below[-2 * HASH_BYTES :]).digest()
        self.size += 1

    def root(self, size: int | None = None) -> bytes:
        """The root of the first `size` leaves, by default of all. InvalidArgument: there are fewer."""
        return self._range(0, self._checked(size))

    def inclusion_proof(self, index: int, size: int | None = None) -> list[bytes]:
        """RFC 6962 §2.1.1: that leaf `index` is in the tree of the first `size` leaves, from the leaf's sibling up.

        InvalidArgument: there is no such leaf in that tree, or no such tree.
        """
        size = self._checked(size)
        if not 0 <= index < size:
            raise InvalidArgument(f"no leaf {index} in a tree of {size}", field="index")
        proof = []
        for start, split, end in _descent(index, 0, size):
            proof.append(self._range(split, end) if index < split else self._range(start, split))
        return proof[::-1]

    def consistency_proof(self, old_size: int, size: int | None = None) -> list[bytes]:
        """RFC 6962 §2.1.2: that the tree of `size` leaves begins with that of `old_size`; empty from 0 and to itself.

        InvalidArgument: `old_size` is over `size`, or `size` over the tree.
        """
        size = self._checked(size)
        if not 0 <= old_size <= size:
            raise InvalidArgument(f"{old_size} is not from 0 to {size}", field="old_size")
        if old_size in (0, size):
            return []
        proof = []
        start, end, whole = 0, size, True  # `whole`: the old tree is all of [start, end) so far
        while old_size != end:
            split = start + _split(end - start)
            if old_size <= split:
                proof.append(self._range(split, end))
                end = split
            else:
                proof.append(self._range(start, split))
                start, whole = split, False
        return [*([] if whole else [self._range(start, end)]), *proof[::-1]]

    def _checked(self, size: int | None) -> int:
        if size is None:
            return self.size
        if not 0 <= size <= self.size:
            raise InvalidArgument(f"the tree has {self.size} leaves, not {size}", field="size")
        return size

    def _range(self, start: int, end: int) -> bytes:
        """The root over leaves [start, end); `start` is a multiple of the largest power of two within."""
        peaks = []
        while start < end:
            level = (end - start).bit_length() - 1
            place = (start >> level) * HASH_BYTES
            peaks.append(bytes(self._levels[level][place : place + HASH_BYTES]))
            start += 1 << level
        return _fold(peaks)


def verify_inclusion(leaf_hash: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Whether the proof shows leaf `index` in the tree of `size` leaves with this root (RFC 9162 §2.1.3.2)."""
    if not 0 <= index < size or not _are_hashes((leaf_hash, root, *proof)):
        return False
    node, last, found = index, size - 1, leaf_hash
    for one in proof:
        if last == 0:
            return False
        if node & 1 or node == last:
            found = node_hash(one, found)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            found = node_hash(found, one)
        node, last = node >> 1, last >> 1
    return last == 0 and found == root


def verify_consistency(old_size: int, old_root: bytes, size: int, root: bytes, proof: Sequence[bytes]) -> bool:
    """Whether the proof shows that one tree begins with the other (RFC 9162 §2.1.4.2; for size 0 see above)."""
    if not 0 <= old_size <= size or not _are_hashes((old_root, root, *proof)):
        return False
    if size == 0 and root != EMPTY_ROOT:
        return False
    if old_size == 0:
        return not proof and old_root == EMPTY_ROOT
    if old_size == size:
        return not proof and old_root == root
    if not proof:
        return False
    first, *rest = proof if old_size & (old_size - 1) else (old_root, *proof)
    node, last = old_size - 1, size - 1
    while node & 1:
        node, last = node >> 1, last >> 1
    old_found = found = first
    for one in rest:
        if last == 0:
            return False
        if node & 1 or node == last:
            old_found, found = node_hash(one, old_found), node_hash(one, found)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            found = node_hash(found, one)
        node, last = node >> 1, last >> 1
    return last == 0 and old_found == old_root and found == root


def _are_hashes(values: Iterable[bytes]) -> bool:
    return all(len(value) == HASH_BYTES for value in values)


def _split(count: int) -> int:
    """The largest power of two below `count` (from 2 on)."""
    return 1 << (count - 1).bit_length() - 1


def _descent(index: int, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The (start, split, end) of the inner nodes from the root down to a leaf."""
    while end - start > 1:
        split = start + _split(end - start)
        yield start, split, end
        start, end = (start, split) if index < split else (split, end)


def _fold(peaks: Sequence[bytes]) -> bytes:
    """The root over perfect subtrees, the largest first."""
    if not peaks:
        return EMPTY_ROOT
    found = peaks[-1]
    for peak in peaks[-2::-1]:
        found = node_hash(peak, found)
    return found
