"""Which adapters in the cache somebody needs now: the quota evicts none of them.

A lease is a shared lock on one byte of a file, at the place that the digest says. So it can be taken before the bytes
are there, and it ends with the process that holds it, however that ends.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

LEASES_FILE = ".leases"  # below the cache
PLACE_DIGITS = 15  # of a digest: a place in a file has 63 bits
FLOCK = struct.Struct("hhqqi4x")  # type, whence, start, length, pid of `struct flock` on 64-bit Linux


class Leases:
    """Those of one holder. Thread-safe."""

    def __init__(self, cache: Path) -> None:
        self._file = _open(cache)
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()

    def take(self, digest: str) -> None:
        """Keep `digest` from being evicted, from now on; waits for the moment in which it is leaving."""
        with self._lock:
            self._held[digest] += 1
            if self._held[digest] == 1:
                _set(self._file, fcntl.F_OFD_SETLKW, fcntl.F_RDLCK, digest)

    @contextmanager
    def of(self, digests: Iterable[str]) -> Iterator[None]:
        """Those of `digests`, until the body ends."""
        with ExitStack() as stack:
            for digest in digests:
                self.take(digest)
                stack.callback(self.give_back, digest)
            yield

    def give_back(self, digest: str) -> None:
        with self._lock:
            self._held[digest] -= 1
            if not self._held[digest]:
                del self._held[digest]
                _set(self._file, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, digest)


@contextmanager
def unleased(cache: Path, digest: str) -> Iterator[bool]:
    """Whether nobody has a lease on `digest`; if so, nobody gets one before the body ends."""
    file = _open(cache)
    try:
        try:
            _set(file, fcntl.F_OFD_SETLK, fcntl.F_WRLCK, digest)
            free = True
        except BlockingIOError:
            free = False
        yield free
    finally:
        os.close(file)


def _open(cache: Path) -> int:
    return os.open(cache / LEASES_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _set(file: int, command: int, kind: int, digest: str) -> None:
    """A lock of the open file, not of the process (`fcntl.lockf`): another thread that closes the file leaves it."""
    fcntl.fcntl(file, command, FLOCK.pack(kind, os.SEEK_SET, int(digest[:PLACE_DIGITS], 16), 1, 0))
