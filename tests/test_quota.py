"""The quota ledger against a simple model, under threads, and over crashes: what is booked is what receipts say."""

from __future__ import annotations

import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from access_cases import SetClock
from attribution_cases import Acknowledgements, append_intent, commit_of, make_intent, request_id
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from openlora.attribution.frames import CompletionFrame, IntentFrame, Mark, Position, ProgressFrame, list_segments
from openlora.attribution.journal import Journal, JournalReader
from openlora.errors import QuotaExceeded, Unavailable
from openlora.serving.access.quota import DAY_SECONDS, LedgerState, QuotaLedger, day_of
from openlora.serving.access.quota_store import LedgerKeeper
from openlora.serving.ticket import Quota

LIMITS = {"caller:a": 100, "caller:b": 40, "adapter:x": 70, "adapter:y": None}
QUOTAS = {account: Quota(account, limit) for account, limit in LIMITS.items()}
accounts_of = st.lists(st.sampled_from(sorted(LIMITS)), min_size=1, max_size=3, unique=True)


class LedgerMachine(RuleBasedStateMachine):
    """The model: a list of bookings and one of running requests, added up anew each time."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = SetClock(DAY_SECONDS * 20_000.5)
        self.ledger = QuotaLedger(LedgerState(), self.clock)
        self.saved: dict[tuple[int, str], int] = {}
        self.booked: list[tuple[int, tuple[str, ...], int]] = []  # day, accounts, tokens
        self.running: dict[str, tuple[int, tuple[str, ...], int, int]] = {}  # day, accounts, in, max
        self.made = self.seq = 0

    def total(self, account: str, day: int) -> tuple[int, int]:
        booked = sum(tokens for on, accounts, tokens in self.booked if on >= day and account in accounts)
        held = [one for one in self.running.values() if one[0] >= day and account in one[1]]
        return booked, sum(in_tokens + max_tokens for _, _, in_tokens, max_tokens in held)

    @rule(accounts=accounts_of, in_tokens=st.integers(1, 30), max_tokens=st.integers(1, 30))
    def reserve(self, accounts: list[str], in_tokens: int, max_tokens: int) -> None:
        self.made += 1
        name, today = str(self.made), day_of(self.clock.now)
        fits = all(
            LIMITS[account] is None or sum(self.total(account, today)) + in_tokens + max_tokens <= LIMITS[account]
            for account in accounts
        )
        quotas = [QUOTAS[account] for account in accounts]
        if fits:
            held = self.ledger.reserve(name, quotas, in_tokens, max_tokens)
            assert (held.day, held.tokens) == (today, in_tokens + max_tokens)
            self.running[name] = (today, tuple(accounts), in_tokens, max_tokens)
        else:
            with pytest.raises(QuotaExceeded) as caught:
                self.ledger.reserve(name, quotas, in_tokens, max_tokens)
            assert caught.value.retry_after_ms is None or 0 < caught.value.retry_after_ms <= DAY_SECONDS * 1000

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        """Up to three end; their bookings may arrive in any order."""
        names = data.draw(st.lists(st.sampled_from(sorted(self.running)), min_size=1, max_size=3, unique=True))
        bookings = []
        for name in names:
            day, accounts, in_tokens, max_tokens = self.running.pop(name)
            out_tokens = data.draw(st.integers(0, max_tokens))
            self.booked.append((day, accounts, in_tokens + out_tokens))
            bookings.append((self.seq, name, out_tokens))
            self.seq += 1
        for booking in data.draw(st.permutations(bookings)):
            self.ledger.book(*booking)
        assert not self.ledger.behind

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def refund(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.running)))
        del self.running[name]
        self.ledger.refund(name)
        self.ledger.refund(name)

    @rule(seconds=st.integers(-2 * DAY_SECONDS, 2 * DAY_SECONDS))
    def clock_is_set(self, seconds: int) -> None:
        self.clock.now += seconds

    @rule(lost=st.booleans())
    def save(self, lost: bool) -> None:
        """Snapshots hold changes; a lost one is in the next. What they add up to is the ledger after a restart."""
        state = self.ledger.snapshot()
        if state is not None and lost:
            self.ledger.not_saved(state)
            state = self.ledger.snapshot()
            assert state is not None
        if state is not None:
            self.saved |= state.used
            assert (state.next_seq, set(state.reserved)) == (self.seq, set(self.running))
        assert {place: tokens for place, tokens in self.saved.items() if tokens} == self.own_use()

    def own_use(self) -> dict[tuple[int, str], int]:
        own: dict[tuple[int, str], int] = {}
        for day, accounts, tokens in self.booked:
            for account in accounts:
                own[day, account] = own.get((day, account), 0) + tokens
        return own

    @invariant()
    def totals_are_the_models(self) -> None:
        today = day_of(self.clock.now)
        for account in LIMITS:
            for day in (today - 1, today, today + 1):
                assert self.ledger.taken(account, day) == self.total(account, day)

    @invariant()
    def no_day_is_over_its_quota(self) -> None:
        own = self.own_use()
        for day, accounts, in_tokens, max_tokens in self.running.values():
            for account in accounts:
                own[day, account] = own.get((day, account), 0) + in_tokens + max_tokens
        assert all(LIMITS[account] is None or tokens <= LIMITS[account] for (_, account), tokens in own.items())


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=150, stateful_step_count=40)


def test_many_threads_never_exceed_a_quota_and_use_it_up() -> None:
    """Each request takes all that it reserves, so exactly quota // tokens of them are granted, in any order."""
    clock = SetClock()
    ledger, today = QuotaLedger(LedgerState(), clock), day_of(clock.now)
    quotas = [Quota("caller:a", 10_007), Quota("adapter:x", None)]
    numbers = iter(range(10**6))
    lock = threading.Lock()
    granted, over = [], []
    done = threading.Event()

    def work(worker: int) -> None:
        draw = random.Random(worker)
        for turn in range(200):
            name = f"{worker}-{turn}"
            try:
                ledger.reserve(name, quotas, 4, 6)
            except QuotaExceeded:
                continue
            if draw.random() < 0.3:
                ledger.refund(name)
                continue
            with lock:  # the journal's one thread
                ledger.book(next(numbers), name, 6)
                granted.append(name)

    def watch() -> None:
        while not done.is_set():
            used, held = ledger.taken("caller:a", today)
            if used + held > 10_007:
                over.append((used, held))

    watcher = threading.Thread(target=watch)
    watcher.start()
    workers = [threading.Thread(target=work, args=(number,)) for number in range(32)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    done.set()
    watcher.join()
    assert over == []
    assert len(granted) == 1000
    assert ledger.taken("caller:a", today) == ledger.taken("adapter:x", today) == (10_000, 0)
    ledger.reserve("last", quotas, 4, 3)
    with pytest.raises(QuotaExceeded):
        ledger.reserve("one more", quotas, 1, 0)


def test_hints() -> None:
    clock = SetClock(DAY_SECONDS * 20_000 + 3600)
    ledger, quota = QuotaLedger(LedgerState(), clock), [Quota("caller:a", 100)]
    with pytest.raises(QuotaExceeded) as caught:
        ledger.reserve("1", quota, 50, 51)
    assert str(caught.value) == "[QUOTA_EXCEEDED] caller 'a': 100 tokens a day do not leave 101 for this request"
    ledger.reserve("1", quota, 50, 50)
    with pytest.raises(QuotaExceeded) as caught:
        ledger.reserve("2", quota, 5, 5)
    assert str(caught.value).endswith(" do not leave 10 for this request retry_after_ms=1000")
    ledger.book(0, "1", 45)
    with pytest.raises(QuotaExceeded) as caught:
        ledger.reserve("2", quota, 5, 5)
    assert caught.value.retry_after_ms == 23 * 3600 * 1000
    clock.now += 23 * 3600
    ledger.reserve("2", quota, 5, 5)


def test_a_booking_that_nothing_was_reserved_for_closes_the_ledger() -> None:
    ledger = QuotaLedger(LedgerState(), SetClock())
    ledger.book(0, "nobody", 5)
    with pytest.raises(Unavailable, match="belongs to no reservation"):
        ledger.reserve("1", [Quota("caller:a", 100)], 1, 1)
    ledger.reserve("2", [Quota("caller:a", None)], 1, 1)  # what has no quota goes on


# --- on disk, with the journal ----------------------------------------------------------------------------------------


class Node:
    """A ledger and its journal as the generation step keeps them; `crash` leaves only what is on disk."""

    def __init__(self, root: Path, clock: Callable[[], float] = time.monotonic, **journal: int) -> None:
        self.root = root
        self.keeper = LedgerKeeper(root / "quota.sqlite", root / "journal", clock)
        self.journal = Journal.open(root / "journal", **journal)
        self.ledger = self.keeper.open()

    def begin(self, number: int, accounts: tuple[str, ...], in_tokens: int, max_tokens: int = 50) -> None:
        quotas = [Quota(account, None) for account in accounts]
        held = self.ledger.reserve(request_id(number), quotas, in_tokens, max_tokens)
        self._acknowledged(
            lambda one: self.journal.append(
                [make_intent(number, in_tokens=in_tokens, started_at=held.started_at, accounts=accounts)],
                one.on_durable,
                one.on_error,
            )
        )

    def send(self, number: int, tokens: int) -> None:
        self.journal.append_progress([ProgressFrame(request_id(number), tokens, commit_of(number, "x"))])

    def end(self, number: int, out_tokens: int) -> None:
        def append(one: Acknowledgements) -> None:
            def durable(seq: int) -> None:
                self.ledger.book(seq, request_id(number), out_tokens)
                one.on_durable(seq)

            self.journal.append_completion(
                request_id(number), 1, out_tokens, commit_of(number, "x"), 2_000_000_000, durable, one.on_error
            )

        self._acknowledged(append)

    def crash(self, place: Path) -> Path:
        """The disk at this moment, in another place; what is here goes on and is of no interest."""
        shutil.copytree(self.root, place)
        self.journal.close()
        return place

    def used(self) -> dict[str, int]:
        today = day_of(time.time())
        found = {account: self.ledger.taken(account, today - 1) for account in LIMITS}
        assert all(held == 0 for _, held in found.values())
        return {account: used for account, (used, _) in found.items() if used}

    @staticmethod
    def _acknowledged(append: Callable[[Acknowledgements], None]) -> None:
        acknowledged = Acknowledgements()
        append(acknowledged)
        acknowledged.wait()
        assert acknowledged.errors == []


def receipts_say(root: Path) -> dict[str, int]:
    """What the journal's completions add up to, as receipts do."""
    intents: dict[str, IntentFrame] = {}
    used: dict[str, int] = {}
    for frame, _, _ in JournalReader(root / "journal").read():
        if isinstance(frame, IntentFrame):
            intents[frame.request_id] = frame
        elif isinstance(frame, CompletionFrame):
            intent = intents[frame.request_id]
            for account in intent.accounts:
                used[account] = used.get(account, 0) + intent.in_tokens + frame.out_tokens
    return used


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_after_any_crash_the_ledger_is_what_receipts_say(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("ledger")
    node, running, number = Node(root / "0"), [], 0
    actions = st.sampled_from(["begin", "begin", "end", "end", "send", "save", "crash"])
    for turn, action in enumerate(data.draw(st.lists(actions, max_size=25))):
        if action == "begin":
            number += 1
            node.begin(number, tuple(data.draw(accounts_of)), data.draw(st.integers(1, 40)))
            running.append(number)
        elif action == "save":
            node.keeper.save()
        elif action == "crash":
            node = Node(node.crash(root / str(turn + 1)))
            running = []
            assert node.used() == receipts_say(node.root)
        elif running and action == "end":
            node.end(running.pop(data.draw(st.integers(0, len(running) - 1))), data.draw(st.integers(0, 50)))
        elif running:
            node.send(running[0], data.draw(st.integers(1, 50)))
    node = Node(node.crash(root / "last"))
    assert node.used() == receipts_say(node.root)
    node.journal.close()


def test_a_crash_books_what_was_sent(tmp_path: Path) -> None:
    node = Node(tmp_path / "a")
    node.begin(1, ("caller:a",), in_tokens=7)
    node.begin(2, ("caller:a",), in_tokens=5)
    node.send(1, 3)
    node.keeper.save()  # with both of them running
    again = Node(node.crash(tmp_path / "b"))
    assert again.used() == {"caller:a": 7 + 3 + 5}
    again.journal.close()


def _erase_all_but_the_last(root: Path) -> None:
    """What the journal does once segments are in the receipt log and two minutes old."""
    newest = list_segments(root / "journal")[-1]
    Mark(root / "journal", "projected").publish(Position(newest, 0))
    with Journal.open(root / "journal", retain_seconds=-1):
        pass


def test_what_was_saved_does_not_need_the_journal(tmp_path: Path) -> None:
    node = Node(tmp_path / "a", segment_bytes=3000)
    for number in range(20):
        node.begin(number, ("caller:a", "adapter:x"), in_tokens=3)
        if number != 5:
            node.end(number, 2)
    node.keeper.save()
    root = node.crash(tmp_path / "b")
    assert len(list_segments(root / "journal")) > 3
    _erase_all_but_the_last(root)
    again = Node(root)
    assert again.used() == {"caller:a": 19 * 5 + 3, "adapter:x": 19 * 5 + 3}  # 5 was aborted: its prompt
    again.ledger.reserve("new", [Quota("caller:a", 98 + 10)], 4, 6)
    again.journal.close()


def test_opening_a_journal_erases_nothing_that_the_ledger_has_not_read(tmp_path: Path) -> None:
    node = Node(tmp_path / "a", segment_bytes=3000)
    for number in range(20):
        node.begin(number, ("caller:a",), in_tokens=3)
        node.end(number, 2)
    root = node.crash(tmp_path / "b")
    Mark(root / "journal", "projected").publish(Position(list_segments(root / "journal")[-1], 0))
    again = Node(root, retain_seconds=-1)
    assert list_segments(root / "journal")[0] > 0
    assert again.used() == {"caller:a": 100}
    again.journal.close()


@pytest.mark.parametrize("loss", ["the file", "its rows"])
def test_a_ledger_that_lost_completions_grants_no_quota_until_midnight(tmp_path: Path, loss: str) -> None:
    node = Node(tmp_path / "a", segment_bytes=3000)
    for number in range(20):
        node.begin(number, ("caller:a",), in_tokens=3)
        node.end(number, 2)
    node.keeper.close()
    root = node.crash(tmp_path / "b")
    _erase_all_but_the_last(root)
    if loss == "the file":
        for file in root.glob("quota.sqlite*"):
            file.unlink()
    else:
        with sqlite3.connect(root / "quota.sqlite") as connection:
            connection.execute("DELETE FROM ledger")
    for _ in range(2):  # and it remembers that over a restart
        again = Node(root)
        with pytest.raises(Unavailable, match="the quota ledger was lost"):
            again.ledger.reserve("new", [Quota("caller:b", 10**6)], 1, 1)
        again.ledger.reserve("free", [Quota("caller:b", None)], 1, 1)
        again.keeper.close()
        again.journal.close()


def test_a_damaged_file_grants_no_quota_and_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "quota.sqlite"
    path.write_bytes(b"this is not a database" * 100)
    before = path.read_bytes()
    node = Node(tmp_path / "a")
    with pytest.raises(Unavailable, match="quota.sqlite is damaged; remove it while the server is stopped"):
        node.ledger.reserve("new", [Quota("caller:a", 10)], 1, 1)
    node.begin(1, ("caller:a",), in_tokens=3)
    node.end(1, 2)
    node.keeper.close()
    assert path.read_bytes() == before
    root = node.crash(tmp_path / "b")
    (root / "quota.sqlite").unlink()
    assert Node(root).used() == {"caller:a": 5}  # the journal had all of it


def test_a_ledger_that_can_not_be_saved_closes_after_a_while(tmp_path: Path) -> None:
    clock = SetClock()
    node = Node(tmp_path / "a", clock)
    node.begin(1, ("caller:a",), in_tokens=3)
    (tmp_path / "a" / "quota.sqlite").mkdir()
    node.keeper.save()
    node.ledger.reserve("soon", [Quota("caller:a", 100)], 1, 1)
    clock.now += 61
    node.keeper.save()
    with pytest.raises(Unavailable, match="can't be saved"):
        node.ledger.reserve("late", [Quota("caller:a", 100)], 1, 1)
    (tmp_path / "a" / "quota.sqlite").rmdir()
    node.keeper.save()
    node.ledger.reserve("late", [Quota("caller:a", 100)], 1, 1)
    node.end(1, 2)
    assert Node(node.crash(tmp_path / "b")).used() == {"caller:a": 5}


def test_journals_from_before_the_ledger_have_no_accounts(tmp_path: Path) -> None:
    with Journal.open(tmp_path / "journal") as journal:
        append_intent(journal, 1)
    node = Node(tmp_path)
    assert node.used() == {}
    node.ledger.reserve("new", [Quota("caller:a", 10)], 1, 1)
    node.journal.close()
