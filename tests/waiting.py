"""Waiting for an outcome, however long a busy machine takes for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

SECONDS = 60.0
LOOK_SECONDS = 0.05

Found = TypeVar("Found")


def wait_for(
    what: str, look: Callable[[], Found | None], seconds: float = SECONDS, words: Callable[[], object] = str
) -> Found:
    """What `look` finds that is true, looking again and again; fails with `what` and `words` after a while."""
    until = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < until, f"no {what} after {seconds:.0f} s: {words()}"
        time.sleep(LOOK_SECONDS)
    return found
