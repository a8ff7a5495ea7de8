"""Callers, their API keys and limits: `callers.sqlite` in the state directory, written by `openlora keys`.

Servers see every change at once: a key that was revoked is refused from the next request on. Keys are random,
so their SHA-256 is kept and no slow hash is needed.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...access_rule import ADDRESS, canonical_caller
from ...config import UsageLimits
from ...errors import InvalidArgument
from ...transaction import transaction

ANONYMOUS = "anonymous"
CALLER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,127}")
KEY_PREFIX = "olk_"
SHOWN_LETTERS = len(KEY_PREFIX) + 8  # of a key: enough to recognise it, and 208 of its 256 bits stay unknown
BUSY_SECONDS = 10.0
SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    id INTEGER PRIMARY KEY AUTOINCREMENT, caller TEXT NOT NULL, kind TEXT NOT NULL CHECK (kind IN ('key', 'address')),
    proof TEXT NOT NULL, prefix TEXT NOT NULL,
    created_at INTEGER NOT NULL, expires_at INTEGER, revoked_at INTEGER
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS keys_in_force ON keys (proof) WHERE revoked_at IS NULL;
CREATE INDEX IF NOT EXISTS keys_by_proof ON keys (proof);
CREATE TABLE IF NOT EXISTS callers (
    caller TEXT PRIMARY KEY, requests_per_minute INTEGER CHECK (requests_per_minute >= 0),
    tokens_per_day INTEGER CHECK (tokens_per_day >= 0)
) STRICT, WITHOUT ROWID;
"""
KEY_COLUMNS = "id, caller, kind, proof, prefix, created_at, expires_at, revoked_at"


@dataclass(frozen=True)
class KeyRecord:
    """One way for a caller to prove who it is."""

    id: int  # never used again
    caller: str
    kind: Literal["key", "address"]
    proof: str  # SHA-256 of the key in hex; or the checksummed address whose signature it takes
    prefix: str  # the key's first letters; or the address
    created_at: int  # seconds since 1970
    expires_at: int | None
    revoked_at: int | None

    def state(self, now: float) -> Literal["valid", "expired", "revoked"]:
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and now >= self.expires_at else "valid"


def check_caller(name: str) -> str:
    """The name in its canonical form.

    Raises:
        InvalidArgument: it can't be a caller's.
    """
    if not CALLER_NAME.fullmatch(name):
        raise InvalidArgument(f"{name!r:.140} is no caller's name, {CALLER_NAME.pattern} is wanted", field="caller")
    return canonical_caller(name)


def digest_of(api_key: str) -> str:
    """What is kept of an API key: SHA-256 in hex."""
    return hashlib.sha256(api_key.encode()).hexdigest()


class CallerStore:
    """The writer's side. The file is made when it is first opened, and only its owner can read it."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            _create(path)
        path.chmod(0o600)
        self._connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
        self._connection.execute("PRAGMA synchronous = FULL")

    def __enter__(self) -> CallerStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def add_key(self, caller: str, expires_at: int | None = None) -> tuple[KeyRecord, str]:
        """A new key of `caller`: its record, and the key itself, which is nowhere else.

        Raises:
            InvalidArgument: the name can't be a caller's, or is an address, whose owner signs instead.
        """
        caller = check_caller(caller)
        if ADDRESS.fullmatch(caller):
            raise InvalidArgument(f"{caller} is an address: it signs its requests and has no key", field="caller")
        if caller == ANONYMOUS:
            raise InvalidArgument(f"{caller!r} is who has no key", field="caller")
        api_key = KEY_PREFIX + secrets.token_urlsafe(32)
        return self._add(caller, "key", digest_of(api_key), api_key[:SHOWN_LETTERS], expires_at), api_key

    def add_address(self, caller: str, address: str, expires_at: int | None = None) -> KeyRecord:
        """Take signed requests of `address` as those of `caller` from now on.

        Raises:
            InvalidArgument: it is no address, or is a caller's already.
        """
        caller, address = check_caller(caller), canonical_caller(address)
        if not ADDRESS.fullmatch(address):
            raise InvalidArgument(f"{address!r:.80}: 0x and 40 hex digits are wanted", field="address")
        if ADDRESS.fullmatch(caller) and caller != address:
            raise InvalidArgument(f"{caller} can't be the name of another address", field="caller")
        if caller == ANONYMOUS:
            raise InvalidArgument(f"{caller!r} is who has no key", field="caller")
        try:
            return self._add(caller, "address", address, address, expires_at)
        except sqlite3.IntegrityError:
            raise InvalidArgument(f"{address} is known already: revoke it first", field="address") from None

    def revoke(self, *key_ids: int) -> list[KeyRecord]:
        """End keys for ever, all or none; what is revoked already stays as it is.

        Raises:
            InvalidArgument: there is none with one of these ids.
        """
        with transaction(self._connection):
            now = int(time.time())
            self._connection.executemany(
                "UPDATE keys SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL", [(now, key) for key in key_ids]
            )
            try:
                return [self.get(key_id) for key_id in key_ids]
            except InvalidArgument as error:
                raise InvalidArgument(f"{error.message}: nothing was revoked", field=error.field) from None

    def get(self, key_id: int) -> KeyRecord:
        """Raises InvalidArgument when there is no key with this id."""
        row = self._connection.execute(f"SELECT {KEY_COLUMNS} FROM keys WHERE id = ?", (key_id,)).fetchone()
        if row is None:
            raise InvalidArgument(f"there is no key {key_id}", field="id")
        return KeyRecord(*row)

    def records(self) -> list[KeyRecord]:
        """All keys, those revoked too, by id."""
        return [KeyRecord(*row) for row in self._connection.execute(f"SELECT {KEY_COLUMNS} FROM keys ORDER BY id")]

    def limits(self, caller: str) -> UsageLimits:
        """The caller's own limits as they are set here."""
        row = self._connection.execute(
            "SELECT requests_per_minute, tokens_per_day FROM callers WHERE caller = ?", (caller,)
        ).fetchone()
        return UsageLimits(requests_per_minute=row[0], tokens_per_day=row[1]) if row else UsageLimits()

    def set_limits(self, caller: str, limits: UsageLimits) -> None:
        """Replace the caller's own limits. `anonymous` has some too."""
        self._connection.execute(
            "INSERT OR REPLACE INTO callers VALUES (?, ?, ?)",
            (check_caller(caller), limits.requests_per_minute, limits.tokens_per_day),
        )

    def _add(self, caller: str, kind: str, proof: str, prefix: str, expires_at: int | None) -> KeyRecord:
        now = int(time.time())
        if expires_at is not None and expires_at <= now:
            raise InvalidArgument(f"{expires_at} has passed", field="expires")
        key_id = self._connection.execute(
            "INSERT INTO keys (caller, kind, proof, prefix, created_at, expires_at) VALUES (?, ?, ?, ?, ?, ?)",
            (caller, kind, proof, prefix, now, expires_at),
        ).lastrowid
        return self.get(key_id)


def _create(path: Path) -> None:
    """An empty store, in place as a whole: a server that finds the file finds its tables."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.new")
    os.close(os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
    connection = sqlite3.connect(draft, isolation_level=None)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.executescript(SCHEMA)
    connection.close()
    try:
        os.link(draft, path)
    except FileExistsError:
        pass  # another command was faster; its file is as good
    finally:
        draft.unlink()
