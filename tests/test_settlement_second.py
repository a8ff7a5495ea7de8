"""What the product settles equals what the second implementation settles, bit for bit, whatever the receipts are."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from second_settlement import Export, cumulative_amounts, reward_root, settle_log
from settlement_cases import (
    BASE,
    BASE_OWNER,
    FRENCH,
    FRENCH_OWNER,
    LEGAL,
    LEGAL_OWNER,
    PARAMETERS,
    REGISTRY,
    CaseLog,
    Chain,
    dataset,
    model,
    reference,
    second_view,
)

from openlora.attribution.settlement.books import open_books
from openlora.attribution.settlement.ledger import cumulative

PRICES = st.one_of(st.integers(0, 10), st.integers(0, 10**30), st.sampled_from([10**30, 10**18, 999_999, 2**53]))
WEIGHTS = st.sampled_from([-10_000_000, -300_000, -1, 0, 1, 2, 333_333, 700_000, 10_000_000])
NAMES = ("alice", "bob", "carol", "platform", "base")


@st.composite
def splits(draw: st.DrawFn, count: int) -> list[int]:
    """`count` shares above zero of a million."""
    cuts = sorted(draw(st.sets(st.integers(1, 999_999), min_size=count - 1, max_size=count - 1)))
    return [later - earlier for earlier, later in zip([0, *cuts], [*cuts, 1_000_000], strict=True)]


@st.composite
def data_sets(draw: st.DrawFn) -> list[dict[str, Any]]:
    count = draw(st.integers(0, 3))
    made = []
    for number, ppm in enumerate(draw(splits(count)) if count else []):
        people = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
        made.append(dataset(f"d{number}", ppm, **dict(zip(people, draw(splits(len(people))), strict=True))))
    return made


@st.composite
def faults(draw: st.DrawFn) -> dict[str, Any]:
    """What is wrong with a receipt, in the words of `CaseLog.serve`; mostly nothing."""
    field = st.sampled_from(
        [
            {"log_id": b"\7" * 32},
            {"seq": 3},
            {"request_id": b"\5" * 32},
            {"status": 2},
            {"status": 3, "price": 0},
            {"status": 4, "price": 0},
            {"price": 12_345},
            {"base_model": bytes.fromhex(FRENCH)},
            {"registry_ref": bytes(32)},
            {"runtime_hash": b"\1" * 32},
            {"in_tokens": 2**32 - 1, "out_tokens": 0},
        ]
    )
    other = st.sampled_from(
        [
            {"signer": "somebody else"},
            {"leaf": b"short"},
            {"preimage": bytes(127)},
            {"preimage": bytes(128)},
            {"preimage": (1).to_bytes(32, "big") + bytes(96)},
            {"terms": {"parameters": "00" * 32}},
            {"terms": {"price_version": 1}},
            {"terms": {"extra": 1}},
            {"terms": {"adapters": []}},
        ]
    )
    kind = draw(st.integers(0, 5))
    return {"changes": draw(field)} if kind == 0 else draw(other) if kind == 1 else {}


@st.composite
def cases(draw: st.DrawFn) -> tuple[Chain, list[CaseLog]]:
    """A chain whose parameters and terms change while two logs serve, anchor, and sometimes lie."""
    chain = Chain()
    parts = draw(splits(5))
    names = ("platform_ppm", "node_ppm", "adapter_ppm", "data_ppm", "base_ppm")
    chain.publish_parameters({**PARAMETERS, **dict(zip(names, parts, strict=True))})
    owned = {BASE: BASE_OWNER, FRENCH: FRENCH_OWNER, LEGAL: LEGAL_OWNER}
    models = {}
    for digest, owner in owned.items():
        models[digest] = model(digest, owner, draw(PRICES), draw(PRICES), draw(data_sets()))
        chain.register(models[digest], None if digest == BASE else BASE)
    logs = [CaseLog(chain, name) for name in ("first", "second")]
    blocks = [chain.head]
    version = 1
    for _ in range(draw(st.integers(4, 24))):
        log = draw(st.sampled_from(logs))
        match draw(
            st.sampled_from(["serve"] * 8 + ["anchor", "anchor", "terms", "parameters", "revoke", "wait", "lie"])
        ):
            case "serve":
                chosen = draw(st.lists(st.sampled_from([FRENCH, LEGAL]), max_size=2, unique=True))
                adapters = [(models[digest], draw(WEIGHTS)) for digest in chosen]
                log.serve(models[BASE], *adapters, block=draw(st.sampled_from(blocks)), **draw(faults()))
            case "anchor" if log.size > log.anchored:
                log.anchor()
            case "terms":
                version += 1
                changed = models[FRENCH] = {**models[FRENCH], "input": str(draw(PRICES))}
                chain.publish_terms(changed, version, notice=draw(st.sampled_from([0, 15, 10_000])))
            case "parameters":
                document = draw(st.sampled_from([{**PARAMETERS, "max_age": 25}, {**PARAMETERS, "more": 1}, PARAMETERS]))
                chain.publish_parameters(document, notice=draw(st.sampled_from([0, 15])))
            case "revoke" if draw(st.booleans()):
                chain.revoke(models[LEGAL])
            case "wait":
                chain.mine(draw(st.sampled_from([10, 30, 4_000])))
            case "lie" if log.size > log.anchored and draw(st.booleans()):
                log.anchor(root=b"\6" * 32)
        blocks.append(chain.head)
    for log in logs:
        if log.size > log.anchored:
            log.anchor()
    return chain, logs


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(cases())
def test_reasons_prices_shares_and_root_are_equal(case: tuple[Chain, list[CaseLog]]) -> None:
    chain, logs = case
    facts = chain.facts()
    books = open_books(logs, facts)
    second = second_view(facts)
    with tempfile.TemporaryDirectory() as directory:
        results = [settle_log(second, Export(log.write(Path(directory, log.name)))) for log in logs]
    for result in results:
        judged = books.logs[result.log_id]
        assert judged.good_size == result.good_size
        assert [judged.reason_at(index) for index in range(judged.good_size)] == result.reasons
        assert [judged.paid(index, index + 1) for index in range(judged.good_size)] == result.prices
    sizes = {result.log_id: result.good_size for result in results}
    amounts = cumulative_amounts(results, sizes)
    assert cumulative(books.ledger(sizes)) == amounts
    tree, _ = books.reward_tree(sizes)
    assert tree.root == reward_root(second, amounts)


def test_the_cases_are_not_all_alike() -> None:
    """The second implementation knows every reason that a case can be made for, and pays what is right."""
    chain = Chain()
    chain.publish_parameters()
    base = model(BASE, BASE_OWNER)
    french = model(FRENCH, FRENCH_OWNER)
    chain.register(base)
    chain.register(french, BASE)
    log = CaseLog(chain)
    block = chain.head
    foreign = reference(1, REGISTRY, block)
    log.serve(base, (french, 1), block=block)
    log.serve(base, leaf=bytes(608))
    log.serve(base, changes={"log_id": b"\7" * 32})
    log.serve(base, changes={"seq": 0})
    log.serve(base, changes={"request_id": hashlib.sha256(b"node request 0").digest()})
    log.serve(base, signer="somebody else")
    log.serve(base, changes={"status": 3, "price": 0})
    log.serve(base, changes={"registry_ref": bytes(32)})
    log.serve(base, changes={"runtime_hash": b"\1" * 32})
    log.serve(base, terms={"extra": 1})
    log.serve(base, preimage=foreign)
    log.serve(base, preimage=foreign[:31] + (31337 >> 8).to_bytes(1, "big") + foreign[32:])
    late = chain.mine()
    log.serve(base, block=late, terms={"parameters": "00" * 32})
    log.serve({**base, "owner": FRENCH_OWNER}, block=late)
    log.serve(base, block=late, changes={"price": 1})
    log.anchor()
    log.serve(base, block=chain.head)
    chain.mine(10_000)
    log.anchor()
    with tempfile.TemporaryDirectory() as directory:
        result = settle_log(second_view(chain.facts()), Export(log.write(Path(directory, "log"))))
    assert result.reasons == [
        None, "leaf", "log_id", "sequence", "repeated_request", "signature", "status", "unregistered", "blob_missing",
        "blob_invalid", "registry_foreign", "registry_foreign", "parameters", "terms", "price", "registry_age",
    ]  # fmt: skip
    assert result.prices[0] == (10 * 10**6 + 20 * 3 * 10**6) // 10**6 * 2
