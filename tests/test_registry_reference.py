"""The registry reference of a receipt: journalled with the intent, kept among the blobs, shown and verified."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import pytest
from attribution_cases import ALICE, Acknowledgements, append_completion, append_intent, make_intent
from eth_abi import encode

from openlora.attribution.journal import Journal
from openlora.attribution.log import ReceiptLog
from openlora.attribution.projection import Projector
from openlora.attribution.registry_reference import RegistryReference
from openlora.attribution.verify import verify_receipt
from openlora.errors import InvalidArgument, ReceiptInvalid

REFERENCE = RegistryReference(31337, ALICE, 1234, b"\xbb" * 32)


def test_the_preimage_is_the_abi_encoding_of_its_parts() -> None:
    words = encode(["uint256", "address", "uint256", "bytes32"], [31337, ALICE, 1234, b"\xbb" * 32])
    assert REFERENCE.preimage == words
    assert RegistryReference.parse(words) == RegistryReference.from_document(REFERENCE.document) == REFERENCE


@pytest.mark.parametrize(
    "preimage",
    [b"x", REFERENCE.preimage + b"\0", b"\xff" * 128, REFERENCE.preimage[:32] + b"\1" + REFERENCE.preimage[33:]],
)
def test_other_bytes_are_no_reference(preimage: bytes, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="registry"):
        RegistryReference.parse(preimage)
    acknowledged = Acknowledgements()
    with Journal.open(tmp_path / "journal") as journal, pytest.raises(InvalidArgument, match="registry"):
        journal.append([make_intent(1, registry=preimage)], acknowledged.on_durable, acknowledged.on_error)


def test_a_receipt_carries_its_reference_and_no_other_verifies(tmp_path: Path) -> None:
    with Journal.open(tmp_path / "journal") as journal, ReceiptLog.open(tmp_path) as log:
        acknowledged = Acknowledgements()
        intent = make_intent(1, registry=REFERENCE.preimage)
        journal.append([intent], acknowledged.on_durable, acknowledged.on_error)
        append_intent(journal, 2)
        for number in (1, 2):
            append_completion(journal, number)
        Projector(tmp_path / "journal", log).project()
        document, without = log.receipt_json(0), log.receipt_json(1)
        key = log.key
    assert verify_receipt(document, key).receipt.registry_ref == hashlib.sha256(REFERENCE.preimage).digest()
    assert document["blobs"]["registry"] == REFERENCE.document
    assert verify_receipt(without, key).receipt.registry_ref == bytes(32) and "registry" not in without["blobs"]

    others: list[object] = [None, "x", [], {}, REFERENCE.document | {"more": 1}]
    for name, values in {
        "chain_id": [1, -1, 31337.0, True, "31337", 2**60],
        "registry": [ALICE.lower(), "0x" + "11" * 20, 5, ""],
        "block_number": [1235, None],
        "block_hash": ["0x" + "cc" * 32, "0x" + "BB" * 32, "bb" * 32, 7],
    }.items():
        others += [REFERENCE.document | {name: value} for value in values]
    for other in others:
        mutated = copy.deepcopy(document)
        mutated["blobs"]["registry"] = other
        with pytest.raises(ReceiptInvalid, match="registry"):
            verify_receipt(mutated, key)
    mutated = copy.deepcopy(document)
    del mutated["blobs"]["registry"]
    without["blobs"]["registry"] = REFERENCE.document
    for wrong in (mutated, without):
        with pytest.raises(ReceiptInvalid, match="registry"):
            verify_receipt(wrong, key)
