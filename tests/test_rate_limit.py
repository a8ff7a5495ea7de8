"""Token buckets: never more than a minute's worth and what has flowed in since, and a hint that is right."""

from __future__ import annotations

import pytest
from access_cases import SetClock
from hypothesis import given
from hypothesis import strategies as st

from openlora.errors import QuotaExceeded, from_message
from openlora.serving.access.rate_limit import SWEEP_ABOVE, RateLimiter


def taken(limiter: RateLimiter, *accounts: tuple[str, int | None]) -> bool:
    try:
        limiter.take(accounts)
    except QuotaExceeded:
        return False
    return True


@given(st.integers(1, 50), st.lists(st.floats(0, 30), min_size=1, max_size=200))
def test_every_window_holds_at_most_a_burst_and_the_flow(limit: int, waits: list[float]) -> None:
    clock, times = SetClock(0.0), []
    limiter = RateLimiter(clock)
    for wait in waits:
        clock.now += wait
        if taken(limiter, ("caller:a", limit)):
            times.append(clock.now)
    for first, begin in enumerate(times):
        for last in range(first, len(times)):
            assert last - first + 1 <= limit + (times[last] - begin) * limit / 60 + 1e-6


@given(st.integers(1, 1000))
def test_after_the_hint_there_is_room_and_before_there_is_none(limit: int) -> None:
    clock = SetClock(0.0)
    limiter = RateLimiter(clock)
    for _ in range(limit):
        limiter.take([("caller:a", limit)])
    with pytest.raises(QuotaExceeded) as caught:
        limiter.take([("caller:a", limit)])
    hint = caught.value.retry_after_ms
    clock.now += (hint - 2) / 1000
    assert not taken(limiter, ("caller:a", limit))
    clock.now += 0.003
    assert taken(limiter, ("caller:a", limit))


def test_all_accounts_or_none() -> None:
    limiter = RateLimiter(SetClock(0.0))
    assert taken(limiter, ("adapter:x", 1))
    for _ in range(5):
        assert not taken(limiter, ("caller:a", 3), ("adapter:x", 1))
    assert [taken(limiter, ("caller:a", 3)) for _ in range(4)] == [True, True, True, False]


def test_nothing_and_no_limit() -> None:
    limiter = RateLimiter(SetClock(0.0))
    assert all(taken(limiter, ("caller:a", None)) for _ in range(1000))
    with pytest.raises(QuotaExceeded) as caught:
        limiter.take([("caller:a", 0)])
    assert str(caught.value) == "[QUOTA_EXCEEDED] caller 'a': at most 0 requests a minute"


@pytest.mark.parametrize(("before", "after", "left"), [(10, 5, 2), (5, 10, 7), (10, 2, 0), (10, 0, 0)])
def test_a_limit_that_changes_forgets_nothing(before: int, after: int, left: int) -> None:
    limiter = RateLimiter(SetClock(0.0))
    for _ in range(3):
        limiter.take([("caller:a", before)])
    got = sum(taken(limiter, ("caller:a", after)) for _ in range(20))
    assert got == left


def test_the_words_come_back_typed() -> None:
    limiter = RateLimiter(SetClock(0.0))
    limiter.take([("adapter:x", 1)])
    with pytest.raises(QuotaExceeded) as caught:
        limiter.take([("adapter:x", 1)])
    assert str(caught.value) == "[QUOTA_EXCEEDED] adapter 'x': at most 1 requests a minute retry_after_ms=60000"
    again = from_message(f"in ensemble 'openlora', {caught.value}")
    assert (type(again), again.retry_after_ms, again.http_status) == (QuotaExceeded, 60000, 429)


def test_what_is_full_again_is_forgotten_and_what_is_not_stays() -> None:
    clock = SetClock(0.0)
    limiter = RateLimiter(clock)
    for number in range(SWEEP_ABOVE):
        limiter.take([(f"caller:{number}", 1)])
    clock.now += 59
    limiter.take([("caller:last", 2)])
    assert not taken(limiter, ("caller:5", 1))
    clock.now += 1
    taken(limiter, ("caller:another", 1))
    assert len(limiter._buckets) < 10
    assert not taken(limiter, ("caller:last", 1))
