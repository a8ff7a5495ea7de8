"""What the SQLite stores share that several processes write: how a file begins, and one transaction."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def create_private(path: Path) -> None:
    """Make an empty file of mode 0600 unless there is one.

    A file that is there is not opened: closing it again would take away the locks of every connection that this process
    has to it, and with them what other processes must not do meanwhile.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        pass


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """The body sees and changes one state of the file, as its only writer; an exception takes all of it back.

    `connection` is in autocommit mode (`isolation_level=None`).
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")
