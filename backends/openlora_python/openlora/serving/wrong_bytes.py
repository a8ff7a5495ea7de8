"""Sources that hold other bytes than a version has: not downloaded again for every request that asks."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

FIRST_WAIT_SECONDS = 5.0  # before a source is read again; doubled each time …
LONGEST_WAIT_SECONDS = 3600.0  # … up to this
MOST_KEPT = 1024


@dataclass(frozen=True)
class _Finding:
    reason: str
    wait: float
    due: float


class WrongBytes:
    """What was found in whole downloads, by digest and source; of more than `MOST_KEPT` the oldest are forgotten."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._found: OrderedDict[tuple[str, str], _Finding] = OrderedDict()

    def reason(self, digest: str, source: str) -> str | None:
        """What was found there, while it is too early to look again."""
        finding = self._found.get((digest, source))
        return finding.reason if finding is not None and self._clock() < finding.due else None

    def note(self, digest: str, source: str, reason: str) -> None:
        """A download from there has just brought other bytes than those of `digest`."""
        before = self._found.pop((digest, source), None)
        wait = FIRST_WAIT_SECONDS if before is None else min(2 * before.wait, LONGEST_WAIT_SECONDS)
        self._found[digest, source] = _Finding(reason, wait, self._clock() + wait)
        if len(self._found) > MOST_KEPT:
            self._found.popitem(last=False)

    def forget(self, digest: str, source: str) -> None:
        """The right bytes came."""
        self._found.pop((digest, source), None)
