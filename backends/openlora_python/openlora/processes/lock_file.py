"""One process at a time: a file that is locked while its holder lives, with the holder's pid in it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import Unavailable


def take_lock(file: Path, why_not: Callable[[int], str]) -> int:
    """Hold `file` until the descriptor that this returns is closed, or this process ends.

    Raises:
        Unavailable: another process holds it; `why_not` says so, given its pid.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = _pid_in(descriptor)
        os.close(descriptor)
        raise Unavailable(why_not(pid)) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


@contextmanager
def locked(file: Path, why_not: Callable[[int], str]) -> Iterator[None]:
    """As `take_lock`, for the body."""
    descriptor = take_lock(file, why_not)
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def in_turn(file: Path) -> Iterator[None]:
    """Hold `file` for the body, once those who hold it are done."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def lock_holder(file: Path) -> int | None:
    """The pid of the process that holds a lock file, if one does."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _pid_in(descriptor)
    finally:
        os.close(descriptor)
    return None


def _pid_in(descriptor: int) -> int:
    return int(os.pread(descriptor, 32, 0) or 0)  # 0: its holder has not written it yet
