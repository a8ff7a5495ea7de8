"""The file of a receipt log, `receipts.sqlite`: its tables and their versions, what it must honour, and its lock."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from pathlib import Path

from ..errors import Internal, Unavailable
from ..transaction import create_private, transaction
from .file_identity import file_identity
from .frames import START, write_again
from .log_key import LogKey

_FIRST_TABLES = (
    # low_…: where in the journal the projection begins again after a restart
    """CREATE TABLE log (id INTEGER PRIMARY KEY CHECK (id = 1), key_line TEXT NOT NULL, init_leaf BLOB NOT NULL,
        low_segment INTEGER NOT NULL, low_offset INTEGER NOT NULL) STRICT""",
    """CREATE TABLE receipts (seq INTEGER PRIMARY KEY, request_id BLOB NOT NULL UNIQUE, leaf BLOB NOT NULL,
        leaf_hash BLOB NOT NULL, signature BLOB NOT NULL) STRICT""",
    # content: domain tag and canonical JSON, or the preimage of a registry reference: exactly what was hashed
    "CREATE TABLE blobs (sha256 BLOB PRIMARY KEY, content BLOB NOT NULL) STRICT",
    "CREATE TABLE salts (seq INTEGER PRIMARY KEY, prompt BLOB NOT NULL, output BLOB NOT NULL) STRICT",
)
_MIGRATIONS = (
    (
        # Completions count over the life of the journal, receipts from 0 in each log.
        "ALTER TABLE log ADD COLUMN first_completion INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE log ADD COLUMN successor TEXT",  # the key line of the log that follows; nothing is added any more
        # What was signed. A note leaves only after it lies here.
        "CREATE TABLE checkpoints (size INTEGER PRIMARY KEY, root BLOB NOT NULL, note TEXT NOT NULL) STRICT",
        # The file that may sign: see `file_identity`
        "CREATE TABLE custody (id INTEGER PRIMARY KEY CHECK (id = 1), identity TEXT NOT NULL) STRICT",
    ),
)
VERSION = len(_MIGRATIONS)


def connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10.0)


def connect_to_write(path: Path) -> sqlite3.Connection:
    """Open or create the file. Internal: SQLite would not keep what is committed."""
    create_private(path)  # it holds salts
    written_ahead = path.with_name(path.name + "-wal")
    if written_ahead.exists():
        write_again(written_ahead)
    connection = connect(path)
    _require_durable(connection)
    return connection


def has_log(connection: sqlite3.Connection) -> bool:
    return connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'log'").fetchone() is not None


def version_of(connection: sqlite3.Connection) -> int:
    return connection.execute("PRAGMA user_version").fetchone()[0]


def create_log(connection: sqlite3.Connection, path: Path, key: LogKey, first_completion: int = 0) -> None:
    """Make the tables of a new log, whose first receipt is the journal's completion `first_completion`."""
    with transaction(connection):
        for statement in _FIRST_TABLES:
            connection.execute(statement)
        values = (key.line, key.init_leaf, *START)
        connection.execute(
            "INSERT INTO log (id, key_line, init_leaf, low_segment, low_offset) VALUES (1, ?, ?, ?, ?)", values
        )
        _migrate(connection, path, 0)
        connection.execute("UPDATE log SET first_completion = ?", (first_completion,))


def migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Bring an older file up to date. Internal: it is of a newer version than this program."""
    version = version_of(connection)
    if version > VERSION:
        raise Internal(f"{path} is of version {version}, this program knows {VERSION}")
    if version < VERSION:
        with transaction(connection):
            _migrate(connection, path, version_of(connection))


def stored_key(connection: sqlite3.Connection) -> LogKey:
    return LogKey.parse(connection.execute("SELECT key_line FROM log").fetchone()[0])


def lock_log(directory: Path, wait: bool) -> int:
    """The writer's lock of a log directory, as a descriptor. Unavailable: with `wait` false, somebody has it."""
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        os.close(descriptor)
        raise Unavailable(f"another process holds the receipt log in {directory}", retry_after_ms=1_000) from error
    return descriptor


def _migrate(connection: sqlite3.Connection, path: Path, version: int) -> None:
    for statements in _MIGRATIONS[version:]:
        for statement in statements:
            connection.execute(statement)
    if version < 1:
        connection.execute("INSERT INTO custody VALUES (1, ?)", (file_identity(path),))
    connection.execute(f"PRAGMA user_version = {VERSION}")


def _require_durable(connection: sqlite3.Connection) -> None:
    """Set what durability and erasure need, and read it back: builds of SQLite differ in what they honour."""
    wanted = {"journal_mode": "wal", "synchronous": 2, "secure_delete": 1, "fullfsync": 1}  # 2 = FULL
    for name, value in wanted.items():
        connection.execute(f"PRAGMA {name} = {value}")
        found = connection.execute(f"PRAGMA {name}").fetchone()[0]
        if found != value:
            raise Internal(f"SQLite {sqlite3.sqlite_version} keeps {name} at {found!r} instead of {value!r}")
