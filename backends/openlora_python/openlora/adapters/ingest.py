"""Bringing adapters in, as CLI and launcher call it; `ingest_worker`, a process of its own, does the work."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import AdapterInvalid, Internal, InvalidArgument
from ..processes.worker_process import run_worker
from .catalog import Catalog, check_name
from .catalog_file import CATALOG_FILE
from .catalog_rows import AdapterRecord, BaseFacts
from .ingest_worker import (
    CACHE_DIRECTORY,
    Event,
    IngestJob,
    IngestRequest,
    IngestResult,
    Started,
    is_unchanged,
    result_of,
)
from .sources import SourceLimits
from .store import AdapterStore, SourceDirectory, settled_state

Progress = Callable[[Event], None]


def ingest(
    state_dir: Path,
    base: BaseFacts,
    jobs: Sequence[IngestJob],
    progress: Progress | None = None,
    limits: SourceLimits | None = None,
) -> list[IngestResult]:
    """Bring adapters into the cache and the catalog of `state_dir`.

    Args:
        base: what they are checked against.
        progress: is told of every start, piece and result.
        limits: of downloads and of the cache; default: those of no settings.

    Returns:
        One result a job, in order. A bad adapter is `quarantined` and the others go on; one that took the process down
        is `failed`.

    Raises:
        InvalidArgument: for a name that no adapter can have, or a group has.
        UnsupportedModel, Internal: when nothing can be checked against this base model.
    """
    for job in jobs:
        check_name(job.name, job.origin)
    with Catalog(state_dir / CATALOG_FILE) as catalog:
        for job in jobs:
            if not job.origin:  # those of a directory fail one by one
                catalog.check_free(job.name)
    limits = limits or SourceLimits()
    results: dict[int, IngestResult] = {}
    while left := [index for index in range(len(jobs)) if index not in results]:
        request = IngestRequest(str(state_dir.resolve()), base, tuple(jobs[index] for index in left), limits)
        worker = _Worker(request, progress)
        worker.run()
        for result in worker.results:  # local ones in order, remote ones as they arrive
            index = next(index for index in left if jobs[index].name == result.name)
            left.remove(index)
            results[index] = result
        if left:
            index = next((index for index in left if jobs[index].name == worker.at_work), left[0])
            results[index] = IngestResult(jobs[index].name, "failed", reason=worker.last_words)
            if progress is not None:
                progress(results[index])
    return [results[index] for index in range(len(jobs))]


def sync_directory(
    directory: Path | None,
    state_dir: Path,
    base: BaseFacts,
    progress: Progress | None = None,
    limits: SourceLimits | None = None,
) -> list[IngestResult]:
    """Make the catalog follow an --adapters directory, and tell it which base model the server runs.

    Every sub-directory is an adapter of its name; names with a leading dot are skipped. An adapter that came from this
    directory and has gone is marked removed; those added by hand stay. Folders that are as they were cost a few system
    calls each, and no process is started when all of them are.

    Raises:
        InvalidArgument: `directory` is none.
    """
    with Catalog(state_dir / CATALOG_FILE) as catalog:
        catalog.set_base(base)
        store = AdapterStore(state_dir / CACHE_DIRECTORY)
        if directory is None:
            return []
        if not directory.is_dir():
            raise InvalidArgument(f"{directory} is not a directory", field="adapters")
        origin = directory.resolve()
        with os.scandir(origin) as entries:
            folders = {entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()}
        results: list[IngestResult] = []

        def conclude(result: IngestResult) -> None:
            results.append(result)
            if progress is not None:
                progress(result)

        left = set(folders)
        for known in catalog.current_of_all(str(origin)):
            if known.name in folders and _is_as_it_was(origin / known.name, known, base, store):
                left.remove(known.name)
                conclude(result_of(known, "unchanged"))
        jobs: list[IngestJob] = []
        for name in sorted(left):
            try:
                check_name(name)
            except InvalidArgument as error:
                conclude(IngestResult(name, "failed", reason=error.message))
            else:
                jobs.append(IngestJob(name, str(origin / name), str(origin)))
        results += ingest(state_dir, base, jobs, progress, limits)
        for record in catalog.remove_absent(str(origin), folders):
            results.append(IngestResult(record.name, "removed", record.version, record.digest))
    return results


def _is_as_it_was(folder: Path, known: AdapterRecord, base: BaseFacts, store: AdapterStore) -> bool:
    """Whether sizes and times of the files say it all: none is opened here."""
    if known.status != "ready":
        return False
    try:
        with SourceDirectory(folder) as source:
            return is_unchanged(known, settled_state(source.state()), base, store)
    except (AdapterInvalid, OSError):
        return False  # the worker will meet the same, and says it


class _Worker:
    """One life of the ingest process."""

    def __init__(self, request: IngestRequest, progress: Progress | None) -> None:
        self._request = request
        self._progress = progress
        self._started = False
        self.results: list[IngestResult] = []
        self.at_work = ""  # the adapter that it began last
        self.last_words = ""

    def run(self) -> None:
        """Until it ends; `last_words` says how, for the job that has no result."""
        end = run_worker("openlora.adapters.ingest_worker", self._request, Event, self._follow)
        self.last_words = f"the ingest process ended with status {end.status}: {end.complaint}"
        if not self._started:
            raise Internal(self.last_words)

    def _follow(self, event: Event) -> None:
        self._started = True
        if isinstance(event, Started):
            self.at_work = event.name
        elif isinstance(event, IngestResult):
            self.results.append(event)
        if self._progress is not None:
            self._progress(event)
