"""The state directory of a server: one launcher at a time, a run directory for its secrets and sockets."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..attribution.frames import make_directory
from ..processes.lock_file import lock_holder, take_lock

LONGEST_SOCKET_PATH = 90  # sockaddr_un holds 107 bytes


@dataclass(frozen=True)
class StateDir:
    """Paths under `--state-dir`, all private to their owner."""

    root: Path

    @property
    def lock_file(self) -> Path:
        return self.root / "serve.pid"

    @property
    def run_dir(self) -> Path:
        return self.root / "run"

    def prepare(self) -> None:
        """Make the directories; what a dead run left in the run directory goes."""
        make_directory(self.root)
        shutil.rmtree(self.run_dir, ignore_errors=True)
        self.run_dir.mkdir(mode=0o700)
        (self.root / "logs").mkdir(exist_ok=True)

    def make_socket_dir(self) -> Path:
        """The run directory, or one with a short name where its path is too long for a socket."""
        if len(str(self.run_dir)) <= LONGEST_SOCKET_PATH:
            return self.run_dir
        return Path(tempfile.mkdtemp(prefix="openlora-"))

    def lock(self) -> int:
        """Hold the directory for this process's life; the descriptor that holds it.

        Raises:
            Unavailable: another launcher does.
        """
        make_directory(self.root)
        return take_lock(
            self.lock_file,
            lambda pid: f"a server (pid {pid}) runs on {self.root} already: `openlora stop`, or another --state-dir",
        )

    def running_pid(self) -> int | None:
        """The launcher that holds this directory, if one does."""
        return lock_holder(self.lock_file)
