"""Leave with the process we depend on: nothing of a dead server stays behind."""

from __future__ import annotations

import os
import select
import signal
import threading
from pathlib import Path

SERVER_EXIT_SECONDS = 2.0


def exit_with(pid: int, *, whole_session: bool = False) -> None:
    """Watch process `pid` from a thread of our own, and end at once when it is gone.

    With `whole_session` a process that leads its session takes everything in it along: some engines have processes
    that would outlive it.

    A pidfd, not `PR_SET_PDEATHSIG`, which fires when the parent's forking *thread* ends.
    """
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        os._exit(1)

    def watch() -> None:
        _wait_for_exit([process])
        if whole_session and os.getsid(0) == os.getpid():
            os.killpg(os.getpgrp(), signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name=f"watch-{pid}", daemon=True).start()


def watch_from_stub(launcher_pid: int, shm_prefix: str) -> None:
    """A stub's watch: gone with tritonserver; and if the launcher goes, tritonserver and its shared memory go first."""
    try:
        # The launcher gave tritonserver a session, and its number stays its own as long as we are in it.
        server = os.pidfd_open(os.getpgrp())
    except ProcessLookupError:
        os._exit(1)  # it ended while we started
    try:
        launcher = os.pidfd_open(launcher_pid)
    except ProcessLookupError:
        _end_session(server, shm_prefix)

    def watch() -> None:
        if launcher in _wait_for_exit([launcher, server]):
            _end_session(server, shm_prefix)
        os._exit(1)  # the launcher clears up

    threading.Thread(target=watch, name="watch", daemon=True).start()


def _end_session(server: int, shm_prefix: str) -> None:
    """End tritonserver, remove its shared memory, and end every process of its session.

    Not each stub itself: one that waits for the dead server with Python's lock in its hand never sees its watch.
    """
    try:
        signal.pidfd_send_signal(server, signal.SIGKILL)
    except ProcessLookupError:
        pass  # gone already, which is what we want
    _wait_for_exit([server], SERVER_EXIT_SECONDS)
    remove_shared_memory(shm_prefix)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _wait_for_exit(processes: list[int], seconds: float | None = None) -> set[int]:
    """Those pidfds of `processes` that have ended, as soon as there are any."""
    poller = select.poll()
    for process in processes:
        poller.register(process, select.POLLIN)
    return {process for process, _ in poller.poll(None if seconds is None else seconds * 1000)}


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
