"""Epochs: how far logs go, that cuts change nothing, that money is conserved, and that wrong proposals are noticed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account
from hypothesis import given, settings
from hypothesis import strategies as st
from settlement_cases import (
    BASE,
    BASE_OWNER,
    DISTRIBUTOR,
    FRENCH,
    FRENCH_OWNER,
    CaseLog,
    Chain,
    Market,
    anchored_market,
    key_of,
    model,
)

from openlora.attribution.export import LogExport
from openlora.attribution.settlement.attestation import Attestation, ascending, attest, attestation_digest
from openlora.attribution.settlement.books import Books, keep_prefixes, open_books
from openlora.attribution.settlement.chain_state import Allocation, Proposal
from openlora.attribution.settlement.epoch import check_proposal, next_epoch
from openlora.attribution.settlement.facts import ChainFacts
from openlora.attribution.settlement.ledger import cumulative
from openlora.attribution.settlement.prefix_store import PrefixStore
from openlora.errors import InvalidArgument, SettlementDiffers

NO_CAP = 2**120 - 1
PRICE = 109  # of Market's receipts


def open_market(market: Market, *more: CaseLog) -> Books:
    return open_books([market.log, *more], market.chain.facts())


def settle(chain: Chain, logs: list[CaseLog], cap: int = NO_CAP) -> Proposal | None:
    """Propose and accept the next epoch as computed."""
    proposal = next_epoch(open_books(logs, chain.facts()), cap).proposal
    if proposal is not None:
        chain.propose(proposal)
        books = open_books(logs, chain.facts())
        assert books.state.pending == proposal
        check_proposal(books, proposal)
        chain.accept(proposal)
    return proposal


@pytest.fixture
def market() -> Market:
    return anchored_market()


prices = st.one_of(st.integers(1, 10), st.integers(0, 10**30), st.sampled_from([1, 10**30, 10**18, 999_999, 1_000_001]))


@st.composite
def markets(draw: st.DrawFn) -> tuple[Chain, list[CaseLog], list[int]]:
    """A chain with one or two logs of some receipts, and the sizes of their anchors."""
    chain = Chain()
    chain.publish_parameters()
    base = model(BASE, BASE_OWNER, draw(prices), draw(prices))
    french = model(FRENCH, FRENCH_OWNER, draw(prices), draw(prices))
    chain.register(base)
    chain.register(french, BASE)
    logs = [CaseLog(chain, f"node-{number}") for number in range(draw(st.integers(1, 2)))]
    block = chain.head
    for log in logs:
        for _ in range(draw(st.integers(1, 12))):
            tokens = {"in_tokens": draw(st.integers(0, 2**32 - 1)), "out_tokens": draw(st.integers(0, 5000))}
            adapters = [(french, draw(st.integers(-3, 3)))] if draw(st.booleans()) else []
            void = {"status": 3, "price": 0} if draw(st.integers(0, 4)) == 0 else {}
            log.serve(base, *adapters, block=block, changes=tokens | void)
            if draw(st.booleans()):
                log.anchor()
        if log.anchored < log.size:
            log.anchor()
        chain.deposit(log, 10**60)
    return chain, logs, draw(st.lists(st.integers(1, 3), min_size=1, max_size=8))


@settings(max_examples=40)
@given(markets())
def test_one_epoch_or_many_give_the_same_leaves_and_money_is_conserved(market: Any) -> None:
    chain, logs, steps = market
    whole = open_books(logs, chain.facts())
    at_once = whole.ledger({one.log.log_id: one.good_size for one in whole.logs.values()})
    cuts = 0
    while True:
        books = open_books(logs, chain.facts())
        allocations = []
        for judged in sorted(books.logs.values(), key=lambda one: one.log.log_id):
            start = judged.log.settled_size
            stop = min(start + steps[cuts % len(steps)], judged.good_size)
            if stop > start:
                allocations.append(Allocation(judged.log.log_id, start, stop, judged.paid(start, stop)))
        if not allocations:
            break
        cuts += 1
        tree, _ = books.reward_tree({one.log_id: one.stop for one in allocations})
        total = books.state.total + sum(one.amount for one in allocations)
        proposal = Proposal(books.state.epoch + 1, tree.root, total, tuple(allocations))
        chain.propose(proposal)
        check_proposal(open_books(logs, chain.facts()), proposal)
        chain.accept(proposal)
    ledger = books.ledger()
    assert (ledger.owed, ledger.paid) == (at_once.owed, at_once.paid)
    assert sum(ledger.owed.values()) == 10**9 * ledger.paid == 10**9 * books.state.total
    deposits = sum(one.log.deposited for one in books.logs.values())
    assert ledger.paid <= deposits
    earned = cumulative(ledger)
    assert ledger.paid - len(ledger.owed) < sum(earned.values()) <= ledger.paid or ledger.paid == 0
    tree, _ = books.reward_tree()
    assert tree.root == books.state.root


def test_the_deposit_bounds_an_epoch() -> None:
    market = Market()
    log = CaseLog(market.chain, "poor")
    for _ in range(5):
        log.serve(market.base, (market.french, 1), (market.legal, 1))
    log.anchor()
    books = open_books([log], market.chain.facts())
    nothing = next_epoch(books, NO_CAP)
    assert nothing.proposal is None
    assert "goes up to 0 of 5: the next receipt costs 109, 0 are left of the deposits" in nothing.notes[0]
    market.chain.deposit(log, 3 * PRICE - 1)
    epoch = next_epoch(open_books([log], market.chain.facts()), NO_CAP)
    assert epoch.proposal is not None
    assert [one.words for one in epoch.proposal.allocations] == [(log.log_id, 0, 2, 2 * PRICE)]
    settle(market.chain, [log])
    market.chain.deposit(log, 1)
    settled = settle(market.chain, [log])
    assert settled is not None and settled.allocations[0].words == (log.log_id, 2, 3, PRICE)
    assert settled.total == 3 * PRICE


def test_the_cap_bounds_an_epoch_and_who_waited_longest_goes_first(market: Market) -> None:
    later = CaseLog(market.chain, "later")
    market.chain.deposit(later, 10**9)
    block = market.chain.head
    for _ in range(3):
        later.serve(market.base, (market.french, 1), (market.legal, 1), block=block)
    later.anchor()
    logs = [market.log, later]
    amounts = []
    while (proposal := settle(market.chain, logs, cap=4 * PRICE)) is not None:
        amounts.append({one.log_id: (one.start, one.stop) for one in proposal.allocations})
        assert [one.log_id for one in proposal.allocations] == sorted(one.log_id for one in proposal.allocations)
    mine, theirs = market.log.log_id, later.log_id
    assert amounts == [{mine: (0, 4)}, {mine: (4, 6), theirs: (0, 2)}, {theirs: (2, 3)}]


def test_a_receipt_over_the_cap_is_named(market: Market) -> None:
    epoch = next_epoch(open_market(market), PRICE - 1)
    assert epoch.proposal is None
    assert "so that it can never be settled" in epoch.notes[0]


def test_at_most_32_logs_are_in_an_epoch() -> None:
    market = Market()
    logs = [CaseLog(market.chain, f"node-{number}") for number in range(34)]
    block = market.chain.head
    for log in logs:
        log.serve(market.base, block=block)
        log.anchor()
        market.chain.deposit(log, 10**9)
    first = settle(market.chain, logs)
    second = settle(market.chain, logs)
    assert first is not None and second is not None
    assert {one.log_id for one in first.allocations} == {one.log_id for one in logs[:32]}
    assert {one.log_id for one in second.allocations} == {one.log_id for one in logs[32:]}
    assert settle(market.chain, logs) is None


def test_void_receipts_alone_make_no_epoch_but_do_not_stop_one() -> None:
    market = Market()
    for _ in range(3):
        market.serve(changes={"status": 4, "price": 0})
    market.log.anchor()
    assert settle(market.chain, [market.log]) is None
    market.serve()
    market.log.anchor()
    proposal = settle(market.chain, [market.log])
    assert proposal is not None and proposal.allocations[0].words[1:] == (0, 4, PRICE)


def test_the_highest_prices_fit_where_they_are_written() -> None:
    """10^30 for 10^6 tokens, 2^32 − 1 of both: the receipt's uint128 holds it, and a thousand of them the total."""
    chain = Chain()
    chain.publish_parameters()
    base = model(BASE, BASE_OWNER, 10**30, 10**30)
    chain.register(base)
    log = CaseLog(chain)
    most = {"in_tokens": 2**32 - 1, "out_tokens": 2**32 - 1}
    log.serve(base, changes=most)
    log.anchor()
    chain.deposit(log, 2**128 - 1)
    proposal = settle(chain, [log])
    assert proposal is not None and proposal.total == (2**33 - 2) * 10**24 < 2**113


def changed(proposal: Proposal, **changes: Any) -> Proposal:
    """With another first allocation."""
    first, *rest = proposal.allocations
    return replace(proposal, allocations=(replace(first, **changes), *rest))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda one: replace(one, root=b"\7" * 32), "the root is 0707"),
        (lambda one: replace(one, total=one.total + 1), "with these allocations it is"),
        (lambda one: changed(one, amount=one.allocations[0].amount + 1), "cost 654, not 655"),
        (lambda one: changed(one, stop=7), "up to 6, not to 7"),
        (lambda one: changed(one, stop=5), "cost 545, not 654"),
        (lambda one: changed(one, start=1), "settled up to 0, not 1"),
        (lambda one: changed(one, stop=0), "not to 0"),
        (lambda one: changed(one, log_id=b"\7" * 32), "not registered"),
        (lambda one: replace(one, allocations=one.allocations * 2), "do not ascend"),
        (lambda one: replace(one, allocations=one.allocations * 33), "at most 32"),
    ],
)
def test_a_wrong_proposal_is_noticed(market: Market, change: Any, words: str) -> None:
    books = open_market(market)
    proposal = next_epoch(books, NO_CAP).proposal
    assert proposal is not None
    check_proposal(books, proposal)
    with pytest.raises(SettlementDiffers, match=words):
        check_proposal(books, change(proposal))


def test_a_proposal_over_the_deposit_is_noticed(market: Market) -> None:
    books = open_market(market)
    proposal = next_epoch(books, NO_CAP).proposal
    assert proposal is not None
    books.logs[market.log.log_id].log.deposited = 653
    with pytest.raises(SettlementDiffers, match="has 653 left of its deposits, 654 are wanted"):
        check_proposal(books, proposal)


def test_a_vetoed_epochs_number_is_not_used_again(market: Market) -> None:
    proposal = next_epoch(open_market(market), NO_CAP).proposal
    market.chain.propose(proposal)
    market.chain.emit("RewardDistributor", "Vetoed", epoch=1)
    books = open_market(market)
    assert books.state.pending is None
    again = next_epoch(books, NO_CAP).proposal
    assert again is not None and proposal is not None
    assert again == replace(proposal, epoch=2)


def test_facts_are_the_same_after_a_way_through_json(market: Market) -> None:
    settle(market.chain, [market.log])
    facts = market.chain.facts()
    assert ChainFacts.from_json(facts.to_json()) == facts


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 2}', '{"schema": 1, "events": [{}]}', "\xff"])
def test_facts_that_are_none(text: str) -> None:
    with pytest.raises(InvalidArgument, match="chain facts"):
        ChainFacts.from_json(text)


def test_an_export_on_disk_gives_the_same(market: Market, tmp_path: Path) -> None:
    block = market.chain.head
    for _ in range(260):  # more than a bundle
        market.serve(block=block)
    market.log.serve(market.base, leaf=b"", block=block)
    market.log.anchor()
    export = LogExport(market.log.write(tmp_path / "export"))
    assert (export.key, export.size) == (market.log.key, 267)
    books = open_books([export], market.chain.facts())
    judged = books.logs[market.log.log_id]
    assert (judged.good_size, judged.fault, judged.reason_at(266)) == (267, None, "leaf")
    assert next_epoch(books, NO_CAP) == next_epoch(open_market(market), NO_CAP)


def test_a_prefix_from_disk_gives_the_same_and_is_not_judged_again(market: Market, tmp_path: Path) -> None:
    store = PrefixStore(tmp_path / "prefixes")
    books = open_books([market.log], market.chain.facts(), store=store)
    epoch = next_epoch(books, 4 * PRICE)
    keep_prefixes(books, [market.log], store, epoch.stops)
    market.chain.propose(epoch.proposal)
    market.chain.accept(epoch.proposal)
    market.serve(changes={"request_id": b"\5" * 32})
    market.serve(changes={"request_id": b"\5" * 32})
    market.serve(changes={"request_id": market.log.rows[0][96:128]})  # of a receipt in the prefix
    market.log.anchor()
    scratch = open_market(market)
    resumed = open_books([market.log], market.chain.facts(), store=store)
    one, other = scratch.logs[market.log.log_id], resumed.logs[market.log.log_id]
    assert (one.start, other.start) == (0, 4)
    assert [other.reason_at(at) for at in range(4, 9)] == [None, None, None, "repeated_request", "repeated_request"]
    assert [one.tally(size) for size in range(4, 10)] == [other.tally(size) for size in range(4, 10)]
    assert next_epoch(scratch, NO_CAP) == next_epoch(resumed, NO_CAP)


def test_a_prefix_goes_on_where_the_export_was_rewritten_behind_it(market: Market, tmp_path: Path) -> None:
    """The tree's right edge is kept with it, so that the anchors speak for leaves that are not read any more."""
    store = PrefixStore(tmp_path / "prefixes")
    settle(market.chain, [market.log])
    books = open_market(market)
    keep_prefixes(books, [market.log], store)
    market.serve()
    market.log.anchor()
    market.log.rows[0] = bytes(608)
    resumed = open_books([market.log], market.chain.facts(), store=store)
    assert resumed.logs[market.log.log_id].good_size == 7
    market.log.rows[6] = bytes(608)
    resumed = open_books([market.log], market.chain.facts(), store=store)
    assert "history rewritten" in (resumed.logs[market.log.log_id].fault or "")
    gone = open_books([], market.chain.facts(), store=store)
    assert gone.ledger() == books.ledger()


@pytest.mark.parametrize("how", ["another chain", "a bit", "half"])
def test_a_prefix_that_does_not_hold_is_judged_again(market: Market, tmp_path: Path, how: str) -> None:
    store = PrefixStore(tmp_path / "prefixes")
    settle(market.chain, [market.log])
    keep_prefixes(open_market(market), [market.log], store)
    (file,) = (tmp_path / "prefixes").iterdir()
    content = file.read_bytes()
    if how == "another chain":
        anchored = next(one.block for one in market.chain.events if one.name == "Anchored")
        market.chain.headers[anchored] = replace(market.chain.headers[anchored], hash=b"\7" * 32)
    elif how == "a bit":
        file.write_bytes(content[:-1] + bytes((content[-1] ^ 1,)))
    else:
        file.write_bytes(content[: len(content) // 2])
    assert open_books([market.log], market.chain.facts(), store=store).logs[market.log.log_id].start == 0


def test_facts_whose_events_do_not_fit_are_refused(market: Market) -> None:
    facts = market.chain.facts()
    without = tuple(one for one in facts.events if one.name != "LogRegistered")
    with pytest.raises(InvalidArgument, match="do not fit each other"):
        open_books([market.log], replace(facts, events=without))


def test_attestations_recover_to_who_made_them(market: Market) -> None:
    proposal = next_epoch(open_market(market), NO_CAP).proposal
    assert proposal is not None
    signers = [Account.from_key(key_of(f"attestor {number}").secret) for number in range(3)]
    made = [attest(one, 31337, DISTRIBUTOR, proposal) for one in signers]
    assert [Attestation.from_json(one.to_json()) for one in made] == made
    assert [one.signer for one in made] == [one.address for one in signers]
    assert [one.signer for one in ascending([*made, made[0]])] == sorted(
        (one.address for one in signers), key=str.lower
    )
    digests = {
        attestation_digest(31337, DISTRIBUTOR, proposal),
        attestation_digest(1, DISTRIBUTOR, proposal),
        attestation_digest(31337, BASE_OWNER, proposal),
        attestation_digest(31337, DISTRIBUTOR, replace(proposal, epoch=2)),
    }
    assert len(digests) == 4


@pytest.mark.parametrize("change", [('"epoch": 1', '"epoch": 2'), ('"schema": 1', '"schema": 2'), ("0x", "0y")])
def test_attestations_that_were_changed(market: Market, change: tuple[str, str]) -> None:
    proposal = next_epoch(open_market(market), NO_CAP).proposal
    assert proposal is not None
    text = attest(Account.from_key(key_of("attestor").secret), 31337, DISTRIBUTOR, proposal).to_json()
    with pytest.raises(InvalidArgument):
        Attestation.from_json(text.replace(*change))
