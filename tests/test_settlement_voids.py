"""Every reason for which a receipt is void, and history that was rewritten."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import rfc8785
from settlement_cases import (
    BASE,
    BASE_OWNER,
    BLOCK_SECONDS,
    CHAIN_ID,
    DISTRIBUTOR,
    FRENCH,
    FRENCH_OWNER,
    LEGAL_OWNER,
    PARAMETERS,
    REGISTRY,
    WHOLE,
    ZERO32,
    CaseLog,
    Chain,
    Market,
    address_of,
    dataset,
    key_of,
    model,
    reference,
    tree_root,
)

from openlora.attribution.keccak import keccak
from openlora.attribution.receipt import RECEIPT_TYPE, sign_digest
from openlora.attribution.settlement.books import open_books
from openlora.attribution.settlement.facts import BlockHeader, ChainFacts
from openlora.attribution.settlement.judge import REASONS
from openlora.attribution.settlement.ledger import JudgedLog
from openlora.errors import InvalidArgument


def judged(market: Market) -> JudgedLog:
    return open_books([market.log], market.chain.facts()).logs[market.log.log_id]


def reasons(market: Market) -> list[str | None]:
    """After an anchor over everything: why each receipt is void, None for paid."""
    if market.log.anchored < market.log.size:
        market.log.anchor()
    found = judged(market)
    return [found.reason_at(index) for index in range(found.good_size)]


def only_second(market: Market, reason: str | None) -> None:
    """There are three receipts, and the one in the middle alone is void."""
    market.serve()
    assert reasons(market) == [None, reason, None]


@pytest.fixture
def market() -> Market:
    made = Market()
    made.serve()
    return made


def test_leaf_that_no_receipt_encodes_to(market: Market) -> None:
    good = market.log.rows[0]
    bad_leaves = [b"", good[:-1], good + b"\0", bytes(608), b"\1" + good[1:]]
    status = bytearray(good)
    status[4 * 32 + 31] = 5
    dirty = bytearray(good)
    dirty[12 * 32] = 1  # over the 32 bits of inTokens
    for leaf in (*bad_leaves, bytes(status), bytes(dirty)):
        market.serve(leaf=leaf)
    assert reasons(market) == [None] + ["leaf"] * 7


def test_log_id_of_another_log(market: Market) -> None:
    market.serve(changes={"log_id": b"\7" * 32})
    only_second(market, "log_id")


def test_sequence_that_is_not_the_place(market: Market) -> None:
    market.serve(changes={"seq": 7})
    only_second(market, "sequence")


def test_repeated_request_pays_once(market: Market) -> None:
    first = hashlib.sha256(b"node request 0").digest()
    market.serve(changes={"request_id": first})
    only_second(market, "repeated_request")


def test_a_request_id_counts_from_a_void_receipt_on_too() -> None:
    market = Market()
    market.serve(changes={"request_id": b"\5" * 32, "seq": 9})
    market.serve(changes={"request_id": b"\5" * 32})
    assert reasons(market) == ["sequence", "repeated_request"]


def test_a_request_id_of_another_logs_leaf_does_not_count() -> None:
    market = Market()
    market.serve(changes={"request_id": b"\5" * 32, "log_id": b"\7" * 32})
    market.serve(changes={"request_id": b"\5" * 32})
    assert reasons(market) == ["log_id", None]


def test_signature_that_is_not_the_one_of_the_signer(market: Market) -> None:
    order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
    for _ in range(9):
        market.serve()
    log = market.log
    market.serve(signer="somebody else")
    good = [one for one in log.signatures if one is not None]
    malleable = (order - int.from_bytes(good[1][32:64], "big")).to_bytes(32, "big")
    log.signatures[1] = good[1][:32] + malleable + bytes((55 - good[1][64],))
    log.signatures[2] = None
    log.signatures[3] = good[3][:64]
    log.signatures[4] = good[4][:64] + bytes((good[4][64] - 27,))
    log.signatures[5] = good[5][:64] + bytes((55 - good[5][64],))
    log.signatures[6] = bytes(64) + b"\x1b"
    log.signatures[7] = b"\xff" * 64 + b"\x1b"
    log.signatures[8] = good[0]
    assert reasons(market) == [None] + ["signature"] * 8 + [None, "signature"]


@pytest.mark.parametrize("what", ["version", "name", "log", "chain"])
def test_signature_for_another_domain(market: Market, what: str) -> None:
    """By the signer itself, over the same receipt, but for something else than this log's receipts of version 1."""
    seq = market.serve()
    names = [b"OpenLoRA Log" if what == "name" else b"OpenLoRA Receipt", b"2" if what == "version" else b"1"]
    salt = b"\7" * 32 if what == "log" else market.log.log_id
    fields = b"string name,string version,bytes32 salt" + (b",uint256 chainId" if what == "chain" else b"")
    words = [keccak(b"EIP712Domain(" + fields + b")"), *map(keccak, names), salt]
    domain = keccak(b"".join(words) + (CHAIN_ID.to_bytes(32, "big") if what == "chain" else b""))
    digest = keccak(b"\x19\x01" + domain + keccak(keccak(RECEIPT_TYPE.encode()) + market.log.rows[seq]))
    market.log.signatures[seq] = sign_digest(key_of("node signer"), digest)
    only_second(market, "signature")


def test_times_in_a_receipt_decide_nothing(market: Market) -> None:
    """A node's clock can be wrong, or say what its operator likes."""
    market.serve(changes={"started_at": 2**64 - 1, "ended_at": 0})
    only_second(market, None)
    assert judged(market).price_at(0) == judged(market).price_at(1) > 0


@pytest.mark.parametrize("status", [3, 4])
def test_status_of_an_error_or_a_crash(market: Market, status: int) -> None:
    market.serve(changes={"status": status, "price": 0})
    only_second(market, "status")


def test_cancelled_requests_are_paid(market: Market) -> None:
    market.serve(changes={"status": 2})
    only_second(market, None)


def test_unregistered_without_a_reference(market: Market) -> None:
    market.serve(changes={"registry_ref": ZERO32})
    only_second(market, "unregistered")


@pytest.mark.parametrize("name", ["runtime_hash", "adapters_hash", "terms_hash", "registry_ref"])
def test_blob_missing(market: Market, name: str) -> None:
    market.serve(changes={name: b"\5" * 32})
    only_second(market, "blob_missing")


def test_blob_missing_comes_before_blob_invalid(market: Market) -> None:
    market.serve(changes={"runtime_hash": market.log.keep(b"no blob"), "terms_hash": b"\5" * 32})
    only_second(market, "blob_missing")


def test_blob_missing_when_it_has_another_hash(market: Market) -> None:
    market.serve(changes={"runtime_hash": b"\5" * 32})
    market.log.blobs[b"\5" * 32] = b"something else"
    only_second(market, "blob_missing")


RUNTIME = {"engine": "torch", "version": "1", "dtype": "float32", "quantization": "none"}
DEEP = b'{"engine":' * 100_000


@pytest.mark.parametrize(
    ("name", "blob"),
    [
        ("runtime_hash", b"openlora/runtime/v2" + rfc8785.dumps(RUNTIME)),
        ("runtime_hash", b"openlora/runtime/v1" + rfc8785.dumps({**RUNTIME, "colour": "blue"})),
        ("runtime_hash", b"openlora/runtime/v1" + rfc8785.dumps({"engine": "torch"})),
        ("runtime_hash", b"openlora/runtime/v1 " + rfc8785.dumps(RUNTIME)),
        ("runtime_hash", b"openlora/runtime/v1" + rfc8785.dumps(RUNTIME) + b"\n"),
        ("runtime_hash", b"openlora/runtime/v1" + rfc8785.dumps(RUNTIME).replace(b"{", b'{"version":"0",', 1)),
        ("runtime_hash", b"openlora/runtime/v1" + rfc8785.dumps({**RUNTIME, "engine": "x" * 257})),
        ("runtime_hash", b"openlora/runtime/v1" + DEEP),
        ("runtime_hash", b'openlora/runtime/v1{"engine":"\xff"}'),
        ("adapters_hash", b"openlora/adapters/v1[]"),
        ("adapters_hash", b'openlora/adapters/v1{"adapters":[],"method":"cat"}'),  # the terms name two
        ("registry_ref", bytes(127)),
        ("registry_ref", bytes(129)),
        ("registry_ref", CHAIN_ID.to_bytes(32, "big") + b"\1" * 32 + bytes(64)),
    ],
)
def test_blob_invalid(market: Market, name: str, blob: bytes) -> None:
    market.serve(changes={name: market.log.keep(blob)})
    only_second(market, "blob_invalid")


@pytest.mark.parametrize(
    "changes",
    [
        {"price_version": 3},
        {"price_version": 1},  # with decimal strings
        {"base": model(BASE, BASE_OWNER, "01")},
        {"base": model(BASE, BASE_OWNER, 10**30 + 1)},
        {"base": model(BASE, BASE_OWNER, "-1")},
        {"base": {**model(BASE, BASE_OWNER), "input": 1}},  # version 2 with an integer
        {"base": model("cd" * 32, BASE_OWNER)},  # not the receipt's base
        {"base": model(BASE, BASE_OWNER, datasets=[dataset("news", WHOLE - 1, alice=WHOLE)])},
        {"base": model(BASE, BASE_OWNER, datasets=[dataset("news", WHOLE, alice=1)])},
        {"base": model(BASE, BASE_OWNER, datasets=[dataset("news", WHOLE)])},
        {"adapters": [model(FRENCH, FRENCH_OWNER)]},  # the adapters blob has two
    ],
)
def test_blob_invalid_by_the_schema_of_terms(market: Market, changes: dict[str, Any]) -> None:
    market.serve(terms=changes, changes={"price": 1})
    only_second(market, "blob_invalid")


def test_blob_invalid_when_a_digest_is_there_twice(market: Market) -> None:
    market.log.serve(market.base, (market.french, 1), (market.french, 1))
    market.log.serve(market.base, (market.base, 1))
    market.serve()
    assert reasons(market) == [None, "blob_invalid", "blob_invalid", None]


@pytest.mark.parametrize(("chain_id", "registry"), [(1, REGISTRY), (CHAIN_ID, DISTRIBUTOR), (2**200, REGISTRY)])
def test_registry_foreign(market: Market, chain_id: int, registry: str) -> None:
    market.serve(preimage=reference(chain_id, registry, market.chain.head))
    only_second(market, "registry_foreign")


def test_registry_block_that_is_not_the_chains(market: Market) -> None:
    header = market.chain.head
    market.serve(block=BlockHeader(header.number, b"\5" * 32, header.timestamp))
    only_second(market, "registry_block")


def test_registry_block_must_be_below_the_first_anchor_over_the_receipt() -> None:
    market = Market()
    market.serve()
    after = BlockHeader(market.chain.number + 1, hashlib.sha256(b"block %d" % (market.chain.number + 1)).digest(), 0)
    market.serve(block=after)
    market.serve(block=BlockHeader(2**60, b"\5" * 32, 0))
    market.log.anchor()
    assert market.chain.head.hash == after.hash
    market.serve()  # of the block of the first anchor, but under the second
    assert reasons(market) == [None, "registry_block", "registry_block", None]


def test_parameters_that_are_not_in_force(market: Market) -> None:
    market.serve(terms={"parameters": "0" * 64})
    only_second(market, "parameters")


def test_parameters_in_force_are_those_after_their_notice() -> None:
    market = Market()
    old = market.chain.parameters_digest
    new = market.chain.publish_parameters({**PARAMETERS, "max_age": 3_601}, notice=BLOCK_SECONDS * 2)
    market.serve(terms={"parameters": old.hex()})
    market.serve(terms={"parameters": new.hex()})
    market.chain.mine()
    market.chain.mine()
    market.serve(terms={"parameters": old.hex()})
    market.serve(terms={"parameters": new.hex()})
    assert reasons(market) == [None, "parameters", "parameters", None]


@pytest.mark.parametrize(
    "document",
    [
        "{}",
        "no json",
        {**PARAMETERS, "node_ppm": 1},
        {**PARAMETERS, "colour": "blue"},
        {**PARAMETERS, "platform": address_of("x").lower()},
        {**PARAMETERS, "schema": 2},
        {**PARAMETERS, "node_ppm": -1, "platform_ppm": 300_001},
        {**PARAMETERS, "max_age": 2**53},
        rfc8785.dumps(PARAMETERS).decode() + "\n",
    ],
)
def test_parameters_that_are_none_are_in_force_for_nobody(document: Any) -> None:
    market = Market()
    old = market.chain.parameters_digest
    text = document if isinstance(document, str) else rfc8785_with_big(document)
    new = market.chain.publish_parameters(text)
    market.serve(terms={"parameters": old.hex()})
    market.serve(terms={"parameters": new.hex()})
    assert reasons(market) == ["parameters", "parameters"]


def rfc8785_with_big(document: dict[str, Any]) -> str:
    """Canonical but for an integer that RFC 8785 has none of."""
    text = rfc8785.dumps({**document, "max_age": min(document["max_age"], 2**53 - 1)}).decode()
    return text.replace(str(2**53 - 1), str(document["max_age"]))


def test_registry_age_over_what_the_parameters_allow() -> None:
    market = Market()
    market.serve()
    market.chain.mine(PARAMETERS["max_age"] - BLOCK_SECONDS)
    market.log.anchor()  # exactly max_age after the block
    market.serve(block=market.chain.headers[market.chain.number - 2])
    market.log.anchor()
    assert reasons(market) == [None, "registry_age"]


def test_terms_of_a_model_that_somebody_else_registered(market: Market) -> None:
    stolen = model(FRENCH, address_of("thief"), "500000", "700000")
    market.log.serve(market.base, (stolen, 1))
    only_second(market, "terms")


def test_terms_that_are_not_those_published(market: Market) -> None:
    market.log.serve(market.base, ({**market.french, "input": "500001"}, 1))
    only_second(market, "terms")


def test_terms_in_force_are_those_after_their_notice() -> None:
    market = Market()
    dearer = {**market.legal, "input": "300000"}
    market.chain.publish_terms(dearer, version=2, notice=BLOCK_SECONDS)
    market.log.serve(market.base, (market.legal, 1))
    market.log.serve(market.base, (dearer, 1))
    market.chain.mine()
    market.log.serve(market.base, (market.legal, 1))
    market.log.serve(market.base, (dearer, 1))
    assert reasons(market) == [None, "terms", "terms", None]


def test_terms_of_a_revoked_model() -> None:
    market = Market()
    before = market.chain.head
    market.chain.revoke(market.legal)
    market.log.serve(market.base, (market.legal, 1), block=before)
    market.log.serve(market.base, (market.legal, 1))
    assert reasons(market) == [None, "terms"]


def test_terms_of_a_model_registered_later(market: Market) -> None:
    before = market.chain.head
    new = model("ee" * 32, LEGAL_OWNER)
    market.chain.register(new, BASE)
    market.log.serve(market.base, (new, 1), block=before)
    only_second(market, "terms")


def test_terms_with_another_base(market: Market) -> None:
    other = model("ee" * 32, LEGAL_OWNER)
    market.chain.register(other, "cd" * 32)
    market.log.serve(market.base, (other, 1))  # an adapter of another base
    market.log.serve(other)  # a base that is registered as an adapter
    second_base = model("ef" * 32, LEGAL_OWNER)
    market.chain.register(second_base)
    market.log.serve(market.base, (second_base, 1))  # an adapter that is registered as a base
    assert reasons(market) == [None, "terms", "terms", "terms"]


def test_terms_without_an_owner(market: Market) -> None:
    market.log.serve(market.base, (model(FRENCH, "0x" + "0" * 40, 0, 0), 1))
    only_second(market, "terms")


def test_an_owners_letters_may_have_any_case(market: Market) -> None:
    shouted = {**market.legal, "owner": market.legal["owner"].lower()}
    market.chain.publish_terms(shouted, version=2)
    market.chain.events[-1].args["owner"] = market.legal["owner"]
    market.log.serve(market.base, (market.legal, 1))
    market.legal = shouted
    market.serve()
    assert reasons(market) == [None, "terms", None]


@pytest.mark.parametrize("off", [-1, 1])
def test_price_that_tokens_and_terms_do_not_give(market: Market, off: int) -> None:
    market.serve(changes={"price": 109 + off})
    only_second(market, "price")


def test_price_is_rounded_down_for_each_model_by_itself() -> None:
    market = Market()
    cheap = [model(digest * 32, LEGAL_OWNER, 999_999, 0) for digest in ("a1", "a2")]
    for one in cheap:
        market.chain.register(one, BASE)
    market.log.serve(market.base, *((one, 1) for one in cheap), changes={"in_tokens": 1, "out_tokens": 0, "price": 1})
    market.log.serve(market.base, *((one, 1) for one in cheap), changes={"in_tokens": 1, "out_tokens": 0, "price": 2})
    assert reasons(market) == [None, "price"]


def test_price_version_1_is_settled_by_the_same_terms(market: Market) -> None:
    as_integers = [{**one, "input": int(one["input"]), "output": int(one["output"])} for one in _models(market)]
    terms = {"price_version": 1, "base": as_integers[0], "adapters": as_integers[1:]}
    market.serve(terms=terms)
    only_second(market, None)


def _models(market: Market) -> list[dict[str, Any]]:
    return [market.base, market.french, market.legal]


def test_every_reason_has_a_test_by_its_name() -> None:
    tests = [name for name in globals() if name.startswith("test_")]
    assert all(any(name.startswith(f"test_{reason}") for name in tests) for reason in REASONS)


def test_void_receipts_pay_nobody_and_are_counted(market: Market) -> None:
    market.serve(changes={"status": 3, "price": 0})
    market.serve(changes={"price": 7})
    market.log.anchor()
    tally = judged(market).tally(3)
    assert (tally.paid, tally.paid_receipts, sum(tally.owed.values())) == (109, 1, 109 * 10**9)
    assert (tally.void_receipts, tally.void_price) == ({"status": 1, "price": 1}, {"status": 0, "price": 7})


def rewritten(market: Market) -> None:
    """Another first receipt under the second anchor than under the first."""
    market.serve()
    market.log.anchor()
    market.serve()
    market.log.anchor()
    market.log.rows[0], market.log.rows[1] = market.log.rows[1], market.log.rows[0]


def test_history_rewritten_settles_nothing_from_the_first_anchor_that_differs(market: Market) -> None:
    rewritten(market)
    found = judged(market)
    assert (found.good_size, found.judged) == (0, 0)
    assert found.fault is not None and "history rewritten: the first 2 receipts" in found.fault


@pytest.mark.parametrize(
    "break_it",
    [
        lambda market: market.log.anchor(root=b"\7" * 32),
        lambda market: market.log.anchor(size=market.log.size + 5, root=b"\7" * 32),
    ],
    ids=["another root", "more than the export has"],
)
def test_history_settles_up_to_the_last_anchor_before_the_fault(
    market: Market, break_it: Callable[[Market], None]
) -> None:
    market.log.anchor()
    market.serve()
    break_it(market)
    market.serve()
    market.serve()
    market.log.anchor(size=market.log.size + 5, root=tree_root(market.log.rows))
    found = judged(market)
    assert (found.good_size, found.judged) == (1, 1)
    assert found.fault is not None


def test_history_without_an_anchor_settles_nothing(market: Market) -> None:
    assert (judged(market).good_size, judged(market).fault) == (0, None)


def test_an_export_that_is_not_the_settled_one_is_refused(market: Market) -> None:
    market.log.anchor()
    words = {"logId": market.log.log_id, "from": 0, "to": 1, "amount": 109}
    market.chain.emit("RewardDistributor", "Settled", **words)
    market.log.rows[0] = bytes(608)
    with pytest.raises(InvalidArgument, match="it is not the one that was settled"):
        open_books([market.log], market.chain.facts())
    with pytest.raises(InvalidArgument, match="can't be computed without its export"):
        open_books([], market.chain.facts())


def test_a_log_that_is_not_registered_is_left_out() -> None:
    chain = Chain()
    books = open_books([CaseLog(chain, register=False)], chain.facts())
    assert books.logs == {} and "not registered" in books.notes[0]


def test_two_exports_of_a_log_are_refused(market: Market) -> None:
    with pytest.raises(InvalidArgument, match="two exports"):
        open_books([market.log, market.log], market.chain.facts())


def test_a_header_that_the_facts_lack_is_no_reason_to_void(market: Market) -> None:
    named = market.chain.number
    market.chain.mine()
    market.log.anchor()
    facts = market.chain.facts()
    headers = {number: header for number, header in facts.headers.items() if number != named}
    poorer = ChainFacts(**{**vars(facts), "headers": headers})
    with pytest.raises(InvalidArgument, match=f"lack the header of block {named}"):
        open_books([market.log], poorer)
    books = open_books([market.log], poorer, facts.header)
    assert books.logs[market.log.log_id].reason_at(0) is None
