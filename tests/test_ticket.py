"""Tickets and seals: single-use, expiring, bound to one text, one purpose and one run of the server."""

from __future__ import annotations

import stat
import time
from pathlib import Path

import pytest
from msgspec.structs import replace

from openlora.engine.api import AdapterUse, Sampling
from openlora.errors import NotAuthenticated
from openlora.serving.chunk import Chunk, open_chunk, seal_chunk
from openlora.serving.seal import Seal, write_run_key
from openlora.serving.ticket import LIFETIME_SECONDS, TextOptions, Ticket, TicketOffice, text_digest

TEXT = b"Tell me about the cat."


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "run.key"
    write_run_key(path)
    return path


@pytest.fixture
def office(key: Path) -> TicketOffice:
    return TicketOffice(Seal(key, "ticket"))


def ticket(number: int = 0, **changes: object) -> Ticket:
    made = Ticket(
        kind="generate",
        request_id=f"{number:064x}",
        label="mine",
        caller="alice",
        expires_at=time.time() + LIFETIME_SECONDS,
        text_sha256=text_digest(TEXT),
        stream=True,
        adapters=(AdapterUse("ab" * 32, "/cache/ab", -250_000),),
        sampling=Sampling(seed=2**64 - 1, temperature=0.1, stop_token_ids=(5,), bad_words=((1, 2),)),
        text=TextOptions(stop=("\u0000é",), echo=True),
        terms={"base": {"price": 3}},
    )
    return replace(made, **changes)


def refusal(office: TicketOffice, sealed: bytes, text: bytes = TEXT) -> str:
    with pytest.raises(NotAuthenticated) as caught:
        office.redeem(sealed, text)
    return str(caught.value)


def test_a_ticket_comes_back_as_it_was_issued_once(office: TicketOffice) -> None:
    made = ticket()
    sealed = office.issue(made)
    assert office.redeem(sealed, TEXT) == made
    assert refusal(office, sealed) == "[NOT_AUTHENTICATED] the ticket was used before: call the ensemble `openlora`"


def test_another_text(office: TicketOffice) -> None:
    sealed = office.issue(ticket())
    words = "[NOT_AUTHENTICATED] the ticket was made for another text: call the ensemble `openlora`"
    assert refusal(office, sealed, TEXT + b" ") == words
    assert refusal(office, sealed, b"") == words
    assert office.redeem(sealed, TEXT).caller == "alice"  # a refused try does not use it up


def test_expired(office: TicketOffice) -> None:
    sealed = office.issue(ticket(expires_at=time.time() - 0.001))
    assert refusal(office, sealed) == "[NOT_AUTHENTICATED] the ticket has expired: call the ensemble `openlora`"


@pytest.mark.parametrize("position", [0, 31, 63, 64, 100, -1])
def test_one_changed_byte(office: TicketOffice, position: int) -> None:
    sealed = bytearray(office.issue(ticket()))
    sealed[position] ^= 1
    words = "[NOT_AUTHENTICATED] this ticket was not made by this server: call the ensemble `openlora`"
    assert refusal(office, bytes(sealed)) == words


@pytest.mark.parametrize("garbage", [b"", b"x", b"0" * 64, b"\xff" * 200, b"{}", b"0" * 64 + b"{}"])
def test_garbage(office: TicketOffice, garbage: bytes) -> None:
    assert "not made by this server" in refusal(office, garbage)


def test_a_longer_or_shorter_one(office: TicketOffice) -> None:
    sealed = office.issue(ticket())
    assert "not made by this server" in refusal(office, sealed + b" ")
    assert "not made by this server" in refusal(office, sealed[:-1])


def test_a_seal_is_good_for_its_purpose_and_its_run_only(key: Path, tmp_path: Path) -> None:
    payload = b'{"kind":"generate"}'
    for purpose in ("ticket", "usage", "control"):
        for other in {"ticket", "usage", "control"} - {purpose}:
            with pytest.raises(NotAuthenticated, match=f"this {other} was not made by this server"):
                Seal(key, other).open(Seal(key, purpose).close(payload))
    sealed = Seal(key, "usage").close(payload)
    assert Seal(key, "usage").open(sealed) == payload
    before = key.read_bytes()
    write_run_key(key)
    assert key.read_bytes() != before
    assert len(key.read_bytes()) == 32
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    with pytest.raises(NotAuthenticated):
        Seal(key, "usage").open(sealed)


def test_a_chunk_is_no_ticket(office: TicketOffice, key: Path) -> None:
    chunk = Chunk("last", "ab" * 32, 3, text="é\0", token_ids=(1, 2), num_input_tokens=7, seq=9)
    sealed = seal_chunk(Seal(key, "usage"), chunk)
    assert open_chunk(Seal(key, "usage"), sealed) == chunk
    assert "this ticket was not made" in refusal(office, sealed)
    with pytest.raises(NotAuthenticated, match="this usage was not made"):
        open_chunk(Seal(key, "usage"), office.issue(ticket()))


def test_only_tickets_that_could_come_again_are_remembered(
    office: TicketOffice, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr("openlora.serving.ticket.time.time", lambda: now)
    for number in range(50):
        now += 1.0
        sealed = office.issue(ticket(number, expires_at=now + LIFETIME_SECONDS))
        office.redeem(sealed, TEXT)
        assert "used before" in refusal(office, sealed)
        assert len(office._redeemed) <= LIFETIME_SECONDS + 1
