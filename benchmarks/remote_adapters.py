"""Adapters that must come over HTTP: a throttled source, the real fetcher process, and the cache that it fills."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
from fetcher_process import running_fetcher

from openlora.adapters.catalog import Catalog
from openlora.adapters.catalog_file import CATALOG_FILE
from openlora.adapters.catalog_rows import BaseFacts
from openlora.adapters.ingest import ingest
from openlora.adapters.ingest_jobs import check_result, job_of
from openlora.adapters.ingest_worker import CACHE_DIRECTORY
from openlora.adapters.manifest import model_manifest
from openlora.adapters.sources import SourceLimits
from openlora.config import load_section
from openlora.engine.api import AdapterUse
from openlora.serving.fetch_client import FetchClient

MAX_RANK = 128


class RemoteAdapters:
    """What `openlora adapters add --lazy` and the generation step do with them. `fetch` blocks its thread."""

    def __init__(self, state: Path, base: BaseFacts, url: str, root: Path, address: str) -> None:
        self._state, self._base, self._url, self._root = state, base, url, root
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._client = FetchClient(address, lambda error, seconds: None)
        asyncio.run_coroutine_threadsafe(self._client.run(), self._loop)

    def add(self, uses: Sequence[AdapterUse]) -> list[AdapterUse]:
        """The same adapters, lazily: where they will be."""
        jobs = []
        for use in uses:
            place = Path(use.path).relative_to(self._root.resolve()).as_posix()
            jobs.append(job_of(f"{self._url}/{place}", use.digest, use.digest, lazy=True))
        for result in ingest(self._state, self._base, jobs):
            check_result(result)
        return [msgspec.structs.replace(use, path=str(self._state / CACHE_DIRECTORY / use.digest)) for use in uses]

    def fetch(self, use: AdapterUse) -> None:
        asyncio.run_coroutine_threadsafe(self._client.fetch(use.digest, use.digest), self._loop).result()


@contextmanager
def remote_adapters(model: Path, work: Path, mb_per_s: float) -> Iterator[RemoteAdapters]:
    """Those below `work`, served at `mb_per_s`, over a state of its own that is gone afterwards."""
    base = BaseFacts(str(model.resolve()), model_manifest(model, work / "digests.json").digest, MAX_RANK)
    limits = replace(load_section(SourceLimits), cache_bytes=None)
    script = Path(__file__).with_name("throttled_source.py")
    with ExitStack() as stack:
        state = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=work, prefix="state-")))
        with Catalog(state / CATALOG_FILE) as catalog:
            catalog.set_base(base)
        source = stack.enter_context(
            subprocess.Popen(
                [sys.executable, str(script), str(work), "--mb-per-s", str(mb_per_s)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        )
        stack.callback(source.stdin.close)
        url = f"http://127.0.0.1:{int(source.stdout.readline())}"
        fetcher = stack.enter_context(running_fetcher(state, base, limits))
        yield RemoteAdapters(state, base, url, work, fetcher.address)
