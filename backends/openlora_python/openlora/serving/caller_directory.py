"""The servers' view of `callers.sqlite`: in memory, read again whenever the file was changed. Fails closed."""

from __future__ import annotations

import hmac
import logging
import os
import re
import sqlite3
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import UsageLimits
from ..errors import Unavailable
from .access_rule import ADDRESS
from .caller_store import BUSY_SECONDS, CALLER_NAME, KEY_COLUMNS, KeyRecord

CLOCK_TOLERANCE_SECONDS = 60  # a key made further in the future than this means that the clock was set back
RETRY_MS = 1000
_DIGEST = re.compile(r"[0-9a-f]{64}")
_INDEXED_DIGITS = 16  # what a lookup's time may tell of a digest; the rest is compared in constant time

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Snapshot:
    """What the file holds. Keys are indexed by the first digits of their digest, addresses by themselves."""

    keys: dict[str, list[KeyRecord]] = field(default_factory=dict)
    addresses: dict[str, KeyRecord] = field(default_factory=dict)
    limits: dict[str, UsageLimits] = field(default_factory=dict)
    unreadable: frozenset[str] = frozenset()  # callers whose limits make no sense: they get nothing
    has_keys: bool = False  # there are some, or were


class CallerDirectory:
    """May be used by several threads. A change is in force for every call that begins after it was committed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None  # of the file that was read
        self._data_version: int | None = None
        self._snapshot = _Snapshot()

    def close(self) -> None:
        with self._lock:
            self._disconnect()

    def caller_of_key(self, digest: str, now: float) -> str | None:
        """Whose valid key has this SHA-256; None = nobody's. Unavailable: the file can't be read."""
        for record in self._fresh().keys.get(digest[:_INDEXED_DIGITS], ()):
            if hmac.compare_digest(record.proof, digest) and _in_force(record, now):
                return record.caller
        return None

    def caller_of_address(self, address: str, now: float) -> tuple[str | None, bool]:
        """Who signs with this address, or None; and whether the file knows it at all, as one revoked or expired."""
        record = self._fresh().addresses.get(address)
        if record is None:
            return None, False
        return (record.caller if _in_force(record, now) else None), True

    def limits(self, caller: str) -> UsageLimits | None:
        """The caller's own limits; None = it has none. Unavailable: they can't be read."""
        snapshot = self._fresh()
        if caller in snapshot.unreadable:
            raise Unavailable("the limits of this caller can't be read; the server's log says why")
        return snapshot.limits.get(caller)

    @property
    def has_keys(self) -> bool:
        """Whether there are keys or addresses, those revoked included."""
        return self._fresh().has_keys

    def _fresh(self) -> _Snapshot:
        with self._lock:
            try:
                return self._read()
            except (OSError, sqlite3.Error) as error:
                self._disconnect()
                log.error("%s: %s", self._path, error)
                raise Unavailable("the callers' file can't be read", retry_after_ms=RETRY_MS) from error

    def _read(self) -> _Snapshot:
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            if self._inode is not None:
                raise  # it was there: what it granted and revoked is not known any more
            return self._snapshot
        if (status.st_dev, status.st_ino) != self._inode or self._connection is None:
            self._disconnect()
            self._connection = sqlite3.connect(
                f"file:{self._path}?mode=rw",
                uri=True,
                timeout=BUSY_SECONDS,
                isolation_level=None,
                check_same_thread=False,
            )
            self._connection.execute("PRAGMA query_only = ON")
            self._inode, self._data_version = (status.st_dev, status.st_ino), None
        (data_version,) = self._connection.execute("PRAGMA data_version").fetchone()
        if data_version != self._data_version:
            self._snapshot = _snapshot_of(self._connection)
            self._data_version = data_version
        return self._snapshot

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None


def _snapshot_of(connection: sqlite3.Connection) -> _Snapshot:
    connection.execute("BEGIN")
    try:
        rows = connection.execute(f"SELECT {KEY_COLUMNS} FROM keys ORDER BY id").fetchall()
        limit_rows = connection.execute("SELECT caller, requests_per_minute, tokens_per_day FROM callers").fetchall()
    finally:
        connection.execute("COMMIT")
    keys: dict[str, list[KeyRecord]] = {}
    addresses: dict[str, KeyRecord] = {}
    for row in rows:
        record = KeyRecord(*row)
        if not _well_formed(record):
            log.error("key %r in the callers' file is damaged and opens nothing", record.id)
        elif record.kind == "address":
            addresses[record.proof] = record  # the newest one of an address counts
        else:
            keys.setdefault(record.proof[:_INDEXED_DIGITS], []).append(record)
    limits: dict[str, UsageLimits] = {}
    unreadable = set()
    for caller, requests, tokens in limit_rows:
        try:
            limits[caller] = UsageLimits.model_validate(
                {"requests_per_minute": requests, "tokens_per_day": tokens}, strict=True
            )
        except ValueError as error:
            log.error("the limits of %r in the callers' file are damaged: %s", caller, error)
            unreadable.add(caller)
    return _Snapshot(keys, addresses, limits, frozenset(unreadable), bool(rows))


def _well_formed(record: KeyRecord) -> bool:
    proof = _DIGEST if record.kind == "key" else ADDRESS if record.kind == "address" else None
    return (
        proof is not None
        and isinstance(record.proof, str)
        and proof.fullmatch(record.proof) is not None
        and isinstance(record.caller, str)
        and CALLER_NAME.fullmatch(record.caller) is not None
        and _is_time(record.created_at)
        and (record.expires_at is None or _is_time(record.expires_at))
        and (record.revoked_at is None or _is_time(record.revoked_at))
    )


def _is_time(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def _in_force(record: KeyRecord, now: float) -> bool:
    return record.state(now) == "valid" and record.created_at <= now + CLOCK_TOLERANCE_SECONDS
