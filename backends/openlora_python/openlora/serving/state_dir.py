"""The state directory of a server: one launcher at a time, a run directory for its secrets and sockets."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..attribution.frames import make_directory
from ..errors import Unavailable

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
        descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise Unavailable(
                f"a server (pid {self.lock_file.read_text().strip()}) runs on {self.root} already: "
                "`openlora stop`, or another --state-dir"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        return descriptor

    def running_pid(self) -> int | None:
        """The launcher that holds this directory, if one does."""
        return lock_holder(self.lock_file)


def lock_holder(lock_file: Path) -> int | None:
    """The process that holds a lock file with its pid in it, if one does."""
    try:
        descriptor = os.open(lock_file, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(os.pread(descriptor, 32, 0))
    finally:
        os.close(descriptor)
    return None
