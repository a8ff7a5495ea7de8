"""The catalog: which adapter names mean which bytes. SQLite, written by CLI and launcher, read by the resolver."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ..errors import AdapterInvalid, AdapterNotFound, InvalidArgument, Unavailable
from ..transaction import create_private, transaction
from .catalog_rows import (
    CHAIN_NAME,
    NAME,
    AdapterFilter,
    AdapterRecord,
    BaseFacts,
    Page,
    find,
    select,
    select_irreplaceable,
    select_page,
)
from .chain_view import CHAIN_ORIGIN, ChainTerms, ChainView, read_view, write_view
from .chain_view import SCHEMA as CHAIN_SCHEMA

RESERVED_NAMES = ("base",)
BUSY_SECONDS = 10.0
# 0: without `names`; the newest version of a name was its current one. 1: without a chain's view.
FORMAT = 2
SCHEMA = f"""{CHAIN_SCHEMA}
CREATE TABLE IF NOT EXISTS base (
    id INTEGER PRIMARY KEY CHECK (id = 1), path TEXT NOT NULL, digest TEXT NOT NULL, max_rank INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS names (
    name TEXT PRIMARY KEY, current INTEGER NOT NULL, pinned INTEGER NOT NULL DEFAULT 0 CHECK (pinned IN (0, 1))
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS adapter_groups (
    name TEXT PRIMARY KEY, targets TEXT NOT NULL, skip_unready INTEGER NOT NULL, changed_at INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS adapter_tasks (
    task TEXT NOT NULL, name TEXT NOT NULL, PRIMARY KEY (task, name)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS task_preferences (task TEXT PRIMARY KEY, adapter TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS adapters (
    name TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL, base TEXT NOT NULL, rank INTEGER NOT NULL,
    target_modules TEXT NOT NULL, status TEXT NOT NULL CHECK (status IN ('ready', 'quarantined')),
    reason TEXT NOT NULL, card TEXT, source TEXT NOT NULL, origin TEXT NOT NULL, source_state TEXT NOT NULL,
    added_at INTEGER NOT NULL, removed_at INTEGER,
    PRIMARY KEY (name, version)
) STRICT;
CREATE INDEX IF NOT EXISTS adapters_by_digest ON adapters (name, digest);
"""

Change = Literal["added", "updated", "unchanged"]


def check_name(name: str, origin: str = "") -> None:
    """Raises InvalidArgument for what can't be the name of an adapter from there."""
    if origin == CHAIN_ORIGIN:
        if not CHAIN_NAME.fullmatch(name):
            raise InvalidArgument(f"{name!r:.190} is not the name of a chain's adapter", field="name")
        return
    if CHAIN_NAME.fullmatch(name):
        raise InvalidArgument(f"{name!r} is a chain's: only `openlora network sync` changes it", field="name")
    if not NAME.fullmatch(name):
        raise InvalidArgument(f"{name!r:.140} is no adapter name, {NAME.pattern} is wanted", field="name")
    if name in RESERVED_NAMES:
        raise InvalidArgument(f"{name!r} is reserved for the base model", field="name")


class Catalog:
    """The writer's side: short transactions, so that any process that may write can write at any time.

    A file of an older format is brought to today's.

    Raises:
        Unavailable: the file is of a newer one.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        create_private(path)
        self._connection = _connect(path)
        self._connection.execute("PRAGMA journal_mode = WAL")
        before = _format(self._connection, path)
        self._connection.executescript(SCHEMA)
        if before < FORMAT:
            self._migrate(path)

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
        with transaction(self._connection):
            self._connection.execute(
                "INSERT INTO base VALUES (1, ?, ?, ?) ON CONFLICT DO UPDATE SET "
                "path = excluded.path, digest = excluded.digest, max_rank = excluded.max_rank",
                (base.path, base.digest, base.max_rank),
            )

    def current(self, name: str, origin: str) -> AdapterRecord | None:
        """What an adapter from `origin` would replace: its newest version from there, or else the current one."""
        mine = self._newest("n.name = ? AND a.origin = ?", name, origin) if origin else None
        return mine or self._newest("n.name = ? AND a.version = n.current", name)

    def current_of_all(self, origin: str) -> Iterator[AdapterRecord]:
        """`current` of every name, one after the other."""
        return select(
            self._connection,
            "a.version = coalesce((SELECT max(mine.version) FROM adapters AS mine "
            "WHERE mine.name = n.name AND mine.origin = ? AND mine.removed_at IS NULL), n.current)",
            (origin,),
        )

    def put(self, record: AdapterRecord) -> tuple[AdapterRecord, Change]:
        """Store what was found; `record.version` is ignored.

        The bytes that a name already means keep their version (their card, status or base may change); others become
        its next version, and the current one.

        Raises:
            InvalidArgument: the name is a group's.
        """
        with transaction(self._connection):
            same = self._same(record)
            if same is None:
                (last,) = self._connection.execute(
                    "SELECT coalesce(max(version), 0) FROM adapters WHERE name = ?", (record.name,)
                ).fetchone()
                stored = replace(record, version=last + 1, added_at=int(time.time()))
                self._write(stored)
                self._connection.execute(
                    "INSERT INTO names (name, current) VALUES (?, ?) "
                    "ON CONFLICT DO UPDATE SET current = excluded.current",
                    (stored.name, stored.version),
                )
                return self._newest("n.name = ?", stored.name), "added"
            stored = replace(
                record,
                version=same.version,
                origin=same.origin,
                added_at=same.added_at,
                pinned=same.pinned,
                current=same.current,
            )
            if stored == same:
                return same, "unchanged"
            self._write(stored)
            bookkeeping = replace(stored, source=same.source, source_state=same.source_state)
            return stored, "unchanged" if bookkeeping == same else "updated"

    def use(self, name: str, version: int | str) -> AdapterRecord:
        """From the next request on, `name` alone means this version; requests that run keep theirs.

        Raises:
            AdapterNotFound, InvalidArgument: as `CatalogReader.lookup`.
            AdapterInvalid: it is quarantined; the name keeps its version.
        """
        with transaction(self._connection):
            record = find(self._connection, name, version)
            if record.status != "ready":
                raise AdapterInvalid(record.reason, field=f"adapter {name} version {record.version}")
            if not record.current:
                self._connection.execute("UPDATE names SET current = ? WHERE name = ?", (record.version, name))
            return find(self._connection, name, None)

    def follow_chain(self, view: ChainView, terms: Sequence[ChainTerms]) -> list[AdapterRecord]:
        """From the next request on, a chain's adapters are those of `terms`, in the order of their registration.

        Of several with one name, the last that is here and ready answers for it. What is gone is marked removed, and
        returned.
        """
        with transaction(self._connection):
            write_view(self._connection, view, terms)
            here = list(select(self._connection, "a.origin = ?", (CHAIN_ORIGIN,)))
            gone = [record for record in here if record.card is None]
            self._remove(gone)
            order = {(one.name, one.digest): place for place, one in enumerate(terms)}
            left = [record for record in here if record.card is not None]
            left.sort(key=lambda record: (record.status == "ready", order[record.name, record.digest]))
            answering = {record.name: record for record in left}
            for record in answering.values():
                self._connection.execute(
                    "UPDATE names SET current = ? WHERE name = ? AND current <> ?",
                    (record.version, record.name, record.version),
                )
        return gone

    def has(self, name: str, digest: str) -> bool:
        """Whether these bytes are a version of that name, in force or not."""
        return self._newest("n.name = ? AND a.digest = ?", name, digest) is not None

    def cards(self, containing: str) -> Iterator[dict[str, Any]]:
        """All different cards with this text in their JSON, those of a chain included."""
        rows = self._connection.execute(
            "SELECT card FROM adapters WHERE removed_at IS NULL AND origin <> ? AND instr(card, ?) "
            "UNION SELECT card FROM chain_terms WHERE instr(card, ?)",
            (CHAIN_ORIGIN, containing, containing),
        )
        return (json.loads(card) for (card,) in rows)

    def learn(self, name: str, digest: str, rank: int, target_modules: Collection[str]) -> None:
        """What the bytes of a version say, in place of what was said of them before they were here."""
        found = (rank, " ".join(target_modules))
        self._connection.execute(
            "UPDATE adapters SET rank = ?, target_modules = ? "
            "WHERE name = ? AND digest = ? AND removed_at IS NULL AND (rank, target_modules) <> (?, ?)",
            (*found, name, digest, *found),
        )

    def quarantine(self, digest: str, base: str, reason: str) -> None:
        """The bytes of every version with this digest can't be applied to the base model `base`."""
        self._connection.execute(
            "UPDATE adapters SET status = 'quarantined', reason = ?, source_state = '' "
            "WHERE digest = ? AND base = ? AND status = 'ready' AND removed_at IS NULL",
            (reason, digest, base),
        )

    def pin(self, name: str, pinned: bool = True) -> None:
        """Ask that the current version of `name`, whichever that is, stays in memory, or no longer.

        Raises:
            AdapterNotFound: no such name.
        """
        with transaction(self._connection):
            if find(self._connection, name, None).pinned != pinned:
                self._connection.execute("UPDATE names SET pinned = ? WHERE name = ?", (pinned, name))

    def remove(self, name: str, version: int | None = None) -> list[AdapterRecord]:
        """Mark one version, or all of them, removed; their bytes stay in the cache for requests that run.

        When the current version goes, the newest that is left takes its place. A name without versions loses its pin.

        Raises:
            AdapterNotFound: when there is nothing to remove.
        """
        with transaction(self._connection):
            active = select(self._connection, "n.name = ?", (name,))
            gone = [record for record in active if version in (None, record.version)]
            if not gone:
                raise AdapterNotFound(f"no adapter {name!r}" + (f" version {version}" if version else ""))
            self._remove(gone)
        return gone

    def remove_absent(self, origin: str, present: Collection[str]) -> list[AdapterRecord]:
        """Mark removed what came from `origin` under other names than `present`; what that was."""
        with transaction(self._connection):
            names = self._connection.execute(
                "SELECT DISTINCT name FROM adapters WHERE origin = ? AND removed_at IS NULL ORDER BY name", (origin,)
            ).fetchall()
            gone = [
                record
                for (name,) in names
                if name not in present
                for record in select(self._connection, "n.name = ? AND a.origin = ?", (name, origin))
            ]
            self._remove(gone)
        return gone

    def check_free(self, name: str) -> None:
        """Raises InvalidArgument when `openlora routes` gave this name to a group: no adapter can have it then."""
        if self._connection.execute("SELECT 1 FROM adapter_groups WHERE name = ?", (name,)).fetchone():
            raise InvalidArgument(f"{name!r} is a group of adapters, see `openlora routes list`", field="name")

    def _same(self, record: AdapterRecord) -> AdapterRecord | None:
        """The version with the bytes of `record`, if its name means them.

        By hand, that is its current version. For a directory it is also the one that came from there last, and before
        the first any version at all: a start of the server must not move a name that was moved by hand.
        """
        candidates = [self.current(record.name, record.origin), self.current(record.name, "")]
        if record.origin and (candidates[0] is None or candidates[0].origin != record.origin):  # nothing from there yet
            candidates.append(self._newest("n.name = ? AND a.digest = ?", record.name, record.digest))
        return next((old for old in candidates if old is not None and old.digest == record.digest), None)

    def _newest(self, condition: str, *values: str) -> AdapterRecord | None:
        return next(select(self._connection, condition, values, tail="ORDER BY a.version DESC LIMIT 1"), None)

    def _remove(self, records: list[AdapterRecord]) -> None:
        now = int(time.time())
        self._connection.executemany(
            "UPDATE adapters SET removed_at = ? WHERE name = ? AND version = ?",
            [(now, record.name, record.version) for record in records],
        )
        for name in {record.name for record in records}:
            newest = self._newest("n.name = ?", name)
            if newest is None:
                self._connection.execute("DELETE FROM names WHERE name = ?", (name,))
            elif self.current(name, "") is None:
                self._connection.execute("UPDATE names SET current = ? WHERE name = ?", (newest.version, name))

    def _write(self, record: AdapterRecord) -> None:
        """Raises InvalidArgument when the name is a group's."""
        self.check_free(record.name)
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
        if record.status == "ready" and record.card:  # a name stays with a task: the card of its version has the word
            tasks = [(task, record.name) for task in record.card.get("tasks", ())]
            self._connection.executemany("INSERT OR IGNORE INTO adapter_tasks VALUES (?, ?)", tasks)

    def _migrate(self, path: Path) -> None:
        with transaction(self._connection):
            if _format(self._connection, path) == FORMAT:
                return  # another process was faster
            if _format(self._connection, path) == 0:
                self._connection.execute(
                    "INSERT INTO names (name, current) "
                    "SELECT name, max(version) FROM adapters WHERE removed_at IS NULL GROUP BY name"
                )
            self._connection.execute(f"PRAGMA user_version = {FORMAT}")


class CatalogReader:
    """The resolver's side: every call sees what is committed at that moment, by whichever process."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise Unavailable(f"no adapter catalog at {path}: `openlora serve` and `openlora adapters add` make one")
        self._connection = _connect(path)
        if _format(self._connection, path) < FORMAT:
            with Catalog(path):
                pass  # that brings it to today's format
        self._connection.execute("PRAGMA query_only = ON")
        self._lock = threading.RLock()

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """`find`, `lookup` and `chain_view` of this thread see one state of the catalog; other threads wait."""
        with self._lock:
            self._connection.execute("BEGIN")
            try:
                yield
            finally:
                self._connection.execute("COMMIT")

    def chain_view(self) -> ChainView | None:
        """The block that requests go by; None: no chain was ever followed."""
        with self._lock:
            return read_view(self._connection)

    def close(self) -> None:
        self._connection.close()

    def lookup(self, name: str, version: int | str | None = None) -> AdapterRecord:
        """The version of `name` that a request means.

        Args:
            version: a number, the first 8 or more hex digits of a digest, or None for the current one.

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
        with self._lock:
            return find(self._connection, name, version)

    def names(self) -> list[str]:
        """Names that answer: those whose current version is ready."""
        return [record.name for record in self.page(AdapterFilter(status="ready", current=True)).records]

    def records(self) -> list[AdapterRecord]:
        """All versions that aren't removed, by name and version."""
        return self.page().records

    def irreplaceable(self) -> set[str]:
        """Digests that a version needs and no remote source could bring again (local ones, merges), and pinned ones.

        Quarantined ones too: another base model may make them ready.
        """
        with self._lock:
            return select_irreplaceable(self._connection)

    def page(self, wanted: AdapterFilter | None = None, after: str = "", limit: int | None = None) -> Page:
        """The versions that are `wanted` (None: all) of at most `limit` names (None: all) that sort after `after`."""
        with self._lock, self._connection:
            self._connection.execute("BEGIN")  # both queries of a page see the same
            return select_page(self._connection, wanted or AdapterFilter(), after, limit)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _format(connection: sqlite3.Connection, path: Path) -> int:
    (number,) = connection.execute("PRAGMA user_version").fetchone()
    if number > FORMAT:
        raise Unavailable(f"{path} is of format {number}, made by a newer OpenLoRA; this one reads up to {FORMAT}")
    return number
