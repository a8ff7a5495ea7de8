"""Against golden vectors that were made with OpenZeppelin's merkle-tree and viem, which share no code with ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from eth_account import Account
from hypothesis import given, settings
from hypothesis import strategies as st

from openlora.attribution.blobs import model_terms_hash
from openlora.attribution.settlement.attestation import Attestation, ascending, attest, attestation_digest
from openlora.attribution.settlement.chain_state import Allocation, Proposal
from openlora.attribution.settlement.registry import account
from openlora.attribution.settlement.reward_tree import RewardTree, reward_leaf
from openlora.errors import InvalidArgument

VECTORS = json.loads((Path(__file__).parent / "vectors" / "settlement_v1.json").read_text())
CHAIN_ID, DISTRIBUTOR = VECTORS["chain_id"], VECTORS["distributor"]


@pytest.mark.parametrize("case", VECTORS["reward_trees"], ids=lambda case: case["about"])
def test_reward_trees_are_those_of_openzeppelin(case: dict[str, Any]) -> None:
    amounts = {account(one["account"]): int(one["cumulative"]) for one in case["accounts"]}
    tree = RewardTree(CHAIN_ID, DISTRIBUTOR, amounts)
    assert "0x" + tree.root.hex() == case["root"]
    for one in case["accounts"]:
        who = account(one["account"])
        assert "0x" + reward_leaf(CHAIN_ID, DISTRIBUTOR, who, amounts[who]).hex() == one["leaf"]
        assert ["0x" + node.hex() for node in tree.proof(who)] == one["proof"]


@pytest.mark.parametrize("case", VECTORS["attestations"], ids=lambda case: case["about"])
def test_attestations_are_those_of_viem(case: dict[str, Any]) -> None:
    allocations = [
        Allocation(bytes.fromhex(one["log_id"][2:]), int(one["from"]), int(one["to"]), int(one["amount"]))
        for one in case["allocations"]
    ]
    proposal = Proposal(case["epoch"], bytes.fromhex(case["root"][2:]), int(case["total"]), tuple(allocations))
    assert "0x" + attestation_digest(CHAIN_ID, DISTRIBUTOR, proposal).hex() == case["digest"]
    signed = []
    for one in case["signatures"]:
        made = attest(Account.from_key(one["private_key"]), CHAIN_ID, DISTRIBUTOR, proposal)
        assert "0x" + made.signature.hex() == one["signature"]
        assert Attestation.from_json(made.to_json()).signer == one["signer"]
        signed.append(made)
    assert ascending(reversed(signed)) == signed


def test_model_terms_hash_is_that_of_the_vectors() -> None:
    (case,) = (one for one in VECTORS["documents"] if one["tag"] == "openlora/model-terms/v1")
    model = msgspec.json.decode(case["document"])
    assert "0x" + model_terms_hash(model).hex() == case["hash"]
    if int(model["input"]) < 2**53:
        as_integers = {**model, "input": int(model["input"]), "output": int(model["output"])}
        assert model_terms_hash(as_integers) == model_terms_hash(model)


def test_amounts_of_zero_have_no_leaf() -> None:
    one, other = b"\1" * 20, b"\2" * 20
    assert RewardTree(1, DISTRIBUTOR, {one: 5, other: 0}).root == RewardTree(1, DISTRIBUTOR, {one: 5}).root
    assert RewardTree(1, DISTRIBUTOR, {one: 0}).root == bytes(32)
    with pytest.raises(InvalidArgument, match="has earned nothing"):
        RewardTree(1, DISTRIBUTOR, {one: 5}).proof(other)


def test_amounts_up_to_2_to_256() -> None:
    who = b"\1" * 20
    assert RewardTree(1, DISTRIBUTOR, {who: 2**256 - 1}).root
    with pytest.raises(OverflowError):
        RewardTree(1, DISTRIBUTOR, {who: 2**256})


@settings(max_examples=50)
@given(st.dictionaries(st.binary(min_size=20, max_size=20), st.integers(1, 2**120), min_size=1, max_size=40))
def test_every_proof_leads_to_the_root(amounts: dict[bytes, int]) -> None:
    from eth_hash.auto import keccak

    tree = RewardTree(CHAIN_ID, DISTRIBUTOR, amounts)
    for who, amount in amounts.items():
        node = reward_leaf(CHAIN_ID, DISTRIBUTOR, who, amount)
        for sibling in tree.proof(who):
            node = keccak(min(node, sibling) + max(node, sibling))
        assert node == tree.root
