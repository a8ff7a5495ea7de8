"""Of logs that were settled: what is computed again has to be what was settled, or nothing more is settled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from second_settlement import Export, check_settled, next_allocations, settle_log
from settlement_cases import CaseLog, Market, anchored_market, second_view

from openlora.attribution.settlement.books import Books, keep_prefixes, open_books
from openlora.attribution.settlement.chain_state import Proposal
from openlora.attribution.settlement.epoch import check_proposal, next_epoch, replacement_epoch
from openlora.attribution.settlement.prefix_store import PrefixStore
from openlora.errors import InvalidArgument, SettlementDiffers

NO_CAP = 2**120 - 1
PRICE = 109  # of Market's receipts


@pytest.fixture
def market() -> Market:
    return anchored_market()


def open_market(market: Market) -> Books:
    return open_books([market.log], market.chain.facts())


def settle(market: Market) -> Proposal:
    """Propose and accept all that there is."""
    proposal = next_epoch(open_market(market), NO_CAP).proposal
    assert proposal is not None
    market.chain.propose(proposal)
    market.chain.accept(proposal)
    return proposal


Damage = Callable[[CaseLog], None]


def lose_signatures(log: CaseLog) -> None:
    log.signatures[1] = log.signatures[4] = None


def lose_a_blob(log: CaseLog) -> None:
    log.blobs = {digest: content for digest, content in log.blobs.items() if not content.startswith(b"openlora/terms")}


DAMAGES = [lose_signatures, lose_a_blob]


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_export_that_lost_something_is_not_the_one_that_was_settled(
    market: Market, tmp_path: Path, damage: Damage
) -> None:
    settle(market)
    market.serve()
    market.log.anchor()
    second = second_view(market.chain.facts())
    check_settled(second, [settle_log(second, Export(market.log.write(tmp_path / "whole")))])
    damage(market.log)
    with pytest.raises(InvalidArgument, match="654 is settled for its first 6 .*not the export that was"):
        open_market(market)
    with pytest.raises(ValueError, match="not the export that was settled"):
        check_settled(second, [settle_log(second, Export(market.log.write(tmp_path / "damaged")))])


@pytest.mark.parametrize("damage", DAMAGES)
def test_nothing_is_kept_of_an_export_that_lacks_something(market: Market, tmp_path: Path, damage: Damage) -> None:
    """A prefix of a copy that was not whole, kept before its epoch was settled, is judged again."""
    store = PrefixStore(tmp_path / "prefixes")
    signatures, blobs = list(market.log.signatures), dict(market.log.blobs)
    damage(market.log)
    books = open_market(market)
    keep_prefixes(books, [market.log], store, {market.log.log_id: 5})
    market.log.signatures, market.log.blobs = signatures, blobs
    proposal = settle(market)
    books = open_books([market.log], market.chain.facts(), store=store)
    assert (books.logs[market.log.log_id].start, books.accepted_tree()[0].root) == (0, proposal.root)
    keep_prefixes(books, [market.log], store)
    assert open_books([market.log], market.chain.facts(), store=store).logs[market.log.log_id].start == 6


def test_nothing_is_proposed_or_attested_over_a_root_that_differs(market: Market, tmp_path: Path) -> None:
    proposal = next_epoch(open_market(market), 3 * PRICE).proposal
    assert proposal is not None
    wrong = replace(proposal, root=b"\7" * 32)
    market.chain.propose(wrong)
    market.chain.accept(wrong)
    books = open_market(market)
    for compute in (lambda: next_epoch(books, NO_CAP), lambda: check_proposal(books, proposal), books.accepted_tree):
        with pytest.raises(SettlementDiffers, match="the accepted root is 0707"):
            compute()
    mending = replacement_epoch(books).proposal
    assert mending == Proposal(2, books.reward_tree()[0].root, 3 * PRICE, ())
    check_proposal(books, mending)
    with pytest.raises(SettlementDiffers, match="the root is 0808"):
        check_proposal(books, replace(mending, root=b"\x08" * 32))
    second = second_view(market.chain.facts())
    with pytest.raises(ValueError, match="the accepted root is another one"):
        check_settled(second, [settle_log(second, Export(market.log.write(tmp_path / "log")))])


def test_logs_of_void_receipts_keep_nobody_out(market: Market, tmp_path: Path) -> None:
    """However long they waited, and however many they are: what is paid comes first."""
    block = market.chain.head
    void = [CaseLog(market.chain, f"void-{number}") for number in range(33)]
    for log in void:
        log.serve(market.base, block=block, changes={"status": 4, "price": 0})
        log.anchor()
    paying = CaseLog(market.chain, "paying")
    paying.serve(market.base, (market.french, 1), (market.legal, 1), block=block)
    paying.anchor()
    market.chain.deposit(paying, PRICE)
    logs = [market.log, *void, paying]
    facts = market.chain.facts()
    epoch = next_epoch(open_books(logs, facts), NO_CAP)
    assert epoch.proposal is not None
    chosen = [one.words for one in epoch.proposal.allocations]
    assert {(paying.log_id, 0, 1, PRICE), (market.log.log_id, 0, 6, 6 * PRICE)} < set(chosen) and len(chosen) == 32
    assert sum("waits for the next epoch" in note for note in epoch.notes) == 3
    second = second_view(facts)
    results = [settle_log(second, Export(log.write(tmp_path / log.name))) for log in logs]
    assert next_allocations(second, results, NO_CAP) == chosen


def test_what_a_proposer_chooses_is_what_the_second_implementation_chooses(market: Market, tmp_path: Path) -> None:
    later = CaseLog(market.chain, "later")
    market.chain.deposit(later, 2 * PRICE)
    for changes in ({}, {"status": 3, "price": 0}, {}, {}):
        later.serve(market.base, (market.french, 1), (market.legal, 1), changes=changes)
    later.anchor()
    logs, taken = [market.log, later], []
    while (proposal := next_epoch(open_books(logs, market.chain.facts()), 4 * PRICE).proposal) is not None:
        second = second_view(market.chain.facts())
        results = [settle_log(second, Export(log.write(tmp_path / f"{log.name}-{len(taken)}"))) for log in logs]
        assert next_allocations(second, results, 4 * PRICE) == [one.words for one in proposal.allocations]
        taken.append(proposal)
        market.chain.propose(proposal)
        market.chain.accept(proposal)
    assert sum(one.amount for proposal in taken for one in proposal.allocations) == 8 * PRICE and len(taken) == 2
