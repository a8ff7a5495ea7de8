"""A child process that is kept alive: started, watched by pidfd, restarted with a growing wait, given up loudly."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..config import RestartPolicy
from ..errors import Unavailable


@dataclass(frozen=True)
class Command:
    argv: list[str]
    environment: dict[str, str]


class KeptProcess:
    """`make_command` is called before each start, so what must be new for each start can be made there."""

    def __init__(
        self,
        name: str,
        make_command: Callable[[], Command],
        log_file: Path,
        policy: RestartPolicy,
        gives_up: bool = True,
    ) -> None:
        self.name = name
        self._make_command = make_command
        self._log_file = log_file
        self._policy = policy
        self._gives_up = gives_up
        self._process: subprocess.Popen[bytes] | None = None
        self._restarts: deque[float] = deque()
        self._start_at: float | None = None
        self.pidfd: int | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def running(self) -> bool:
        return self._process is not None

    @property
    def due(self) -> float | None:
        """When it wants to be started, on the monotonic clock."""
        return self._start_at

    def start(self) -> None:
        command = self._make_command()
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        with self._log_file.open("ab") as output:
            self._process = subprocess.Popen(
                command.argv,
                env=command.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C in the terminal is the launcher's to handle
            )
        self.pidfd = os.pidfd_open(self._process.pid)
        self._start_at = None

    def reap(self) -> int:
        """Call when it ended or was killed: collects the process, and ends what it left; returns its exit status.

        What it left: stubs of a killed tritonserver that were still starting, and would hold the journal for ever.
        """
        os.killpg(self._process.pid, signal.SIGKILL)  # the number is its session's until it is collected
        status = self._process.wait()
        os.close(self.pidfd)
        self._process = self.pidfd = None
        return status

    def replace(self) -> None:
        """It ended as it should: another one is due at once, and this was no failure."""
        self._start_at = time.monotonic()

    def plan_restart(self) -> None:
        """At once the first time; then after 1, 2, 4 … seconds.

        Raises:
            Unavailable: it died too often in too short a time.
        """
        now = time.monotonic()
        while self._restarts and self._restarts[0] < now - self._policy.window_seconds:
            self._restarts.popleft()
        if len(self._restarts) >= self._policy.attempts and self._gives_up:
            raise Unavailable(
                f"{self.name} died {len(self._restarts) + 1} times in {self._policy.window_seconds:.0f} s; "
                f"its last words are in {self._log_file}"
            )
        wait = 0.0 if not self._restarts else min(2.0 ** (len(self._restarts) - 1), self._policy.longest_wait_seconds)
        self._restarts.append(now)
        self._start_at = now + wait

    def kill(self) -> None:
        if self.pidfd is not None:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def stop(self, seconds: float) -> None:
        """SIGTERM, then SIGKILL to what is still there; returns when it is gone."""
        if self._process is None:
            return
        signal.pidfd_send_signal(self.pidfd, signal.SIGTERM)
        if not wait_for_exit(self.pidfd, seconds):
            self.kill()
        self.reap()


def wait_for_exit(pidfd: int, seconds: float) -> bool:
    """Whether the process ended within `seconds`."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(seconds * 1000))
