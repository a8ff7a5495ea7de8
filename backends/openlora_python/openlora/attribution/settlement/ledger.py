"""Who has earned what: N(account) = Σ price · share over paid receipts, in 10^-9 of the token's smallest unit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate

from .chain_state import LogState
from .judge import Verdict
from .shares import WHOLE_SHARE, Shares


@dataclass
class Tally:
    """The sums over the first receipts of a log. `owed` is N by account (20 bytes); prices as they stand there."""

    owed: Counter[bytes] = field(default_factory=Counter)
    paid: int = 0
    paid_receipts: int = 0
    void_receipts: Counter[str] = field(default_factory=Counter)
    void_price: Counter[str] = field(default_factory=Counter)

    def copy(self) -> Tally:
        return Tally(self.owed.copy(), self.paid, self.paid_receipts, self.void_receipts.copy(), self.void_price.copy())

    def add(self, other: Tally) -> None:
        self.owed.update(other.owed)
        self.paid += other.paid
        self.paid_receipts += other.paid_receipts
        self.void_receipts.update(other.void_receipts)
        self.void_price.update(other.void_price)


def cumulative(tally: Tally) -> dict[bytes, int]:
    """What each account has earned so far, in the token's smallest unit: N // 10^9, where that is above zero."""
    return {who: amount for who, owed in sorted(tally.owed.items()) if (amount := owed // WHOLE_SHARE) > 0}


class JudgedLog:
    """A log up to its last good anchor: the sums over a prefix, and the verdicts behind it."""

    def __init__(self, log: LogState, start: int, before: Tally, good_size: int, fault: str | None) -> None:
        self.log = log
        self.start = start
        self.good_size = good_size
        self.fault = fault
        self.shares: list[Shares] = []
        self.request_ids: list[bytes | None] = []
        self._before = before
        self._prices: list[int] = []
        self._share_numbers: list[int] = []
        self._void: dict[int, str] = {}
        self._paid_sums: list[int] | None = None

    def take(self, verdicts: Iterable[Verdict], shares: list[Shares]) -> None:
        """Add the verdicts on the next receipts; `shares` is the list that their numbers point into."""
        self.shares = shares
        for verdict in verdicts:
            if verdict.reason is not None:
                self._void[self.start + len(self._prices)] = verdict.reason
            self._prices.append(verdict.price)
            self._share_numbers.append(verdict.shares)
            self.request_ids.append(verdict.request_id)
        self._paid_sums = None

    @property
    def judged(self) -> int:
        """How far the verdicts go."""
        return self.start + len(self._prices)

    def paid(self, start: int, stop: int) -> int:
        """The sum of the paid prices of receipts [start, stop)."""
        sums = self._sums()
        return sums[stop - self.start] - sums[start - self.start]

    def paid_so_far(self) -> int:
        """The sum of all paid prices below the log's settled size, what was judged before among them."""
        return self._before.paid + self.paid(self.start, self.log.settled_size)

    def furthest(self, budget: int) -> int:
        """How far the next epoch can go from the settled size without paying more than `budget`."""
        sums = self._sums()
        stop = self.log.settled_size
        limit = sums[stop - self.start] + budget
        low, high = stop, self.good_size
        while low < high:  # the sums never fall
            middle = (low + high + 1) // 2
            low, high = (middle, high) if sums[middle - self.start] <= limit else (low, middle - 1)
        return low

    def price_at(self, index: int) -> int:
        return self._prices[index - self.start]

    def reason_at(self, index: int) -> str | None:
        """None: paid."""
        return self._void.get(index)

    def tally(self, size: int) -> Tally:
        """The sums over the first `size` receipts."""
        sums = self._before.copy()
        by_shares: Counter[int] = Counter()
        for index in range(self.start, size):
            reason, price = self._void.get(index), self.price_at(index)
            if reason is None:
                sums.paid += price
                sums.paid_receipts += 1
                by_shares[self._share_numbers[index - self.start]] += price
            else:
                sums.void_receipts[reason] += 1
                sums.void_price[reason] += price
        for number, price in by_shares.items():
            for who, share in self.shares[number].items():
                sums.owed[who] += price * share
        return sums

    def _sums(self) -> list[int]:
        if self._paid_sums is None:
            paid = (0 if self.start + at in self._void else price for at, price in enumerate(self._prices))
            self._paid_sums = list(accumulate(paid, initial=0))
        return self._paid_sums
