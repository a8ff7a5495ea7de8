"""The quota ledger: tokens that each account has used and reserved, by UTC day. Exact, whatever runs at once.

A request reserves what it can take at most (prompt + max_tokens) on every one of its accounts, all or none. Its end
books what it took: exactly the tokens of its receipt. What counts against a day's quota is the use of that day *and of
later ones*, so that a clock that is set back grants nothing again.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock

from ...errors import QuotaExceeded, Unavailable
from ..ticket import Quota

DAY_SECONDS = 86_400
KEPT_DAYS = 32  # how far back a clock may be set without forgetting what was used
BUSY_RETRY_MS = 1000

log = logging.getLogger(__name__)


def day_of(seconds: float) -> int:
    """Days since 1970-01-01, UTC."""
    return int(seconds) // DAY_SECONDS


@dataclass(frozen=True)
class Reservation:
    """What a running request holds."""

    started_at: int  # seconds since 1970: its day is the one that it is booked on
    accounts: tuple[str, ...]
    in_tokens: int
    max_tokens: int

    @property
    def day(self) -> int:
        return day_of(self.started_at)

    @property
    def tokens(self) -> int:
        return self.in_tokens + self.max_tokens


@dataclass
class LedgerState:
    """What the ledger is at one moment between two completions of the journal."""

    unknown_until: int = 0  # what was used on days before this one is not known whole
    next_seq: int = 0  # every completion of the journal below this one is booked, and none from it on
    used: dict[tuple[int, str], int] = field(default_factory=dict)  # (day, account) → tokens
    reserved: dict[str, Reservation] = field(default_factory=dict)  # by request id


class QuotaLedger:
    """Thread-safe. Reservations come from the generation step, bookings from the journal's thread in its order."""

    def __init__(self, state: LedgerState, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = Lock()
        self._unknown_until = state.unknown_until
        self._next_seq = state.next_seq
        self._ahead: set[int] = set()  # booked before one with a smaller number
        self._used: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for (day, account), tokens in state.used.items():
            self._used[day][account] = tokens
        self._unsaved_places = set(state.used)
        self._held: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self._reservations: dict[str, Reservation] = {}
        self._changed = True
        self.fault = ""  # why nothing with a quota is granted for good, if so
        self.unsaved = False  # its keeper could not save it for too long

    def reserve(self, request_id: str, quotas: Sequence[Quota], in_tokens: int, max_tokens: int) -> Reservation:
        """Hold `in_tokens + max_tokens` on every account of `quotas`.

        Raises:
            QuotaExceeded: one of them has not that much left for today; nothing is held.
            Unavailable: there is a quota, and what was used is not known.
        """
        now = self._clock()
        reservation = Reservation(int(now), tuple(quota.account for quota in quotas), in_tokens, max_tokens)
        limited = [quota for quota in quotas if quota.tokens_per_day is not None]
        with self._lock:
            if limited and self.fault:
                raise Unavailable(f"the quota ledger: {self.fault}")
            if limited and self.unsaved:
                raise Unavailable("the quota ledger can't be saved", retry_after_ms=BUSY_RETRY_MS)
            if limited and reservation.day < self._unknown_until:
                raise Unavailable(
                    "the quota ledger was lost: what was used today is not known, wait until midnight UTC"
                )
            for quota in limited:
                self._check(quota, reservation, now)
            self._reservations[request_id] = reservation
            for account in reservation.accounts:
                self._held[reservation.day][account] += reservation.tokens
            self._changed = True
        return reservation

    def refund(self, request_id: str) -> None:
        """Let go of a reservation whose request is not in the journal; an id without one is ignored."""
        with self._lock:
            self._release(request_id)

    def book(self, seq: int, request_id: str, out_tokens: int) -> None:
        """Completion `seq` of the journal: this request took its prompt and `out_tokens`. Never raises."""
        with self._lock:
            reservation = self._release(request_id)
            if reservation is None:
                self.fault = f"completion {seq} belongs to no reservation"
                log.error("quota ledger: %s", self.fault)
            else:
                for account in reservation.accounts:
                    self._used[reservation.day][account] += reservation.in_tokens + out_tokens
                    self._unsaved_places.add((reservation.day, account))
            self._ahead.add(seq)
            while self._next_seq in self._ahead:
                self._ahead.remove(self._next_seq)
                self._next_seq += 1

    def taken(self, account: str, day: int) -> tuple[int, int]:
        """Tokens that count against the quota of `day`: (booked, reserved), on it or later."""
        with self._lock:
            return _from_day_on(self._used, account, day), _from_day_on(self._held, account, day)

    @property
    def behind(self) -> bool:
        """A completion with a smaller number than one that is booked is still on its way."""
        return bool(self._ahead)

    def snapshot(self) -> LedgerState | None:
        """What has changed since the last one, `used` only where it did; None = nothing, or the ledger is behind."""
        with self._lock:
            if not self._changed or self._ahead:
                return None
            oldest = day_of(self._clock()) - KEPT_DAYS
            for day in [day for day in self._used if day < oldest]:
                del self._used[day]
            places = [(day, name) for day, name in self._unsaved_places if day >= oldest]
            used = {(day, name): self._used[day][name] for day, name in places}
            self._changed = False
            self._unsaved_places = set()
            return LedgerState(self._unknown_until, self._next_seq, used, dict(self._reservations))

    def not_saved(self, state: LedgerState) -> None:
        """A snapshot did not get to the disk: the next one has what it had."""
        with self._lock:
            self._changed = True
            self._unsaved_places.update(state.used)

    def _check(self, quota: Quota, reservation: Reservation, now: float) -> None:
        limit = quota.tokens_per_day
        used = _from_day_on(self._used, quota.account, reservation.day)
        held = _from_day_on(self._held, quota.account, reservation.day)
        if used + held + reservation.tokens <= limit:
            return
        kind, _, who = quota.account.partition(":")
        words = f"{kind} {who!r}: {limit} tokens a day do not leave {reservation.tokens} for this request"
        if reservation.tokens > limit:
            raise QuotaExceeded(words)  # waiting would not help
        fits_later = used + reservation.tokens <= limit  # when what runs now gives back what it does not take
        midnight = (reservation.day + 1) * DAY_SECONDS
        raise QuotaExceeded(
            words, retry_after_ms=BUSY_RETRY_MS if fits_later else max(1, round((midnight - now) * 1000))
        )

    def _release(self, request_id: str) -> Reservation | None:
        reservation = self._reservations.pop(request_id, None)
        if reservation is not None:
            self._changed = True
            held = self._held[reservation.day]
            for account in reservation.accounts:
                held[account] -= reservation.tokens
                if not held[account]:
                    del held[account]
            if not held:
                del self._held[reservation.day]
        return reservation


def _from_day_on(days: dict[int, dict[str, int]], account: str, first: int) -> int:
    return sum(accounts.get(account, 0) for day, accounts in days.items() if day >= first)
