"""What addresses hold of the tokens that gate adapters: read by the network's sync, looked up by the servers.

A server never asks the chain. It tells the sync which address it wonders about, over a socket, and goes by what the
sync has written: an address that was not read yet, or too long ago, holds nothing as far as access is concerned.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import zmq

from ..access_rule import TokenTerms
from ..serving.access.checks import CLOCK_TOLERANCE_SECONDS, Holding
from ..transaction import create_private, transaction

MAX_PENDING = 10_000  # addresses that wait to be read
REFRESHES = 3  # within the time that a reading is good for
SCHEMA = """
CREATE TABLE IF NOT EXISTS readings (address TEXT PRIMARY KEY, read_at REAL NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS holdings (
    address TEXT NOT NULL, chain_id INTEGER NOT NULL, contract TEXT NOT NULL, balance TEXT NOT NULL,
    PRIMARY KEY (address, chain_id, contract)
) STRICT, WITHOUT ROWID;
"""


class HoldingsStore:
    """The writer's side; one process at a time."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        create_private(path)
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.executescript(SCHEMA)

    def close(self) -> None:
        self._connection.close()

    def put(self, address: str, chain_id: int, balances: Mapping[str, int], read_at: float) -> None:
        """Everything that is known of an address: contract → balance. What is not in it counts as never read."""
        with transaction(self._connection):
            self._connection.execute("INSERT OR REPLACE INTO readings VALUES (?, ?)", (address, read_at))
            self._connection.execute("DELETE FROM holdings WHERE address = ?", (address,))
            self._connection.executemany(
                "INSERT INTO holdings VALUES (?, ?, ?, ?)",
                [(address, chain_id, contract, str(balance)) for contract, balance in balances.items()],
            )

    def forget_older(self, than: float) -> None:
        """Remove readings from before `than`, which grant nothing any more."""
        with transaction(self._connection):
            self._connection.execute(
                "DELETE FROM holdings WHERE address IN (SELECT address FROM readings WHERE read_at < ?)", (than,)
            )
            self._connection.execute("DELETE FROM readings WHERE read_at < ?", (than,))


class CachedHoldings:
    """The servers' side: a `HoldingsView`. May be used by several threads."""

    def __init__(self, path: Path, socket: str, max_age_seconds: float) -> None:
        """`socket`: where the sync listens to addresses."""
        self._path = path
        self._max_age = max_age_seconds
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._wishes = zmq.Context.instance().socket(zmq.PUSH)
        self._wishes.setsockopt(zmq.LINGER, 0)
        self._wishes.connect(socket)

    def close(self) -> None:
        with self._lock:
            self._wishes.close()
            if self._connection is not None:
                self._connection.close()

    def holding(self, token: TokenTerms, address: str) -> Holding | None:
        """The last known balance of `address`, which is wished to be read again when that is some time ago."""
        with self._lock:
            read_at = self._ask(address)
            if read_at is None:
                return None
            row = self._rows(
                "SELECT balance FROM holdings WHERE address = ? AND chain_id = ? AND contract = ?",
                (address, token.chain_id, token.contract),
            )
        return Holding(int(row[0][0]), read_at) if row else None

    def awaited(self, address: str) -> bool:
        """Whether what `address` holds is not known, or only from too long ago: to be asked again in a moment."""
        with self._lock:
            read_at = self._ask(address)
        return read_at is None or not self._is_good(time.time() - read_at, self._max_age)

    def _ask(self, address: str) -> float | None:
        """When the address was read."""
        rows = self._rows("SELECT read_at FROM readings WHERE address = ?", (address,))
        read_at = rows[0][0] if rows else None
        if read_at is None or not self._is_good(time.time() - read_at, self._max_age / REFRESHES):
            try:
                self._wishes.send(address.encode(), zmq.NOBLOCK)
            except zmq.Again:
                pass  # a thousand wishes wait already, and whoever asked will ask again
        return read_at

    @staticmethod
    def _is_good(age: float, max_age: float) -> bool:
        return -CLOCK_TOLERANCE_SECONDS <= age <= max_age

    def _rows(self, query: str, values: tuple[object, ...]) -> list[tuple]:
        if self._connection is None:
            if not self._path.is_file():
                return []
            self._connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
            self._connection.execute("PRAGMA query_only = ON")
        return self._connection.execute(query, values).fetchall()


class WishList:
    """Addresses that servers wonder about, at the sync. What was read is wished for again before it is too old."""

    def __init__(self, socket: str | None) -> None:
        """`socket` None: nobody can wish for anything."""
        self._pending: dict[str, None] = {}  # in the order of the wishes
        self._socket: zmq.Socket | None = None
        if socket is not None:
            self._socket = zmq.Context.instance().socket(zmq.PULL)
            self._socket.bind(socket)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close(linger=0)

    def wait(self, seconds: float) -> None:
        """Until there is a wish, or for `seconds`; then take all there are. Too many are dropped: they come again."""
        if self._socket is None:
            time.sleep(seconds)
            return
        self._socket.poll(0 if self._pending else seconds * 1000)
        while self._socket.poll(0):
            address = self._socket.recv().decode()
            if len(self._pending) < MAX_PENDING:
                self._pending.setdefault(address)

    def pending(self, most: int) -> list[str]:
        """Who waits longest."""
        return list(islice(self._pending, most))

    def done(self, address: str) -> None:
        self._pending.pop(address, None)
