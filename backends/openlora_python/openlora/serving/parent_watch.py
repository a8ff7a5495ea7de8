"""Leave with the process we depend on: nothing of a dead server stays behind."""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable
from pathlib import Path


def exit_with(pid: int, before: Callable[[], None] | None = None) -> None:
    """Watch process `pid` from a thread of our own; when it is gone, call `before` and end at once.

    A pidfd, not `PR_SET_PDEATHSIG`, which fires when the parent's forking *thread* ends.
    """
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        _leave(before)

    def watch() -> None:
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        poller.poll()
        _leave(before)

    threading.Thread(target=watch, name=f"watch-{pid}", daemon=True).start()


def _leave(before: Callable[[], None] | None) -> None:
    try:
        if before is not None:
            before()
    finally:
        os._exit(1)


def watch_from_stub(launcher_pid: int, shm_prefix: str) -> None:
    """A stub's watch: gone with tritonserver; and if the launcher goes, tritonserver and its shared memory go first."""
    server_pid = os.getppid()
    server = os.pidfd_open(server_pid)
    if parent_of(server_pid) != launcher_pid:
        _leave(None)  # tritonserver ended while we started: whoever takes orphans is our parent now

    def end_server() -> None:
        try:
            signal.pidfd_send_signal(server, signal.SIGKILL)
        except ProcessLookupError:
            pass  # gone already, which is what we want
        wait_for_exit(server, SERVER_EXIT_SECONDS)
        remove_shared_memory(shm_prefix)
        # The launcher gave tritonserver a session of its own. A stub that waits for the dead server with Python's lock
        # in its hand never sees its own watch, so the first of them to get here ends them all.
        os.killpg(os.getpgrp(), signal.SIGKILL)

    exit_with(launcher_pid, end_server)
    exit_with(server_pid)


def parent_of(pid: int) -> int | None:
    """The parent of a process; None when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


def remove_shared_memory(prefix: str) -> list[str]:
    """Remove the regions a killed tritonserver left under /dev/shm; returns their names."""
    removed = []
    for region in Path("/dev/shm").glob(f"{prefix}*"):
        region.unlink(missing_ok=True)
        removed.append(region.name)
    return removed
