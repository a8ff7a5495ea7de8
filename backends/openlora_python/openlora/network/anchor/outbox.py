"""The outbox: every anchor transaction that was ever signed, on disk before it is on the wire.

`<state-dir>/settle/outbox.sqlite`, written by the anchor worker alone. A row keeps the exact bytes, so that after a
crash the same transaction is sent again and never a second one beside it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from ...attribution.frames import sync_directory
from ...errors import Internal
from ...transaction import create_private, transaction
from .fees import Fees, check_replacement

OPEN, FINAL, REVERTED, DISPLACED = "open", "final", "reverted", "displaced"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS transactions (
    id INTEGER PRIMARY KEY,
    chain_id INTEGER NOT NULL, genesis BLOB NOT NULL, contract TEXT NOT NULL,
    log_id BLOB NOT NULL, sender TEXT NOT NULL,
    nonce INTEGER NOT NULL CHECK (nonce >= 0),
    previous_size INTEGER NOT NULL, previous_root BLOB NOT NULL,
    size INTEGER NOT NULL CHECK (size > previous_size), root BLOB NOT NULL,
    calldata BLOB NOT NULL, raw BLOB NOT NULL, hash BLOB NOT NULL UNIQUE,
    gas INTEGER NOT NULL, max_fee INTEGER NOT NULL, tip INTEGER NOT NULL,
    created_at REAL NOT NULL, created_block INTEGER NOT NULL,
    first_sent_at REAL, last_sent_at REAL, times_sent INTEGER NOT NULL DEFAULT 0, answer TEXT NOT NULL DEFAULT '',
    state TEXT NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'final', 'reverted', 'displaced'))
) STRICT;
CREATE INDEX IF NOT EXISTS by_nonce ON transactions (log_id, sender, nonce);
"""
_KEPT = "id, first_sent_at, last_sent_at, times_sent, answer, state"
_SCOPE = "chain_id = ? AND genesis = ? AND contract = ? AND log_id = ? AND sender = ?"


@dataclass(frozen=True)
class Scope:
    """Whose nonces and whose head: rows of another chain, contract, log or key are none of a worker's business."""

    chain_id: int
    genesis: bytes
    contract: str
    log_id: bytes
    sender: str

    @property
    def row(self) -> tuple[int, bytes, str, bytes, str]:
        return self.chain_id, self.genesis, self.contract, self.log_id, self.sender


@dataclass(frozen=True)
class SignedAnchor:
    """A signed transaction that moves the head from one size and root to the next. Times in seconds since 1970."""

    nonce: int
    previous_size: int
    previous_root: bytes
    size: int
    root: bytes
    calldata: bytes
    raw: bytes
    hash: bytes
    gas: int
    max_fee: int  # wei per gas, as is the tip
    tip: int
    created_at: float
    created_block: int

    @property
    def fees(self) -> Fees:
        return Fees(self.max_fee, self.tip)


_ANCHOR = tuple(field.name for field in fields(SignedAnchor))


@dataclass(frozen=True)
class OutboxRow:
    """A transaction and what became of it.

    `open`: it may still get into a block, or out of one. `final`: it is in a final block. `reverted`: it is there and
    did nothing. `displaced`: another transaction has its nonce in a final block.
    """

    anchor: SignedAnchor
    id: int
    first_sent_at: float | None
    last_sent_at: float | None
    times_sent: int
    answer: str  # what the node said last
    state: str


class Outbox:
    """One file; every change is durable when its method returns."""

    def __init__(self, path: Path) -> None:
        """Open it, or make it. Internal: SQLite would not keep what is committed."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = not path.exists()
        create_private(path)
        self._connection = sqlite3.connect(path, isolation_level=None, timeout=10.0)
        for name, value in {"journal_mode": "wal", "synchronous": 2, "fullfsync": 1}.items():  # 2 = FULL
            self._connection.execute(f"PRAGMA {name} = {value}")
            found = self._connection.execute(f"PRAGMA {name}").fetchone()[0]
            if found != value:
                raise Internal(f"SQLite {sqlite3.sqlite_version} keeps {name} at {found!r} instead of {value!r}")
        self._connection.executescript(_SCHEMA)
        if new:
            sync_directory(path.parent)

    def close(self) -> None:
        self._connection.close()

    def add(self, scope: Scope, anchor: SignedAnchor) -> OutboxRow:
        """Keep a signed transaction before it is sent.

        Internal: it would replace one with its nonce and pays too little more.
        """
        with transaction(self._connection):
            for other in self.with_nonce(scope, anchor.nonce):
                check_replacement(other.anchor.fees, anchor.fees)
            values = (*scope.row, *(getattr(anchor, name) for name in _ANCHOR))
            names = ", ".join(("chain_id, genesis, contract, log_id, sender", *_ANCHOR))
            marks = ", ".join("?" * len(values))
            self._connection.execute(f"INSERT INTO transactions ({names}) VALUES ({marks})", values)
        return self.with_nonce(scope, anchor.nonce)[-1]

    def record_sent(self, row: OutboxRow, now: float, answer: str) -> None:
        """That it was sent now, and what the node said. Its fate is open (again, if a re-org took it out)."""
        self._connection.execute(
            "UPDATE transactions SET first_sent_at = coalesce(first_sent_at, ?), last_sent_at = ?, "
            "times_sent = times_sent + 1, answer = ?, state = ? WHERE id = ?",
            (now, now, answer, OPEN, row.id),
        )

    def close_row(self, row: OutboxRow, state: str) -> None:
        """What became of it for good."""
        self._connection.execute("UPDATE transactions SET state = ? WHERE id = ?", (state, row.id))

    def with_nonce(self, scope: Scope, nonce: int) -> list[OutboxRow]:
        """All that share a nonce, open or not, the cheapest first."""
        return self._rows(f"{_SCOPE} AND nonce = ? ORDER BY id", *scope.row, nonce)

    def open_rows(self, scope: Scope) -> list[OutboxRow]:
        """Those whose fate is open, by nonce."""
        return self._rows(f"{_SCOPE} AND state = ? ORDER BY nonce, id", *scope.row, OPEN)

    def newest(self, log_id: bytes, limit: int) -> list[OutboxRow]:
        """The last ones of a log, whatever their scope, newest first."""
        return self._rows("log_id = ? ORDER BY id DESC LIMIT ?", log_id, limit)

    def last_created_at(self, scope: Scope) -> float | None:
        """When the newest was signed."""
        sql = f"SELECT max(created_at) FROM transactions WHERE {_SCOPE}"
        return self._connection.execute(sql, scope.row).fetchone()[0]

    def _rows(self, where: str, *values: object) -> list[OutboxRow]:
        rows: Sequence[tuple] = self._connection.execute(
            f"SELECT {', '.join(_ANCHOR)}, {_KEPT} FROM transactions WHERE {where}", values
        ).fetchall()
        width = len(_ANCHOR)
        return [OutboxRow(SignedAnchor(*row[:width]), *row[width:]) for row in rows]
