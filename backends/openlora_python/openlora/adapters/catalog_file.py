"""The catalog's file: its tables, its format, and how a connection to it begins."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from ..errors import Unavailable
from ..transaction import create_private, transaction
from .chain_view import SCHEMA as CHAIN_SCHEMA

CATALOG_FILE = "catalog.sqlite"  # below the state directory
BUSY_SECONDS = 10.0
# 0: without `names`; the newest version of a name was its current one. 1: without a chain's view. 2: without `login`.
FORMAT = 3
LOGIN_COLUMN = "login INTEGER NOT NULL DEFAULT 0 CHECK (login IN (0, 1))"
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
    added_at INTEGER NOT NULL, removed_at INTEGER, {LOGIN_COLUMN},
    PRIMARY KEY (name, version)
) STRICT;
CREATE INDEX IF NOT EXISTS adapters_by_digest ON adapters (name, digest);
"""


def open_to_write(path: Path) -> sqlite3.Connection:
    """Made if it is not there; a file of an older format is brought to today's.

    Raises:
        Unavailable: the file is of a newer one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    create_private(path)
    connection = _connect(path)
    connection.execute("PRAGMA journal_mode = WAL")
    before = _format(connection, path)
    connection.executescript(SCHEMA)
    if before < FORMAT:
        _migrate(connection, path)
    return connection


def open_to_read(path: Path) -> sqlite3.Connection:
    """Raises Unavailable: there is none, or it is of a newer format. An older one is brought to today's first."""
    if not path.is_file():
        raise Unavailable(f"no adapter catalog at {path}: `openlora serve` and `openlora adapters add` make one")
    connection = _connect(path)
    if _format(connection, path) < FORMAT:
        open_to_write(path).close()
    connection.execute("PRAGMA query_only = ON")
    return connection


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _format(connection: sqlite3.Connection, path: Path) -> int:
    (number,) = connection.execute("PRAGMA user_version").fetchone()
    if number > FORMAT:
        raise Unavailable(f"{path} is of format {number}, made by a newer OpenLoRA; this one reads up to {FORMAT}")
    return number


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    with transaction(connection):
        if _format(connection, path) == FORMAT:
            return  # another process was faster
        if _format(connection, path) == 0:
            connection.execute(
                "INSERT INTO names (name, current) "
                "SELECT name, max(version) FROM adapters WHERE removed_at IS NULL GROUP BY name"
            )
        if "login" not in {column for _, column, *_ in connection.execute("PRAGMA table_info(adapters)")}:
            connection.execute(f"ALTER TABLE adapters ADD COLUMN {LOGIN_COLUMN}")
        connection.execute(f"PRAGMA user_version = {FORMAT}")
