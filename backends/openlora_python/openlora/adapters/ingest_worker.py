"""The process that brings adapters in: copy, validate the copy, admit it to the cache, write it into the catalog.

`python -m openlora.adapters.ingest_worker` takes one `IngestRequest` as JSON on standard input and answers with JSON
lines. Files of strangers are parsed here, where a crash, a hang or an out-of-memory kill costs one adapter, no server.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import msgspec

from ..attribution.card import parse_card
from ..errors import AdapterInvalid, InvalidArgument, OpenLoRAError, Unavailable
from .base_modules import BaseModules, base_modules
from .catalog import AdapterRecord, BaseFacts, Catalog
from .manifest import CONFIG_FILE, WEIGHTS_FILE
from .store import AdapterStore, Incoming, SourceDirectory, copy_adapter, settled_state
from .weights import MAX_HEADER_BYTES, AdapterFacts, validate_adapter
from .worker_process import Fatal, take_request

CATALOG_FILE = "catalog.sqlite"  # below the state directory, as RunConfig.catalog_path and adapter_cache say
CACHE_DIRECTORY = "adapters"
MODULES_DIRECTORY = "base_modules"
REPORT_BYTES = 8 << 20  # between two reports of a copy
CPU_SECONDS = 2.0  # to validate one adapter, and more for a large one: patterns of a stranger may take for ever
CPU_SECONDS_PER_BYTE = 1 / (50 << 20)


class IngestJob(msgspec.Struct, frozen=True):
    """One adapter to bring in. `source` is absolute; `origin` the --adapters directory that owns it, or empty."""

    name: str
    source: str
    origin: str = ""


class IngestRequest(msgspec.Struct, frozen=True):
    state_dir: str
    base: BaseFacts
    jobs: tuple[IngestJob, ...]


class Started(msgspec.Struct, frozen=True, tag="started"):
    name: str


class Copied(msgspec.Struct, frozen=True, tag="copied"):
    """So many bytes of an adapter's files are copied."""

    name: str
    done: int
    total: int


class IngestResult(msgspec.Struct, frozen=True, tag="result"):
    """What became of one adapter. `failed` = not the adapter's fault, nothing was recorded."""

    name: str
    status: Literal["ready", "quarantined", "failed", "removed"]
    version: int = 0  # 0 = none
    digest: str = ""
    rank: int = 0
    change: Literal["added", "updated", "unchanged", "none"] = "none"
    reason: str = ""


Event = Started | Copied | IngestResult
Report = Callable[[Event | Fatal], None]


class Ingester:
    """Brings in one adapter after the other."""

    def __init__(self, state_dir: Path, base: BaseFacts, catalog: Catalog, store: AdapterStore, report: Report) -> None:
        self._state_dir = state_dir
        self._base = base
        self._catalog = catalog
        self._store = store
        self._report = report

    def bring_in(self, job: IngestJob) -> IngestResult:
        """One adapter, to the catalog as ready or quarantined.

        Raises:
            UnsupportedModel: the base model can't be checked against.
        """
        try:
            self._catalog.check_free(job.name)
        except InvalidArgument as error:
            return IngestResult(job.name, "failed", reason=error.message)
        found = AdapterRecord(
            job.name, 0, "", 0, "ready", "", None, base=self._base.digest, source=job.source, origin=job.origin
        )
        try:
            with SourceDirectory(Path(job.source)) as source:
                state = source.state()
                found = replace(found, source_state=settled_state(state))
                known = self._catalog.current(job.name, job.origin)
                if known is not None and self._is_current(known, found.source_state):
                    return _result(known, "unchanged")
                card = source.card()
                made_for = card.pop("base", None) if card else None  # about bytes; the rest of a card is terms
                found = replace(found, card=card or None)
                with self._store.incoming() as incoming:
                    self._copy(job.name, source, state, incoming)
                    found = replace(found, digest=incoming.manifest().digest)
                    _check_card(card)
                    facts = self._validated(found.name, incoming.directory, made_for)
                    self._store.admit(incoming)
            found = replace(found, rank=facts.rank, target_modules=facts.target_modules)
        except AdapterInvalid as error:
            found = replace(found, status="quarantined", reason=error.message, source_state="")
        except (OSError, Unavailable) as error:  # a full disk, or a source that is still being written
            return IngestResult(job.name, "failed", reason=str(error))
        return _result(*self._catalog.put(found))

    @cached_property
    def _modules(self) -> BaseModules:
        return base_modules(Path(self._base.path), self._base.digest, self._state_dir / MODULES_DIRECTORY)

    def _is_current(self, known: AdapterRecord, source_state: str) -> bool:
        return (
            known.status == "ready"
            and known.source_state == source_state != ""
            and known.base == self._base.digest
            and known.rank <= self._base.max_rank
            and self._store.holds(known.digest)
        )

    def _copy(self, name: str, source: SourceDirectory, state: dict[str, list[int]], incoming: Incoming) -> None:
        total = sum(state[file][0] for file in (CONFIG_FILE, WEIGHTS_FILE) if file in state)
        done = reported = 0

        def advance(size: int) -> None:
            nonlocal done, reported
            done += size
            if done - reported >= REPORT_BYTES or done == total:
                reported = done
                self._report(Copied(name, done, total))

        limit = self._modules.largest_adapter_bytes(self._base.max_rank) + MAX_HEADER_BYTES
        copy_adapter(source, state, incoming, limit, advance)

    def _validated(self, name: str, directory: Path, made_for: str | None) -> AdapterFacts:
        size = os.path.getsize(directory / WEIGHTS_FILE)
        modules = self._modules
        with _cpu_limit(CPU_SECONDS + size * CPU_SECONDS_PER_BYTE):
            return validate_adapter(name, directory, made_for, modules, self._base.digest, self._base.max_rank)


def _check_card(card: dict[str, Any] | None) -> None:
    if not card:
        return
    try:
        parse_card(card)
    except InvalidArgument as error:
        raise AdapterInvalid(f"openlora.json: {error.field}: {error.message}") from error


def _result(record: AdapterRecord, change: Literal["added", "updated", "unchanged"]) -> IngestResult:
    return IngestResult(record.name, record.status, record.version, record.digest, record.rank, change, record.reason)


@contextmanager
def _cpu_limit(seconds: float) -> Iterator[None]:
    """Refuses the adapter when the body takes more CPU time; `re` looks for signals while it matches."""

    def over(number: int, frame: FrameType | None) -> None:
        raise AdapterInvalid(
            f"checking it took more than {seconds:.0f} s: the patterns in its configuration are too slow"
        )

    before = signal.signal(signal.SIGVTALRM, over)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def main() -> None:
    request, report = take_request(IngestRequest)  # whatever is half done when we end is cleared by the next worker
    state_dir = Path(request.state_dir)
    store = AdapterStore(state_dir / CACHE_DIRECTORY)
    with Catalog(state_dir / CATALOG_FILE) as catalog, store.writing():
        ingester = Ingester(state_dir, request.base, catalog, store, report)
        for job in request.jobs:
            report(Started(job.name))
            try:
                report(ingester.bring_in(job))
            except OpenLoRAError as error:
                report(Fatal(str(error)))
                return


if __name__ == "__main__":
    main()
