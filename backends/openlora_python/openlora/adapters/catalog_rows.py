"""Rows of the catalog as records, the same for its writer and its readers: what a version is, which ones are asked for.

Nothing is kept in memory: every question is one indexed query, so that a change is seen at once, costs nobody a
re-read, and ten thousand adapters take no more memory than ten.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..errors import AdapterNotFound, InvalidArgument
from .chain_view import CHAIN_ORIGIN

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
CHAIN_NAME = re.compile(rf"0x[0-9a-fA-F]{{40}}/{NAME.pattern}")  # `<owner>/<name>`: the network's sync alone makes them
DIGEST_PREFIX = re.compile(r"[0-9a-f]{8,64}")
AFTER_HEX = "g"  # sorts after every string of hex digits
MAX_VERSION = 2**63 - 1
# The order is fixed (CROSS), so that pages come sorted out of both primary keys.
FROM = (
    "FROM names AS n CROSS JOIN adapters AS a ON a.name = n.name LEFT JOIN base AS b ON b.id = 1 "
    "LEFT JOIN chain_terms AS t ON t.name = a.name AND t.digest = a.digest"
)
COLUMNS = (
    "a.name, a.version, a.digest, a.rank, a.status, a.reason, "
    f"CASE a.origin WHEN '{CHAIN_ORIGIN}' THEN t.card ELSE a.card END, a.target_modules, a.base, a.source, a.origin, "
    "a.added_at, a.source_state, a.login, a.version = n.current AND n.pinned, a.version = n.current, "
    "b.digest, b.max_rank"
)
IN_FORCE = f"(a.origin <> '{CHAIN_ORIGIN}' OR t.card IS NOT NULL)"  # what left the chain's view answers no more
IS_READY = "(a.status = 'ready' AND (b.id IS NULL OR (a.base = b.digest AND a.rank <= b.max_rank)))"  # as `checked`

Status = Literal["ready", "quarantined"]


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
    origin: str = ""  # the --adapters directory it belongs to, or CHAIN_ORIGIN; empty = added by hand
    added_at: int = 0  # seconds since 1970
    source_state: str = ""  # sizes, times and inodes of the source, when they prove that it hasn't changed
    login: bool = False  # its URI had a login, which isn't stored: nobody can fetch it again
    # What its name says of it today; two records of the same version are equal whatever that is.
    pinned: bool = field(default=False, compare=False)  # the current version of a pinned name
    current: bool = field(default=False, compare=False)  # answers for the bare name


@dataclass(frozen=True)
class BaseFacts:
    """The base model that adapters of this catalog are checked against."""

    path: str
    digest: str
    max_rank: int


@dataclass(frozen=True)
class AdapterFilter:
    """Which versions are wanted; what is left out does not matter."""

    name: str | None = None  # a glob of SQLite's: * ? [a-z], case matters
    status: Status | None = None
    target: str | None = None  # one of its target modules
    pinned: bool = False  # only those of pinned names
    current: bool = False  # only those that answer for their name

    def condition(self) -> tuple[str, list[str]]:
        """SQL, and the values in it."""
        parts, values = ["a.removed_at IS NULL", IN_FORCE], []
        if self.name is not None:
            parts.append("n.name GLOB ?")
            values.append(self.name)
        if self.status is not None:
            parts.append(IS_READY if self.status == "ready" else f"NOT {IS_READY}")
        if self.target is not None:
            parts.append("instr(' ' || a.target_modules || ' ', ' ' || ? || ' ')")
            values.append(self.target)
        if self.pinned:
            parts.append("n.pinned")
        if self.current:
            parts.append("a.version = n.current")
        return " AND ".join(parts), values


@dataclass(frozen=True)
class Page:
    """Versions by name and number. `more` = there are names after the last one."""

    records: list[AdapterRecord]
    more: bool


def is_adapter_name(name: str) -> bool:
    """Whether it can be that of an adapter, of this node's own or of a chain's."""
    return NAME.fullmatch(name) is not None or CHAIN_NAME.fullmatch(name) is not None


def select(
    connection: sqlite3.Connection,
    condition: str,
    values: Sequence[str | int] = (),
    tail: str = "ORDER BY n.name, a.version",
) -> Iterator[AdapterRecord]:
    """One after the other, as stored: what they were checked against may be another base than today's."""
    rows = connection.execute(f"SELECT {COLUMNS} {FROM} WHERE a.removed_at IS NULL AND {condition} {tail}", values)
    return map(_stored, rows)


def select_page(connection: sqlite3.Connection, wanted: AdapterFilter, after: str, limit: int | None) -> Page:
    """All wanted versions of the first `limit` names after `after` that have one. Within the caller's transaction."""
    condition, values = wanted.condition()
    condition, values, more = f"{condition} AND n.name > ?", [*values, after], False
    if limit is not None:
        names = connection.execute(
            f"SELECT DISTINCT n.name {FROM} WHERE {condition} ORDER BY n.name LIMIT ?", (*values, limit + 1)
        ).fetchall()
        more = len(names) > limit
        if more:
            condition, values = f"{condition} AND n.name < ?", [*values, names[limit][0]]
    rows = connection.execute(f"SELECT {COLUMNS} {FROM} WHERE {condition} ORDER BY n.name, a.version", values)
    return Page([_checked(row) for row in rows], more)


def select_irreplaceable(connection: sqlite3.Connection) -> set[str]:
    """See `CatalogReader.irreplaceable`. Not by way of records: a request may wait for this."""
    rows = connection.execute(
        f"SELECT DISTINCT a.digest {FROM} WHERE a.removed_at IS NULL "
        "AND (NOT instr(a.source, '://') OR a.login OR (n.pinned AND a.version = n.current))"
    )
    return {digest for (digest,) in rows}


def find(connection: sqlite3.Connection, name: str, version: int | str | None) -> AdapterRecord:
    """The version of `name` that is meant, quarantined when it does not fit the base of today.

    Args:
        version: a number, the first 8 or more hex digits of a digest, or None for the current one.

    Raises:
        AdapterNotFound: no such name or version, or removed.
        InvalidArgument: `version` is no version, or a digest prefix that fits several versions' bytes.
    """
    if not is_adapter_name(name):
        raise AdapterNotFound(f"no adapter {name!r:.140}")
    number = version if version is None or isinstance(version, int) else _number(connection, name, version)
    if number is None and version is None:
        condition, values = "a.version = n.current", (name,)
    elif number is not None and 0 < number <= MAX_VERSION:
        condition, values = "a.version = ?", (name, number)
    else:
        raise AdapterNotFound(f"no adapter {name!r} version {version!r}")
    row = connection.execute(
        f"SELECT {COLUMNS} {FROM} WHERE a.removed_at IS NULL AND {IN_FORCE} AND n.name = ? AND {condition}", values
    ).fetchone()
    if row is None:
        raise AdapterNotFound(f"no adapter {name!r}" + ("" if version is None else f" version {version!r}"))
    return _checked(row)


def _number(connection: sqlite3.Connection, name: str, version: str) -> int | None:
    """The number of a version that is given as text."""
    if version.isdecimal() and len(version) < 8:
        return int(version)
    if not DIGEST_PREFIX.fullmatch(version):
        raise InvalidArgument(
            f"version {version!r:.80} is neither a number nor the first 8 to 64 hex digits of a digest",
            field="adapters",
        )
    first, last, newest = connection.execute(
        "SELECT min(digest), max(digest), max(version) FROM adapters "
        "WHERE name = ? AND removed_at IS NULL AND digest >= ? AND digest < ?",
        (name, version, version + AFTER_HEX),
    ).fetchone()
    if first != last:
        raise InvalidArgument(f"version {version!r} fits several versions; give more digits", field="adapters")
    return newest


def _stored(row: tuple[Any, ...]) -> AdapterRecord:
    card = None if row[6] is None else json.loads(row[6])
    return AdapterRecord(*row[:6], card, tuple(row[7].split()), *row[8:13], *map(bool, row[13:16]))


def _checked(row: tuple[Any, ...]) -> AdapterRecord:
    """As stored, except that what was checked against another base or a higher rank limit is quarantined."""
    record, base, max_rank = _stored(row), row[16], row[17]
    if record.status != "ready" or base is None:
        return record
    if record.base != base:
        reason = f"checked against base model {record.base[:16]}…, this server runs {base[:16]}…: add it again"
        return replace(record, status="quarantined", reason=reason)
    if record.rank > max_rank:
        return replace(record, status="quarantined", reason=f"rank {record.rank} is over the limit of {max_rank}")
    return record
