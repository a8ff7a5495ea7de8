"""The real fetcher process without a server around it, for tests and `residency.py`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from openlora.adapters.catalog_rows import BaseFacts
from openlora.adapters.sources import SourceLimits
from openlora.serving.fetch_wire import FetcherConfig


@dataclass
class RunningFetcher:
    address: str
    process: subprocess.Popen[bytes]


@contextmanager
def running_fetcher(
    state_dir: Path, base: BaseFacts, limits: SourceLimits, launcher_pid: int | None = None
) -> Iterator[RunningFetcher]:
    """One over `state_dir`; it ends with the body, or with the process `launcher_pid` (None: this one)."""
    with tempfile.TemporaryDirectory(prefix="fetcher-") as directory:  # short: an ipc path has 107 characters
        address = f"ipc://{directory}/fetcher"
        config = FetcherConfig(
            str(state_dir), base, limits, address, f"ipc://{directory}/status", launcher_pid or os.getpid()
        )
        file = Path(directory, "fetcher.json")
        file.write_bytes(msgspec.json.encode(config))
        with subprocess.Popen([sys.executable, "-m", "openlora.serving.fetcher", str(file)]) as process:
            try:
                yield RunningFetcher(address, process)
            finally:
                process.kill()
