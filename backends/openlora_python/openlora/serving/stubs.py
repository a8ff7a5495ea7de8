"""The stubs of the tritonserver of the moment: that they live, and what they last said of themselves."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ..engine.wire import Report
from ..processes.kept_process import wait_for_exit
from ..processes.parent_watch import parent_of

NAMES = ("adapter_resolver", "generation", "attribution")
REPORTING = ("generation", "attribution")  # all the time; the resolver reports once
BINARY = b"triton_python_backend_stub"
EXIT_SECONDS = 1.0


@dataclass(frozen=True)
class _Word:
    pid: int
    ready: bool
    reason: str
    heard_at: float


class Stubs:
    """Watched by pidfd from their first moment on: Triton waits for ever for one that dies while it starts."""

    def __init__(self) -> None:
        self._pidfds: dict[int, int] = {}  # by pid
        self._words: dict[str, _Word] = {}  # by name

    @property
    def complete(self) -> bool:
        """Whether all of them have reported."""
        return len(self._words) == len(NAMES)

    @property
    def pidfds(self) -> list[int]:
        return list(self._pidfds.values())

    def look(self, server_pid: int) -> None:
        """Find those that were started since; when all have reported there is nothing more to find."""
        if self.complete:
            return
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) not in self._pidfds and _is_stub(int(entry)):
                self._watch(int(entry), server_pid)

    def hear(self, report: Report, server_pid: int | None) -> None:
        """Take in what a stub says of itself; an orphan of a server that is gone has no say."""
        if report.pid in self._pidfds or self._watch(report.pid, server_pid):
            self._words[report.name] = _Word(report.pid, report.ready, report.reason, time.monotonic())

    def faults(self) -> dict[str, str]:
        """What keeps them from being ready, by name."""
        found = {}
        for name in NAMES:
            word = self._words.get(name)
            if word is None or not word.ready:
                found[name] = word.reason if word else "starting"
        return found

    def died(self, ready: Collection[int]) -> str | None:
        """One whose pidfd is among `ready`, if there is any."""
        names = {word.pid: name for name, word in self._words.items()}
        for pid, pidfd in self._pidfds.items():
            if pidfd in ready:
                return f"{names.get(pid, 'a starting')} stub (pid {pid})"
        return None

    def silent(self, seconds: float) -> str | None:
        """One that reported once, and then not for so long."""
        for name in REPORTING:
            word = self._words.get(name)
            if word and time.monotonic() - word.heard_at > seconds:
                return f"{name} stub (pid {word.pid})"
        return None

    def drop(self) -> None:
        """Forget them: their server is dead. They leave by themselves; returns when they did, or were made to."""
        pidfds, self._pidfds, self._words = self.pidfds, {}, {}  # at once: the node is not ready while we wait
        for pidfd in pidfds:
            if not wait_for_exit(pidfd, EXIT_SECONDS):
                try:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                except ProcessLookupError:
                    pass  # it went at last, and not being our child it is nobody's zombie
                wait_for_exit(pidfd, EXIT_SECONDS)
            os.close(pidfd)

    def _watch(self, pid: int, server_pid: int | None) -> bool:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        if server_pid is None or parent_of(pid) != server_pid:
            os.close(pidfd)
            return False
        self._pidfds[pid] = pidfd
        return True


def _is_stub(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0].endswith(BINARY)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False  # gone, or another user's
