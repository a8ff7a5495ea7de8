"""The process that brings adapters in: copy, validate the copy, admit it to the cache, write it into the catalog.

`python -m openlora.adapters.ingest_worker` takes one `IngestRequest` as JSON on standard input and answers with JSON
lines. Files of strangers are parsed here, where a crash, a hang or an out-of-memory kill costs one adapter, no server.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import msgspec

from ..attribution.card import parse_card
from ..errors import AdapterInvalid, InvalidArgument, OpenLoRAError, Overloaded, Unavailable
from ..processes.worker_process import Fatal, take_request
from .base_modules import BaseModules, base_modules
from .cache_quota import CacheRoom
from .catalog import Catalog
from .catalog_file import CATALOG_FILE
from .catalog_reader import CatalogReader
from .catalog_rows import AdapterRecord, BaseFacts
from .chain_view import CHAIN_ORIGIN
from .checking_limits import cpu_limit, memory_limit
from .manifest import CONFIG_FILE, WEIGHTS_FILE
from .printable import printable
from .sources import SourceLimits, is_uri, parse_uri
from .store import AdapterStore, Incoming, SourceDirectory, copy_adapter, settled_state
from .weights import MAX_HEADER_BYTES, AdapterFacts, validate_adapter, validate_config

CACHE_DIRECTORY = "adapters"
MODULES_DIRECTORY = "base_modules"
REPORT_BYTES = 8 << 20  # between two reports of a copy
CPU_SECONDS = 2.0  # to validate one adapter, and more for a large one: patterns of a stranger may take for ever
CPU_SECONDS_PER_BYTE = 1 / (50 << 20)
MEMORY_BYTES = 512 << 20  # likewise; the header of a weights file may take a quarter of it
MEMORY_PER_BYTE = 3  # the file, its tensors, and one tensor's numbers being looked at
NOBODY = {"access": {"policy": "allow-list"}}  # the card of what has one that can't be read


class IngestJob(msgspec.Struct, frozen=True):
    """One adapter to bring in.

    `source` is an absolute path or a URI; `origin` the --adapters directory that owns it, CHAIN_ORIGIN, or empty;
    `digest` the only one that is taken, if given. With `restores`, the number of a version, only that version's bytes
    come back. A `lazy` one, a URI with a digest, is announced without its weights.
    """

    name: str
    source: str
    origin: str = ""
    digest: str = ""
    restores: int = 0
    lazy: bool = False


class IngestRequest(msgspec.Struct, frozen=True):
    state_dir: str
    base: BaseFacts
    jobs: tuple[IngestJob, ...]
    limits: SourceLimits = SourceLimits()


class Started(msgspec.Struct, frozen=True, tag="started"):
    name: str


class Downloaded(msgspec.Struct, frozen=True, tag="downloaded"):
    """So many bytes of an adapter's files are here; `total` is None where its source doesn't say."""

    name: str
    done: int
    total: int | None


class Copied(msgspec.Struct, frozen=True, tag="copied"):
    """So many bytes of an adapter's files are copied."""

    name: str
    done: int
    total: int


class IngestResult(msgspec.Struct, frozen=True, tag="result"):
    """What became of one adapter. `failed` = not the adapter's fault, nothing was recorded.

    `quarantined` as version 0: refused for what its source is, or for its digest, or for what was said of a lazy one;
    nothing was recorded either.
    """

    name: str
    status: Literal["ready", "quarantined", "failed", "removed"]
    version: int = 0  # 0 = none
    digest: str = ""
    rank: int = 0
    change: Literal["added", "updated", "unchanged", "none"] = "none"
    reason: str = ""


Event = Started | Downloaded | Copied | IngestResult
Report = Callable[[Event | Fatal], None]


@dataclass(frozen=True)
class Fetched:
    """The files of one adapter: where they come from, as the catalog may say it; where they are; the source's state;
    whether its URI had a login."""

    source: str
    directory: Path
    state: str = ""
    login: bool = False


class Ingester:
    """Brings in one adapter after the other."""

    def __init__(
        self,
        state_dir: Path,
        base: BaseFacts,
        catalog: Catalog,
        store: AdapterStore,
        report: Report,
        limits: SourceLimits | None = None,
    ) -> None:
        self._state_dir = state_dir
        self._base = base
        self._catalog = catalog
        self._store = store
        self._report = report
        self.room = CacheRoom(state_dir / CATALOG_FILE, store, limits or SourceLimits())

    def bring_in(self, job: IngestJob, fetched: Fetched | None = None) -> IngestResult:
        """One adapter, to the catalog as ready or quarantined; `fetched` is what was downloaded of a remote one.

        Raises:
            UnsupportedModel: the base model can't be checked against.
        """
        try:
            self._catalog.check_free(job.name)
        except InvalidArgument as error:  # a group's
            return IngestResult(job.name, "failed", reason=error.message)
        origin = fetched or Fetched(job.source, Path(job.source))
        known = self._catalog.current(job.name, job.origin)
        card = NOBODY if known is None else known.card  # whose access policy stands until another card was read
        found = AdapterRecord(
            job.name,
            0,
            "",
            0,
            "ready",
            "",
            card,
            base=self._base.digest,
            source=origin.source,
            origin=job.origin,
            login=origin.login,
        )
        try:
            with SourceDirectory(origin.directory) as source:
                state = source.state()
                found = replace(found, source_state=settled_state(state) if fetched is None else fetched.state)
                if known is not None and self.is_current(known, found.source_state, job.digest):
                    return result_of(known, "unchanged")
                card, made_for = (None, None) if job.restores else _terms(source, job.origin)
                fault = _fault_of(card)
                if fault is None:
                    found = replace(found, card=card)
                with self._store.incoming() as incoming:
                    self._copy(job.name, source, state, incoming)
                    found = replace(found, digest=incoming.manifest().digest)
                    if job.digest not in ("", found.digest):
                        reason = f"its digest is {found.digest}, {job.digest} was asked for"
                        return IngestResult(job.name, "quarantined", digest=found.digest, reason=reason)
                    if fault is not None:
                        raise fault
                    facts = self._validated(found.name, incoming.directory, made_for)
                    self.room.make(found.digest, incoming.size)
                    self._store.admit(incoming)
            found = replace(found, rank=facts.rank, target_modules=facts.target_modules)
        except AdapterInvalid as error:
            found = replace(found, status="quarantined", reason=printable(error.message), source_state="")
            if job.restores and found.digest:  # what came are the version's own bytes
                self._catalog.quarantine(found.digest, self._base.digest, found.reason)
        except (OSError, Unavailable, Overloaded) as error:  # a full disk or cache, or a source being written
            reason = error.message if isinstance(error, OpenLoRAError) else str(error)
            return IngestResult(job.name, "failed", reason=printable(reason))
        if job.restores:  # its terms are the catalog's, whatever the source says of them now
            if found.status == "ready":
                self._catalog.learn(job.name, found.digest, found.rank, found.target_modules)
            return IngestResult(job.name, found.status, job.restores, found.digest, found.rank, "none", found.reason)
        return result_of(*self._catalog.put(found))

    def announce(self, job: IngestJob, fetched: Fetched) -> IngestResult:
        """A lazy adapter, to the catalog as ready, by what is there but for its weights.

        Raises:
            UnsupportedModel: the base model can't be checked against.
        """
        try:
            with SourceDirectory(fetched.directory) as source:
                card, made_for = _terms(source, job.origin)
            if fault := _fault_of(card):
                raise fault
            modules = self._modules
            with _checking(0):
                facts = validate_config(
                    job.name, fetched.directory, made_for, modules, self._base.digest, self._base.max_rank
                )
        except AdapterInvalid as error:
            return IngestResult(job.name, "quarantined", reason=printable(error.message))
        found = AdapterRecord(
            job.name,
            0,
            job.digest,
            facts.rank,
            "ready",
            "",
            card,
            facts.target_modules,
            self._base.digest,
            fetched.source,
            job.origin,
            source_state=fetched.state,
        )
        return result_of(*self._catalog.put(found))

    def name_again(self, job: IngestJob, record: AdapterRecord) -> IngestResult:
        """What a remote source held before and still holds, under the name that is asked for now."""
        if job.restores:
            return IngestResult(job.name, "ready", job.restores, record.digest, record.rank)
        login = parse_uri(job.source).has_login
        return result_of(*self._catalog.put(replace(record, name=job.name, origin=job.origin, login=login)))

    def is_current(self, known: AdapterRecord, source_state: str, digest: str) -> bool:
        """Whether it would be brought in again in vain; `digest` is the only one that is wanted, if given."""
        return digest in ("", known.digest) and is_unchanged(known, source_state, self._base, self._store)

    @cached_property
    def _modules(self) -> BaseModules:
        return base_modules(Path(self._base.path), self._base.digest, self._state_dir / MODULES_DIRECTORY)

    def _copy(self, name: str, source: SourceDirectory, state: dict[str, list[int]], incoming: Incoming) -> None:
        total = sum(state[file][0] for file in (CONFIG_FILE, WEIGHTS_FILE) if file in state)
        done = reported = 0

        def advance(size: int) -> None:
            nonlocal done, reported
            done += size
            if done - reported >= REPORT_BYTES or done == total:
                reported = done
                self._report(Copied(name, done, total))

        copy_adapter(source, state, incoming, self.largest_weights, advance)

    @property
    def largest_weights(self) -> int:
        """Bytes of a weights file that could be an adapter of the base model."""
        return self._modules.largest_adapter_bytes(self._base.max_rank) + MAX_HEADER_BYTES

    def _validated(self, name: str, directory: Path, made_for: str | None) -> AdapterFacts:
        modules = self._modules
        with _checking(os.path.getsize(directory / WEIGHTS_FILE)):
            return validate_adapter(name, directory, made_for, modules, self._base.digest, self._base.max_rank)


@contextmanager
def _checking(size: int) -> Iterator[None]:
    """Refuses an adapter with weights of `size` bytes when the body takes more than checking one may."""
    cpu, memory = CPU_SECONDS + size * CPU_SECONDS_PER_BYTE, MEMORY_BYTES + size * MEMORY_PER_BYTE
    with cpu_limit(cpu), memory_limit(memory):
        yield


def _terms(source: SourceDirectory, origin: str) -> tuple[dict[str, Any] | None, Any]:
    """Its card, and the base model that it says it was made for, which is about bytes and not among the terms.

    The card of a chain's adapter is what the chain says, wherever its bytes come from.
    """
    card = source.card()
    made_for = card.pop("base", None) if card else None
    return None if origin == CHAIN_ORIGIN else card or None, made_for


def _fault_of(card: dict[str, Any] | None) -> AdapterInvalid | None:
    """What is wrong with it; None: nothing."""
    try:
        if card:
            parse_card(card)
    except InvalidArgument as error:
        return AdapterInvalid(f"openlora.json: {error.field}: {error.message}")
    return None


def is_unchanged(known: AdapterRecord, source_state: str, base: BaseFacts, store: AdapterStore) -> bool:
    """Whether the files that `source_state` tells of would only become what the catalog knows already."""
    return (
        known.status == "ready"
        and known.source_state == source_state != ""
        and known.base == base.digest
        and known.rank <= base.max_rank
        and store.holds(known.digest)
    )


def result_of(record: AdapterRecord, change: Literal["added", "updated", "unchanged"]) -> IngestResult:
    return IngestResult(record.name, record.status, record.version, record.digest, record.rank, change, record.reason)


def known_records(state_dir: Path) -> list[AdapterRecord]:
    """All versions in the catalog that aren't removed."""
    with CatalogReader(state_dir / CATALOG_FILE) as reader:
        return reader.records()


def main() -> None:
    request, report = take_request(IngestRequest)  # whatever is half done when we end is cleared by the next worker
    state_dir = Path(request.state_dir)
    store = AdapterStore(state_dir / CACHE_DIRECTORY)
    remote = [job for job in request.jobs if is_uri(job.source)]
    local = [job for job in request.jobs if not is_uri(job.source)]
    with Catalog(state_dir / CATALOG_FILE) as catalog:
        ingester = Ingester(state_dir, request.base, catalog, store, report, request.limits)
        try:
            if local:
                with store.writing():
                    for job in local:
                        report(Started(job.name))
                        report(ingester.bring_in(job))
            if remote:
                from .remote_ingest import RemoteIngest, bring_in_remote

                sources = RemoteIngest(ingester, store, state_dir, request.limits, report)
                bring_in_remote(remote, sources, request.limits.parallel, report)
        except OpenLoRAError as error:
            report(Fatal(str(error)))


if __name__ == "__main__":
    main()
