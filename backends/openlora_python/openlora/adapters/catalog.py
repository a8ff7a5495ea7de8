"""The catalog: which adapter names mean which bytes. SQLite, written by CLI and launcher, read by the resolver."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..errors import AdapterInvalid, AdapterNotFound, InvalidArgument, Unavailable

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
RESERVED_NAMES = ("base",)
DIGEST_PREFIX = re.compile(r"[0-9a-f]{8,64}")
BUSY_SECONDS = 10.0
SCHEMA = """
CREATE TABLE IF NOT EXISTS base (
    id INTEGER PRIMARY KEY CHECK (id = 1), path TEXT NOT NULL, digest TEXT NOT NULL, max_rank INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS adapters (
    name TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL, base TEXT NOT NULL, rank INTEGER NOT NULL,
    target_modules TEXT NOT NULL, status TEXT NOT NULL CHECK (status IN ('ready', 'quarantined')),
    reason TEXT NOT NULL, card TEXT, source TEXT NOT NULL, origin TEXT NOT NULL, source_state TEXT NOT NULL,
    added_at INTEGER NOT NULL, removed_at INTEGER,
    PRIMARY KEY (name, version)
) STRICT;
"""

Status = Literal["ready", "quarantined"]
Change = Literal["added", "updated", "unchanged"]


@dataclass(frozen=True)
class AdapterRecord:
    """One version of an adapter."""

    name: str
    version: int  # from 1 on
    digest: str  # manifest digest; empty when the files could not even be read
    rank: int
    status: Status
    reason: str  # why it is quarantined
    card: dict[str, Any] | None  # openlora.json
    target_modules: tuple[str, ...] = ()
    base: str = ""  # digest of the base model that it was checked against
    source: str = ""  # where it was copied from
    origin: str = ""  # the --adapters directory it belongs to; empty = added by hand
    added_at: int = 0  # seconds since 1970
    source_state: str = ""  # sizes, times and inodes of the source, when they prove that it hasn't changed


@dataclass(frozen=True)
class BaseFacts:
    """The base model that adapters of this catalog are checked against."""

    path: str
    digest: str
    max_rank: int


def check_name(name: str) -> None:
    """Raises InvalidArgument for what can't be an adapter's name."""
    if not NAME.fullmatch(name):
        raise InvalidArgument(f"{name!r:.140} is no adapter name, {NAME.pattern} is wanted", field="name")
    if name in RESERVED_NAMES:
        raise InvalidArgument(f"{name!r} is reserved for the base model", field="name")


class Catalog:
    """The writer's side: short transactions, so that any process that may write can write at any time."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        self._connection = _connect(path)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.executescript(SCHEMA)

    def __enter__(self) -> Catalog:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def base(self) -> BaseFacts | None:
        row = self._connection.execute("SELECT path, digest, max_rank FROM base").fetchone()
        return BaseFacts(*row) if row else None

    def set_base(self, base: BaseFacts) -> None:
        """From now on adapters are checked against `base`; those checked against another one no longer resolve."""
        if self.base() == base:
            return
        with self._transaction():
            self._connection.execute(
                "INSERT INTO base VALUES (1, ?, ?, ?) ON CONFLICT DO UPDATE SET "
                "path = excluded.path, digest = excluded.digest, max_rank = excluded.max_rank",
                (base.path, base.digest, base.max_rank),
            )

    def current(self, name: str, origin: str) -> AdapterRecord | None:
        """What an adapter from `origin` would replace: its newest version from there, or else its newest one."""
        active = _records(self._connection, name=name)
        mine = [record for record in active if origin and record.origin == origin]
        return (mine or active or [None])[-1]

    def put(self, record: AdapterRecord) -> tuple[AdapterRecord, Change]:
        """Store what was found; `record.version` is ignored.

        The bytes that a name already means keep their version (their card, status or base may change); others become
        its next version.
        """
        with self._transaction():
            active = _records(self._connection, name=record.name)
            candidates = active[-1:] + [old for old in active if record.origin and old.origin == record.origin][-1:]
            same = next((old for old in candidates if old.digest == record.digest), None)
            if same is None:
                (last,) = self._connection.execute(
                    "SELECT coalesce(max(version), 0) FROM adapters WHERE name = ?", (record.name,)
                ).fetchone()
                stored = replace(record, version=last + 1, added_at=int(time.time()))
                self._write(stored)
                return stored, "added"
            stored = replace(record, version=same.version, origin=same.origin, added_at=same.added_at)
            if stored == same:
                return same, "unchanged"
            self._write(stored)
            bookkeeping = replace(stored, source=same.source, source_state=same.source_state)
            return stored, "unchanged" if bookkeeping == same else "updated"

    def remove(self, name: str, version: int | None = None) -> list[AdapterRecord]:
        """Mark one version, or all of them, removed; their bytes stay in the cache for requests that run.

        Raises:
            AdapterNotFound: when there is nothing to remove.
        """
        with self._transaction():
            active = _records(self._connection, name=name)
            gone = [record for record in active if version in (None, record.version)]
            if not gone:
                raise AdapterNotFound(f"no adapter {name!r}" + (f" version {version}" if version else ""))
            self._connection.executemany(
                "UPDATE adapters SET removed_at = ? WHERE name = ? AND version = ?",
                [(int(time.time()), record.name, record.version) for record in gone],
            )
        return gone

    def from_origin(self, origin: str) -> list[AdapterRecord]:
        return _records(self._connection, origin=origin)

    def _write(self, record: AdapterRecord) -> None:
        self._connection.execute(
            "INSERT OR REPLACE INTO adapters VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)",
            (
                record.name,
                record.version,
                record.digest,
                record.base,
                record.rank,
                " ".join(record.target_modules),
                record.status,
                record.reason,
                None if record.card is None else json.dumps(record.card),
                record.source,
                record.origin,
                record.source_state,
                record.added_at,
            ),
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")


class CatalogReader:
    """The resolver's side: everything in memory, read again only when another process has changed the file."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise Unavailable(f"no adapter catalog at {path}: `openlora serve` and `openlora adapters add` make one")
        self._connection = _connect(path)
        self._connection.execute("PRAGMA query_only = ON")
        self._lock = threading.Lock()
        self._data_version: int | None = None
        self._versions: dict[str, dict[int, AdapterRecord]] = {}

    def close(self) -> None:
        self._connection.close()

    def lookup(self, name: str, version: int | str | None = None) -> AdapterRecord:
        """The version of `name` that a request means.

        Args:
            version: a number, the first 8 or more hex digits of a digest, or None for the newest.

        Raises:
            AdapterNotFound: no such name or version, or removed.
            AdapterInvalid: quarantined; the message is the reason.
            InvalidArgument: `version` is no version, or a digest prefix that fits several versions' bytes.
        """
        record = self.find(name, version)
        if record.status != "ready":
            raise AdapterInvalid(record.reason, field=f"adapter {name}")
        return record

    def find(self, name: str, version: int | str | None = None) -> AdapterRecord:
        """As `lookup`, but quarantined ones as well."""
        versions = self._fresh().get(name)
        if not versions:
            raise AdapterNotFound(f"no adapter {name!r}")
        record = versions[max(versions)] if version is None else _chosen(versions, version)
        if record is None:
            raise AdapterNotFound(f"no adapter {name!r} version {version!r}")
        return record

    def names(self) -> list[str]:
        """Names that answer: those whose newest version is ready."""
        return sorted(name for name, kept in self._fresh().items() if kept[max(kept)].status == "ready")

    def records(self) -> list[AdapterRecord]:
        """All versions that aren't removed, by name and version."""
        return [record for versions in self._fresh().values() for record in versions.values()]

    def _fresh(self) -> dict[str, dict[int, AdapterRecord]]:
        with self._lock:
            (data_version,) = self._connection.execute("PRAGMA data_version").fetchone()
            if data_version != self._data_version:
                versions: dict[str, dict[int, AdapterRecord]] = {}
                for record in _against_base(self._connection):
                    versions.setdefault(record.name, {})[record.version] = record
                self._versions, self._data_version = versions, data_version
            return self._versions


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _records(connection: sqlite3.Connection, name: str | None = None, origin: str | None = None) -> list[AdapterRecord]:
    rows = connection.execute(
        "SELECT name, version, digest, rank, status, reason, card, target_modules, base, source, origin, added_at, "
        "source_state FROM adapters WHERE removed_at IS NULL AND (?1 IS NULL OR name = ?1) "
        "AND (?2 IS NULL OR origin = ?2) ORDER BY name, version",
        (name, origin),
    )
    return [
        AdapterRecord(*row[:6], None if row[6] is None else json.loads(row[6]), tuple(row[7].split()), *row[8:])
        for row in rows
    ]


def _against_base(connection: sqlite3.Connection) -> list[AdapterRecord]:
    """As stored, except that what was checked against another base or a higher rank limit is quarantined."""
    connection.execute("BEGIN")
    row = connection.execute("SELECT digest, max_rank FROM base").fetchone()
    records = _records(connection)
    connection.execute("COMMIT")
    if row is None:
        return records
    return [_checked(record, *row) for record in records]


def _checked(record: AdapterRecord, base: str, max_rank: int) -> AdapterRecord:
    if record.status != "ready":
        return record
    if record.base != base:
        reason = f"checked against base model {record.base[:16]}…, this server runs {base[:16]}…: add it again"
        return replace(record, status="quarantined", reason=reason)
    if record.rank > max_rank:
        return replace(record, status="quarantined", reason=f"rank {record.rank} is over the limit of {max_rank}")
    return record


def _chosen(versions: dict[int, AdapterRecord], version: int | str) -> AdapterRecord | None:
    if isinstance(version, str) and version.isdecimal() and len(version) < 8:
        version = int(version)
    if isinstance(version, int):
        return versions.get(version)
    if not DIGEST_PREFIX.fullmatch(version):
        raise InvalidArgument(
            f"version {version!r:.80} is neither a number nor the first 8 to 64 hex digits of a digest",
            field="adapters",
        )
    fitting = [record for record in versions.values() if record.digest.startswith(version)]
    if len({record.digest for record in fitting}) > 1:
        raise InvalidArgument(f"version {version!r} fits several versions; give more digits", field="adapters")
    return fitting[-1] if fitting else None
