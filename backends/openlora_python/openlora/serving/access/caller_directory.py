"""The servers' view of `callers.sqlite`: follows every change of the file, and fails closed."""

from __future__ import annotations

import hmac
import logging
import os
import re
import sqlite3
import threading
from pathlib import Path
from typing import Any

from ...access_rule import ADDRESS
from ...config import UsageLimits
from ...errors import Unavailable
from .caller_store import BUSY_SECONDS, CALLER_NAME, KEY_COLUMNS, KeyRecord

CLOCK_TOLERANCE_SECONDS = 60  # a key made further in the future than this means that the clock was set back
RETRY_MS = 1000
_DIGEST = re.compile(r"[0-9a-f]{64}")
KEPT_ANSWERS = 4096
KEYS_OF = f"SELECT {KEY_COLUMNS} FROM keys WHERE proof = :of ORDER BY id"
LIMITS_OF = "SELECT requests_per_minute, tokens_per_day FROM callers WHERE caller = :of"
ANY_KEY = "SELECT 1 FROM keys WHERE :of = '' LIMIT 1"

log = logging.getLogger(__name__)


class CallerDirectory:
    """May be used by several threads. A change is in force for every call that begins after it was committed.

    Answers are kept until the file is changed, which `PRAGMA data_version` tells: asking costs a look-up by index at
    most, however many keys there are.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None  # of the file that was read
        self._data_version: int | None = None
        self._answers: dict[tuple[str, str], list[tuple[Any, ...]]] = {}  # by query and its argument

    def close(self) -> None:
        with self._lock:
            self._disconnect()

    def caller_of_key(self, digest: str, now: float) -> str | None:
        """Whose valid key has this SHA-256; None = nobody's. Unavailable: the file can't be read."""
        for record in self._records(digest):
            if record.kind == "key" and hmac.compare_digest(record.proof, digest) and _in_force(record, now):
                return record.caller
        return None

    def caller_of_address(self, address: str, now: float) -> tuple[str | None, bool]:
        """Who signs with this address, or None; and whether the file knows it at all, as one revoked or expired."""
        records = [record for record in self._records(address) if record.kind == "address"]
        if not records:
            return None, False
        newest = records[-1]
        return (newest.caller if _in_force(newest, now) else None), True

    def limits(self, caller: str) -> UsageLimits | None:
        """The caller's own limits; None = it has none. Unavailable: they can't be read."""
        for requests, tokens in self._rows(LIMITS_OF, caller):
            try:
                return UsageLimits.model_validate(
                    {"requests_per_minute": requests, "tokens_per_day": tokens}, strict=True
                )
            except ValueError as error:
                log.error("the limits of %r in the callers' file are damaged: %s", caller, error)
                raise Unavailable("the limits of this caller can't be read; the server's log says why") from error
        return None

    @property
    def has_keys(self) -> bool:
        """Whether there are keys or addresses, those revoked included."""
        return bool(self._rows(ANY_KEY, ""))

    def _records(self, proof: str) -> list[KeyRecord]:
        found = [KeyRecord(*row) for row in self._rows(KEYS_OF, proof)]
        for record in found:
            if not _well_formed(record):
                log.error("key %r in the callers' file is damaged and opens nothing", record.id)
        return [record for record in found if _well_formed(record)]

    def _rows(self, query: str, argument: str) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                self._follow()
                if self._connection is None:
                    return []
                if (query, argument) not in self._answers:
                    if len(self._answers) >= KEPT_ANSWERS:
                        self._answers.clear()
                    self._answers[query, argument] = self._connection.execute(query, {"of": argument}).fetchall()
                return self._answers[query, argument]
            except (OSError, sqlite3.Error) as error:
                self._disconnect()
                log.error("%s: %s", self._path, error)
                raise Unavailable("the callers' file can't be read", retry_after_ms=RETRY_MS) from error

    def _follow(self) -> None:
        """Connect to the file that is there now, and forget what was read before its last change."""
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            if self._inode is not None:
                raise  # it was there: what it granted and revoked is not known any more
            return
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
            self._answers.clear()
            self._data_version = data_version

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None


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
