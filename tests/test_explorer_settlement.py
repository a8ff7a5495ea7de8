"""Earners, epochs and voids as the page shows them, recomputed from logs and the events of a chain."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from settlement_cases import BASE, BASE_OWNER, FRENCH, FRENCH_OWNER, PLATFORM, CaseLog, Chain, model

from openlora.attribution.settlement.books import open_books
from openlora.attribution.settlement.epoch import next_epoch
from openlora.attribution.settlement.facts import ChainEvent, ChainFacts
from openlora.errors import InvalidArgument
from openlora.explorer.accounts import Accountant, Accounts
from openlora.explorer.app import create_app
from openlora.explorer.chain_summary import summarise
from openlora.explorer.settlement_view import SettlementView, Snapshot

DEPOSIT = 10**24


@dataclass
class Settled:
    """A chain on which one epoch was accepted, one vetoed and one is pending, and its log."""

    chain: Chain
    log: CaseLog

    @property
    def facts(self) -> ChainFacts:
        return self.chain.facts()


@pytest.fixture
def settled() -> Settled:
    chain = Chain()
    chain.publish_parameters()
    base, french = model(BASE, BASE_OWNER), model(FRENCH, FRENCH_OWNER, 10**24, 10**24)
    chain.register(base)
    chain.register(french, BASE)
    log = CaseLog(chain)
    chain.deposit(log, DEPOSIT)
    for number in range(10):
        log.serve(base, (french, 1_000_000), changes={"status": 3, "price": 0} if number == 4 else None)
    log.anchor()
    chain.propose(proposed(chain, log))
    chain.accept(proposed(chain, log))
    for _ in range(5):
        log.serve(base, signer="somebody else")
    log.serve(base)
    log.anchor()
    chain.propose(proposed(chain, log))
    chain.emit("RewardDistributor", "Vetoed", epoch=chain.epoch)
    chain.propose(proposed(chain, log))
    return Settled(chain, log)


def proposed(chain: Chain, log: CaseLog) -> object:
    return next_epoch(open_books([log], chain.facts()), 10**40).proposal


def view_of(settled: Settled, accounts: Accounts | None, note: str = "") -> SettlementView:
    facts = settled.facts
    summary = summarise(facts.events)
    return SettlementView(Snapshot("ready", "", facts.chain_id, facts.distributor, facts.head, summary, accounts, note))


def accounts_of(settled: Settled, directory: Path) -> Accounts:
    return Accountant(directory).compute(settled.facts, [settled.log], summarise(settled.facts.events).ranges)


def test_earners_are_those_of_the_accepted_epoch(settled: Settled, tmp_path: Path) -> None:
    accounts = accounts_of(settled, tmp_path)
    assert accounts.agrees
    claimed = 10**3
    settled.chain.emit("RewardDistributor", "Claimed", account=FRENCH_OWNER, amount=claimed, cumulative=claimed)
    view = view_of(settled, accounts)
    listed = view.earners("", 0, 100)
    assert listed["agrees"] is True
    assert {one["account"]: int(one["cumulative"]) for one in listed["earners"]} == accounts.earned
    seen = view.overview(settled.log.log_id.hex())
    kept_back = int(seen["settled"]) - sum(accounts.earned.values())
    assert 0 <= kept_back < len(accounts.earned)  # less than a unit of each account
    french = view.earners(FRENCH_OWNER[2:12].upper(), 0, 10)["earners"]
    assert [(one["claimed"], int(one["cumulative"]) - int(one["pending"])) for one in french] == [("1000", claimed)]
    assert int(french[0]["cumulative"]) > int(view.earner(PLATFORM)["cumulative"])


def test_epochs_tell_what_became_of_them_and_what_was_void(settled: Settled, tmp_path: Path) -> None:
    epochs = view_of(settled, accounts_of(settled, tmp_path)).epochs()["epochs"]
    assert [(one["number"], one["state"]) for one in epochs] == [(3, "pending"), (2, "vetoed"), (1, "accepted")]
    parts = [(one["from"], one["to"], one["voids"]) for epoch in epochs for one in epoch["allocations"]]
    assert parts == [(10, 16, {"signature": 5}), (10, 16, {"signature": 5}), (0, 10, {"status": 1})]


def test_voids_stay_known_when_an_epoch_is_behind_the_kept_prefix(settled: Settled, tmp_path: Path) -> None:
    accountant = Accountant(tmp_path)
    for _ in range(2):
        ranges = summarise(settled.facts.events).ranges
        accounts = accountant.compute(settled.facts, [settled.log], ranges)
        settled.chain.accept(proposed(settled.chain, settled.log))
        settled.log.serve(model(BASE, BASE_OWNER))
        settled.log.anchor()
    assert set(accounts.voids) == {(settled.log.log_id.hex(), 0, 10), (settled.log.log_id.hex(), 10, 16)}
    assert accounts.agrees


def test_amounts_that_do_not_give_the_accepted_root_are_not_passed_off_as_right(
    settled: Settled, tmp_path: Path
) -> None:
    events = [
        one
        if one.name != "Accepted"
        else ChainEvent(one.block, one.index, one.contract, one.name, {**one.args, "root": b"\7" * 32})
        for one in settled.chain.events
    ]
    settled.chain.events[:] = events
    accounts = accounts_of(settled, tmp_path)
    assert not accounts.agrees
    assert view_of(settled, accounts).earners("", 0, 10)["agrees"] is False


def test_without_the_settled_log_only_claims_are_known(settled: Settled, tmp_path: Path) -> None:
    settled.chain.emit("RewardDistributor", "Claimed", account=PLATFORM, amount=7, cumulative=7)
    with pytest.raises(InvalidArgument):
        Accountant(tmp_path).compute(settled.facts, [], [])
    (only,) = view_of(settled, None, "why").earners("", 0, 10)["earners"]
    assert only == {"account": PLATFORM, "cumulative": None, "claimed": "7", "pending": None}


def test_api(settled: Settled, tmp_path: Path) -> None:
    with TestClient(create_app(tmp_path, view_of(settled, accounts_of(settled, tmp_path / "kept")))) as client:
        assert client.get("/api/overview").json()["chain"]["state"] == "ready"
        assert client.get("/api/epochs").json()["count"] == 3
        assert len(client.get(f"/api/earners/{PLATFORM}").json()["proof"]) >= 1
        assert client.get("/api/earners/0x00").status_code == 400
