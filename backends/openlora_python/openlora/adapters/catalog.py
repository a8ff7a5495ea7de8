"""The catalog: which adapter names mean which bytes. SQLite, written by CLI and launcher, read by the resolver."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ..errors import AdapterInvalid, AdapterNotFound, InvalidArgument
from ..transaction import transaction
from .catalog_file import open_to_write
from .catalog_rows import (
    CHAIN_NAME,
    NAME,
    AdapterRecord,
    BaseFacts,
    find,
    select,
)
from .chain_view import CHAIN_ORIGIN, ChainTerms, ChainView, write_view

RESERVED_NAMES = ("base",)
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
        self._connection = open_to_write(path)

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
            bookkeeping = replace(stored, source=same.source, source_state=same.source_state, login=same.login)
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
            "INSERT OR REPLACE INTO adapters VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL, ?)",
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
                record.login,
            ),
        )
        if record.status == "ready" and record.card:  # a name stays with a task: the card of its version has the word
            tasks = [(task, record.name) for task in record.card.get("tasks", ())]
            self._connection.executemany("INSERT OR IGNORE INTO adapter_tasks VALUES (?, ?)", tasks)
