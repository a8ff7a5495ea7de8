"""The fetcher process: `python -m openlora.serving.fetcher FETCHER_JSON`.

Brings the bytes of adapters into the cache while requests wait for them: what `openlora adapters fetch` does, by the
same code, in a process that is warm. Downloads run in threads; files are parsed and checked here, where what they do to
the process ends no server.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from ..adapters.catalog import Catalog
from ..adapters.catalog_file import CATALOG_FILE
from ..adapters.catalog_reader import CatalogReader
from ..adapters.http_source import trusted_certificates
from ..adapters.ingest_worker import CACHE_DIRECTORY, Ingester, IngestJob, IngestResult
from ..adapters.missing_files import not_fetchable
from ..adapters.remote_ingest import RemoteIngest
from ..adapters.sources import is_uri, parse_uri
from ..adapters.store import AdapterStore
from ..engine.wire import Hello
from ..errors import AdapterInvalid, Internal, OpenLoRAError, Unavailable
from ..processes.parent_watch import exit_with
from .fetch_wire import Fetch, Fetched, FetcherConfig, Ready, ToFetcher
from .status import StatusReporter
from .wrong_bytes import WrongBytes

SERVERS = 8  # that may be busy with as many downloads as `SourceLimits.parallel` allows of one
RETRY_AFTER_MS = 5000
NICENESS = 5  # as the engine's: a download takes nothing away from answers that are being made

log = logging.getLogger(__name__)


class Fetcher:
    """One download a digest at a time, however many ask for it; each client that asked is told of its end.

    A source that hangs holds up only others of its server: downloads are counted by server.
    """

    def __init__(self, config: FetcherConfig) -> None:
        state_dir = Path(config.state_dir)
        self._store = AdapterStore(state_dir / CACHE_DIRECTORY)
        catalog = Catalog(state_dir / CATALOG_FILE)
        ingester = Ingester(state_dir, config.base, catalog, self._store, _ignore, config.limits)
        self._remote = RemoteIngest(ingester, self._store, state_dir, config.limits, _ignore)
        self._reader = CatalogReader(state_dir / CATALOG_FILE)
        self._threads = ThreadPoolExecutor(SERVERS * config.limits.parallel)
        self._turns: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(config.limits.parallel)
        )
        self._wrong = WrongBytes()
        self._asking: dict[str, set[bytes]] = {}  # digest that is being fetched -> clients
        self._tasks: set[asyncio.Task[None]] = set()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToFetcher)
        self._config = config

    async def run(self) -> None:
        """Serve until the process ends."""
        trusted_certificates()  # before anybody waits for them
        self._remote.sweep()
        with zmq.asyncio.Context.instance().socket(zmq.ROUTER) as self._clients:
            self._clients.setsockopt(zmq.SNDHWM, 0)
            self._clients.bind(self._config.socket)
            status = StatusReporter(self._config.status_socket, "fetcher")  # what it says leaves as long as it lives
            status.report(ready=True)
            while True:
                client, message = await self._clients.recv_multipart()
                match self._decoder.decode(message):
                    case Hello():
                        await self._tell(client, Ready(os.getpid()))
                    case Fetch(digest, name):
                        self._ask(client, digest, name)

    def _ask(self, client: bytes, digest: str, name: str) -> None:
        if digest in self._asking:
            self._asking[digest].add(client)
            return
        self._asking[digest] = {client}
        task = asyncio.create_task(self._answer(digest, name))
        self._tasks.add(task)  # the loop itself keeps none
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, digest: str, name: str) -> None:
        try:
            await self._fetch(digest, name)
            error = ""
        except OpenLoRAError as fault:
            log.warning("adapter %s (%s): %s", name, digest, fault)
            error = str(fault)
        except Exception as fault:  # of ours: whoever waits must still be told
            log.exception("adapter %s (%s)", name, digest)
            error = str(Internal(f"{type(fault).__name__}: {fault}"))
        self._remote.sweep()
        for client in self._asking.pop(digest):
            await self._tell(client, Fetched(digest, error))

    async def _fetch(self, digest: str, name: str) -> None:
        record = self._reader.find(name, digest)
        if record.status != "ready":
            raise AdapterInvalid(record.reason)
        if not is_uri(record.source):
            if self._store.path(digest).is_dir():
                return  # damaged, and nobody can bring it anew: the engine says what is wrong with it
            raise Unavailable(not_fetchable(record))
        if reason := self._wrong.reason(digest, record.source):
            raise AdapterInvalid(reason)
        job = IngestJob(name, record.source, digest=digest, restores=record.version)
        uri = parse_uri(record.source)
        async with self._turns[f"{uri.scheme}://{uri.parts.netloc}"]:
            downloading = self._threads.submit(self._remote.download, job)
            await asyncio.wait([asyncio.wrap_future(downloading)])
        result = self._remote.bring_in(job, downloading)
        if result.digest not in ("", digest):
            self._wrong.note(digest, record.source, result.reason)
        elif result.status == "ready":
            self._wrong.forget(digest, record.source)
        check(result)

    async def _tell(self, client: bytes, message: Ready | Fetched) -> None:
        await self._clients.send_multipart([client, self._encoder.encode(message)])


def check(result: IngestResult) -> None:
    """Raises AdapterInvalid for what can't be this adapter, Unavailable for what may be there later."""
    if result.status == "quarantined":
        raise AdapterInvalid(result.reason)
    if result.status == "failed":
        raise Unavailable(result.reason, retry_after_ms=RETRY_AFTER_MS)


def _ignore(event: object) -> None:
    """Nobody follows the progress of these downloads."""


def main() -> None:
    config = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=FetcherConfig)
    exit_with(config.launcher_pid)
    os.nice(NICENESS)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    try:
        asyncio.run(Fetcher(config).run())
    except BaseException:
        log.exception("the fetcher ends")
        os._exit(1)  # at once, not when the last download is over: a new one is started then


if __name__ == "__main__":
    main()
