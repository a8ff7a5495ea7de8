"""Which adapters in the cache somebody needs now: the quota evicts none of them.

A lease is a shared lock on one byte of a file, at the place that the digest says. So it can be taken before the bytes
are there, and it ends with the process that holds it, however that ends.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LEASES_FILE = ".leases"  # below the cache
PLACE_DIGITS = 15  # of a digest: a place in a file has 63 bits


class Leases:
    """Those of this process. One a process and cache: the locks are the process's, and go when it closes the file."""

    def __init__(self, cache: Path) -> None:
        self._file = _open(cache)
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()

    def take(self, digest: str) -> None:
        """Keep `digest` from being evicted, from now on; waits for the moment in which it is leaving."""
        with self._lock:
            self._held[digest] += 1
            if self._held[digest] == 1:
                fcntl.lockf(self._file, fcntl.LOCK_SH, 1, _place(digest))

    def give_back(self, digest: str) -> None:
        with self._lock:
            self._held[digest] -= 1
            if not self._held[digest]:
                del self._held[digest]
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _place(digest))


@contextmanager
def unleased(cache: Path, digest: str) -> Iterator[bool]:
    """Whether no other process has a lease on `digest`; if none has, none gets one before the body ends."""
    file = _open(cache)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _place(digest))
    except (BlockingIOError, PermissionError):  # POSIX allows both
        yield False
    else:
        yield True
    finally:
        os.close(file)


def _open(cache: Path) -> int:
    return os.open(cache / LEASES_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _place(digest: str) -> int:
    return int(digest[:PLACE_DIGITS], 16)
