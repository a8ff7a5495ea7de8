"""What `openlora adapters add` and `fetch` ask the ingest process for, and what they make of its answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import AdapterInvalid, AdapterNotFound, InvalidArgument, Unavailable
from .catalog_rows import BaseFacts
from .chain_view import CHAIN_ORIGIN
from .ingest import Progress, ingest
from .ingest_worker import CACHE_DIRECTORY, IngestJob, IngestResult, known_records
from .missing_files import MERGE_PREFIX, not_fetchable
from .sources import SourceLimits, SourceUri, is_uri, parse_uri
from .store import AdapterStore

DIGEST = re.compile(r"[0-9a-f]{64}")


def job_of(source: str, name: str | None, digest: str = "", lazy: bool = False) -> IngestJob:
    """The job for a path or URI; `name` defaults to its last part.

    Raises:
        InvalidArgument: a URI that nothing can be read from, a digest that is none, or what can't be `lazy`.
    """
    if digest and not DIGEST.fullmatch(digest.lower()):
        raise InvalidArgument(f"{digest!r:.80}: 64 hex digits are wanted", field="digest")
    if is_uri(source):
        uri = parse_uri(source)
        if lazy:
            _check_lazy(uri, digest)
        return IngestJob(uri.name if name is None else name, uri.parts.geturl(), digest=digest.lower(), lazy=lazy)
    if lazy:
        raise InvalidArgument(f"{source:.200} is on this machine: only a URI's bytes can come later", field="lazy")
    path = Path(source).resolve()
    return IngestJob(path.name if name is None else name, str(path), digest=digest.lower())


def _check_lazy(uri: SourceUri, digest: str) -> None:
    if not digest:
        raise InvalidArgument(
            "a digest is wanted, too (--digest): it is what makes bytes that come later trustworthy", field="lazy"
        )
    if uri.has_login:
        raise InvalidArgument(
            "this URI has a user name, a password or a query, which are never stored, so its bytes could not be had "
            "later: give the login in ~/.netrc or the environment",
            field="lazy",
        )


def fetch_evicted(
    state_dir: Path,
    base: BaseFacts,
    names: Sequence[str],
    progress: Progress | None = None,
    limits: SourceLimits | None = None,
) -> list[IngestResult]:
    """Bring back the bytes of all ready versions of `names` (none = of every name) that aren't in the cache.

    Those of merges are `failed`: they came from nowhere.

    Raises:
        AdapterNotFound: for a name that has no ready version.
    """
    store = AdapterStore(state_dir / CACHE_DIRECTORY)
    ready = [record for record in known_records(state_dir) if record.status == "ready"]
    if unknown := sorted(set(names) - {record.name for record in ready}):
        raise AdapterNotFound(f"no adapter {unknown[0]!r} is ready")
    gone = [record for record in ready if (not names or record.name in names) and not store.holds(record.digest)]
    merged = [record for record in gone if record.source.startswith(MERGE_PREFIX)]
    jobs = [
        IngestJob(
            record.name,
            record.source,
            CHAIN_ORIGIN if record.origin == CHAIN_ORIGIN else "",
            digest=record.digest,
            restores=record.version,
        )
        for record in gone
        if record not in merged
    ]
    return ingest(state_dir, base, jobs, progress, limits) + [
        IngestResult(record.name, "failed", record.version, record.digest, reason=not_fetchable(record))
        for record in merged
    ]


def check_result(result: IngestResult) -> None:
    """Raises AdapterInvalid or Unavailable for what isn't ready."""
    if result.status == "quarantined":
        raise AdapterInvalid(result.reason, field=f"adapter {result.name}")
    if result.status == "failed":
        raise Unavailable(f"adapter {result.name}: {result.reason}")
