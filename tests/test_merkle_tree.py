"""The RFC 6962 tree against public vectors, our own, the RFC's own recursion, and mutations of every proof."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from public_vectors import needs_public_vectors, rfc6962_vectors

from openlora.attribution.merkle_tree import (
    EMPTY_ROOT,
    Frontier,
    MerkleTree,
    node_hash,
    verify_consistency,
    verify_inclusion,
)
from openlora.attribution.receipt import leaf_hash
from openlora.errors import InvalidArgument

OWN = json.loads(Path(__file__).with_name("vectors").joinpath("tree_v1.json").read_text())
PUBLIC_FILE = rfc6962_vectors()
PUBLIC = json.loads(PUBLIC_FILE.read_text()) if PUBLIC_FILE is not None else {}  # by name
LARGEST = 40


def leaves(count: int) -> list[bytes]:
    return [leaf_hash(number.to_bytes(4, "big")) for number in range(count)]


TREE = MerkleTree(leaves(LARGEST))


def plain_root(hashes: list[bytes]) -> bytes:
    """MTH of RFC 6962 §2.1, word for word."""
    if not hashes:
        return hashlib.sha256().digest()
    if len(hashes) == 1:
        return hashes[0]
    split = 1
    while split * 2 < len(hashes):
        split *= 2
    return node_hash(plain_root(hashes[:split]), plain_root(hashes[split:]))


def plain_inclusion(index: int, hashes: list[bytes]) -> list[bytes]:
    """PATH of RFC 6962 §2.1.1."""
    if len(hashes) == 1:
        return []
    split = 1
    while split * 2 < len(hashes):
        split *= 2
    if index < split:
        return [*plain_inclusion(index, hashes[:split]), plain_root(hashes[split:])]
    return [*plain_inclusion(index - split, hashes[split:]), plain_root(hashes[:split])]


def plain_consistency(old: int, hashes: list[bytes], whole: bool = True) -> list[bytes]:
    """SUBPROOF of RFC 6962 §2.1.2."""
    if old == len(hashes):
        return [] if whole else [plain_root(hashes)]
    split = 1
    while split * 2 < len(hashes):
        split *= 2
    if old <= split:
        return [*plain_consistency(old, hashes[:split], whole), plain_root(hashes[split:])]
    return [*plain_consistency(old - split, hashes[split:], False), plain_root(hashes[:split])]


def decoded(values: list[str] | None) -> list[bytes]:
    return [base64.b64decode(one) for one in values or []]


@needs_public_vectors
@pytest.mark.parametrize("name", [name for name in PUBLIC if name.startswith("inclusion/")])
def test_public_inclusion_vectors(name: str) -> None:
    case = PUBLIC[name]
    leaf, root = decoded([case["leafHash"], case["root"]])
    good = verify_inclusion(leaf, case["leafIdx"], case["treeSize"], decoded(case["proof"]), root)
    assert good is not case["wantErr"]


@needs_public_vectors
@pytest.mark.parametrize("name", [name for name in PUBLIC if name.startswith("consistency/")])
def test_public_consistency_vectors(name: str) -> None:
    case = PUBLIC[name]
    old_root, root = decoded([case["root1"], case["root2"]])
    good = verify_consistency(case["size1"], old_root, case["size2"], root, decoded(case["proof"]))
    assert good is not case["wantErr"]


def test_the_empty_tree_is_consistent_with_every_tree_and_only_it() -> None:
    for size in (0, 1, 7):
        assert verify_consistency(0, EMPTY_ROOT, size, TREE.root(size), [])
    assert not verify_consistency(0, TREE.root(1), 7, TREE.root(7), [])
    assert not verify_consistency(0, EMPTY_ROOT, 7, TREE.root(7), [TREE.root(1)])
    assert not verify_consistency(0, EMPTY_ROOT, 0, TREE.root(1), [])
    assert not verify_consistency(1, TREE.root(1), 0, EMPTY_ROOT, [])


def test_our_own_vectors_still_come_out() -> None:
    tree = MerkleTree(leaf_hash(bytes.fromhex(one)) for one in OWN["leaves"])
    assert [tree.root(size).hex() for size in range(tree.size + 1)] == OWN["roots"]
    for case in OWN["inclusion"]:
        assert [one.hex() for one in tree.inclusion_proof(case["index"], case["size"])] == case["proof"]
    for case in OWN["consistency"]:
        assert [one.hex() for one in tree.consistency_proof(case["old_size"], case["size"])] == case["proof"]


def test_every_root_and_proof_is_that_of_the_rfc_and_verifies() -> None:
    frontier, hashes = Frontier(), leaves(LARGEST)
    for size in range(LARGEST + 1):
        assert frontier.size == size
        assert frontier.root() == TREE.root(size) == plain_root(hashes[:size])
        for index in range(size):
            proof = TREE.inclusion_proof(index, size)
            assert proof == plain_inclusion(index, hashes[:size])
            assert verify_inclusion(hashes[index], index, size, proof, TREE.root(size))
        for old in range(1, size + 1):
            proof = TREE.consistency_proof(old, size)
            assert proof == plain_consistency(old, hashes[:size])
            assert verify_consistency(old, TREE.root(old), size, TREE.root(size), proof)
        if size < LARGEST:
            frontier.append(hashes[size])


def mutations(proof: list[bytes]) -> list[list[bytes]]:
    """Other proofs: a bit flipped, one left out, doubled or foreign at every place, cut, reversed."""
    others: list[list[bytes]] = []
    for place, one in enumerate(proof):
        before, after = proof[:place], proof[place + 1 :]
        flipped = bytes((one[0] ^ 1,)) + one[1:]
        others += [[*before, flipped, *after], [*before, *after], [*before, one, one, *after]]
        others += [[*before, one[:-1], *after], [*before, one + b"\0", *after], [*before, EMPTY_ROOT, *after]]
    others += [[*proof, EMPTY_ROOT], [EMPTY_ROOT, *proof], proof[::-1]]
    return [other for other in others if other != proof]


@settings(max_examples=200)
@given(data=st.data())
def test_no_mutation_of_an_inclusion_proof_verifies(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, LARGEST))
    index = data.draw(st.integers(0, size - 1))
    leaf, root, proof = leaves(size)[index], TREE.root(size), TREE.inclusion_proof(index, size)
    assert verify_inclusion(leaf, index, size, proof, root)
    for other in mutations(proof):
        assert not verify_inclusion(leaf, index, size, other, root)
    assert not any(verify_inclusion(leaf, other, size, proof, root) for other in range(-1, size + 40) if other != index)
    assert not verify_inclusion(root, index, size, proof, leaf) or size == 1
    assert not verify_inclusion(leaf_hash(b"another"), index, size, proof, root)
    assert not verify_inclusion(leaf, index, size, proof, TREE.root(size - 1))
    assert not verify_inclusion(leaf, index, 0, proof, root)
    # An inner node can't stand for a leaf at its own place: the path would be shorter than the size wants.
    if proof:
        assert not verify_inclusion(node_hash(leaf, proof[0]), index >> 1, size, proof[1:], root)


@settings(max_examples=200)
@given(data=st.data())
def test_no_mutation_of_a_consistency_proof_verifies(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, LARGEST))
    old = data.draw(st.integers(1, size - 1))
    old_root, root, proof = TREE.root(old), TREE.root(size), TREE.consistency_proof(old, size)
    assert verify_consistency(old, old_root, size, root, proof)
    for other in mutations(proof):
        assert not verify_consistency(old, old_root, size, root, other)
    assert not verify_consistency(size, old_root, old, root, proof)
    assert not verify_consistency(old, root, size, old_root, proof)
    for wrong in (TREE.root(old - 1), root, EMPTY_ROOT):
        assert not verify_consistency(old, wrong, size, root, proof)
    for wrong in (TREE.root(size - 1), EMPTY_ROOT):
        assert not verify_consistency(old, old_root, size, wrong, proof)
    assert not verify_consistency(old, old_root, size, root, [])


@pytest.mark.parametrize(
    "ask",
    [
        lambda: TREE.root(LARGEST + 1),
        lambda: TREE.root(-1),
        lambda: TREE.inclusion_proof(3, 3),
        lambda: TREE.inclusion_proof(-1),
        lambda: TREE.inclusion_proof(0, LARGEST + 1),
        lambda: TREE.consistency_proof(5, 4),
        lambda: TREE.consistency_proof(-1, 4),
    ],
)
def test_what_is_not_in_the_tree_is_refused(ask: Any) -> None:
    with pytest.raises(InvalidArgument):
        ask()
