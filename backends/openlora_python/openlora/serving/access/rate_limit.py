"""Requests per minute, as token buckets in memory: a minute's worth at once, then one after the other."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock

from ...errors import QuotaExceeded

MINUTE = 60.0
SWEEP_ABOVE = 4096  # buckets; full ones are then forgotten, because a new one is full as well


@dataclass
class _Bucket:
    capacity: int  # requests
    level: float
    filled_at: float  # monotonic seconds

    def fill(self, now: float) -> None:
        self.level = min(self.capacity, self.level + (now - self.filled_at) * self.capacity / MINUTE)
        self.filled_at = now


class RateLimiter:
    """One bucket an account (`caller:NAME`, `adapter:NAME`). Thread-safe; a restart fills them all."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = Lock()
        self._buckets: dict[str, _Bucket] = {}

    def take(self, accounts: Sequence[tuple[str, int | None]]) -> None:
        """One request from each (account, requests per minute), or none from any; None = no limit.

        Raises:
            QuotaExceeded: one of them has none left; it says when it will.
        """
        with self._lock:
            now = self._clock()
            buckets = {name: self._bucket(name, limit, now) for name, limit in accounts if limit is not None}
            for name, bucket in buckets.items():
                if bucket.level < 1:
                    raise _refusal(name, bucket)
            for bucket in buckets.values():
                bucket.level -= 1
            if len(self._buckets) > SWEEP_ABOVE:
                self._sweep(now)

    def _bucket(self, name: str, limit: int, now: float) -> _Bucket:
        bucket = self._buckets.setdefault(name, _Bucket(limit, limit, now))
        bucket.fill(now)
        if bucket.capacity != limit:  # it was changed meanwhile: what was used stays used
            bucket.level = max(0.0, bucket.level + limit - bucket.capacity)
            bucket.capacity = limit
        return bucket

    def _sweep(self, now: float) -> None:
        for bucket in self._buckets.values():
            bucket.fill(now)
        self._buckets = {name: one for name, one in self._buckets.items() if one.level < one.capacity}


def _refusal(name: str, bucket: _Bucket) -> QuotaExceeded:
    kind, _, who = name.partition(":")
    words = f"{kind} {who!r}: at most {bucket.capacity} requests a minute"
    if bucket.capacity == 0:
        return QuotaExceeded(words)
    return QuotaExceeded(words, retry_after_ms=math.ceil((1 - bucket.level) * MINUTE * 1000 / bucket.capacity))
