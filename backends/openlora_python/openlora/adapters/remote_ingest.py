"""Adapters from remote sources: several downloads beside each other, each then brought in like a local directory.

A source stays locked until its adapter is in the catalog, so whoever waited for it finds it there. The cache's own lock
is only taken for that last step: adding local adapters, and a server's start, wait for no download.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from ..errors import AdapterInvalid, OpenLoRAError
from .catalog_rows import AdapterRecord
from .chain_view import CHAIN_ORIGIN
from .fetch import Advance, FetchArea, Part, Wanted, fetch
from .ingest_worker import (
    REPORT_BYTES,
    Downloaded,
    Fetched,
    Ingester,
    IngestJob,
    IngestResult,
    Report,
    Started,
    known_records,
)
from .lora_config import MAX_CONFIG_BYTES
from .manifest import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from .sources import SourceLimits, SourceUri, parse_uri
from .store import MAX_CARD_BYTES, AdapterStore


def bring_in_remote(jobs: Sequence[IngestJob], remote: RemoteIngest, parallel: int, report: Report) -> None:
    """All of them, each reported as soon as it is done.

    Raises:
        UnsupportedModel: the base model can't be checked against.
    """
    remote.sweep()
    with ThreadPoolExecutor(parallel) as pool:
        waiting = {pool.submit(remote.download, job): job for job in jobs}
        for done in as_completed(waiting):
            job = waiting[done]
            report(Started(job.name))
            report(remote.bring_in(job, done))
    remote.sweep()


@dataclass(frozen=True)
class Arrived:
    """What is at a source, which stays locked until `part` is released: new files, or a known adapter."""

    part: Part
    files: Fetched | AdapterRecord


class RemoteIngest:
    """Downloads adapters in any number of threads, and brings in what arrived in the main one."""

    def __init__(
        self, ingester: Ingester, store: AdapterStore, state_dir: Path, limits: SourceLimits, report: Report
    ) -> None:
        self._area = FetchArea(store.directory, limits)
        self._ingester = ingester
        self._store = store
        self._state_dir = state_dir
        self._limits = limits
        self._report = report

    def sweep(self) -> None:
        """Remove interrupted downloads that are too old or too many."""
        self._area.sweep()

    def download(self, job: IngestJob) -> Arrived:
        """Raises what `fetch` does, without anything secret of the URI."""
        uri = parse_uri(job.source)
        part = self._area.alone(uri)
        keep = False
        try:
            found = self._already(job) or fetch(
                uri, part.directory, self._wanted(uri, job), self._limits, self._advance(job)
            )
        except OpenLoRAError as error:
            keep = not isinstance(error, AdapterInvalid) and part.resumable
            part.release(keep)
            raise type(error)(uri.redacted(error.message)) from None
        except BaseException:
            part.release(keep=False)
            raise
        if isinstance(found, AdapterRecord):
            return Arrived(part, found)
        return Arrived(part, Fetched(uri.public, part.directory, found, uri.has_login))

    def bring_in(self, job: IngestJob, done: Future[Arrived]) -> IngestResult:
        """What `download` brought, or raised, to its end."""
        try:
            arrived = done.result()
        except AdapterInvalid as error:
            return IngestResult(job.name, "quarantined", reason=error.message)
        except OpenLoRAError as error:
            return IngestResult(job.name, "failed", reason=error.message)
        except OSError as error:  # a full disk
            return IngestResult(job.name, "failed", reason=str(error))
        try:
            with self._store.writing():
                if isinstance(arrived.files, AdapterRecord):
                    return self._ingester.name_again(job, arrived.files)
                if job.lazy:
                    return self._ingester.announce(job, arrived.files)
                return self._ingester.bring_in(job, arrived.files)
        finally:
            arrived.part.release(keep=False)

    def _already(self, job: IngestJob) -> AdapterRecord | None:
        """The version whose bytes are to come back, when somebody else was faster."""
        if not job.restores or not self._store.holds(job.digest):
            return None
        self._store.touch(job.digest)
        return next((known for known in known_records(self._state_dir) if known.digest == job.digest), None)

    def _wanted(self, uri: SourceUri, job: IngestJob) -> Wanted:
        def known(state: str) -> AdapterRecord | None:
            mine = [
                record
                for record in known_records(self._state_dir)
                if record.source == uri.public and (record.origin == CHAIN_ORIGIN) == (job.origin == CHAIN_ORIGIN)
            ]
            found = next((old for old in mine[::-1] if self._ingester.is_current(old, state, job.digest)), None)
            if found is not None:
                self._store.touch(found.digest)  # so that nobody evicts it before it has its name
            return found

        largest = {
            CONFIG_FILE: MAX_CONFIG_BYTES,
            CARD_FILE: MAX_CARD_BYTES,
            WEIGHTS_FILE: self._ingester.largest_weights,
        }
        room = self._ingester.room.check
        if job.restores:  # by its digest: neither its terms nor a state of the source have a say
            return Wanted(largest, room, lambda state: None, files=(CONFIG_FILE, WEIGHTS_FILE))
        if job.lazy:
            return Wanted(largest, lambda size: None, known, unread=(WEIGHTS_FILE,))
        return Wanted(largest, room, known)

    def _advance(self, job: IngestJob) -> Advance:
        reported = 0

        def advance(done: int, total: int | None) -> None:
            nonlocal reported
            if done - reported >= REPORT_BYTES or done == total or done < reported:
                reported = done
                self._report(Downloaded(job.name, done, total))

        return advance
