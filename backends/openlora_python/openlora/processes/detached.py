"""A command of ours that goes on when the one that started it has ended."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from ..errors import Unavailable

LOOK_SECONDS = 0.1


def start_detached(arguments: Sequence[str], words_file: Path, seconds: float, waits_for: Callable[[int], str]) -> int:
    """Start `openlora ARGUMENTS` in a session of its own, and wait until it is ready.

    Args:
        words_file: where its output goes.
        waits_for: what is missing still of the process with this pid; "" = it is ready.

    Returns:
        Its pid.

    Raises:
        Unavailable: it has ended, or is not ready in so many seconds and was told to end.
    """
    with words_file.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "openlora.cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    until = time.monotonic() + seconds
    with Console(stderr=True).status("starting …") as status:
        while time.monotonic() < until:
            if process.poll() is not None:
                words = words_file.read_text().strip().splitlines()
                raise Unavailable(
                    f"openlora {arguments[0]} ended with status {process.returncode}: {words[-1] if words else ''}"
                )
            missing = waits_for(process.pid)
            if not missing:
                return process.pid
            status.update(f"starting: {missing}")
            time.sleep(LOOK_SECONDS)
    process.terminate()
    raise Unavailable(f"not ready in {seconds:.0f} s; its words are in {words_file}")
