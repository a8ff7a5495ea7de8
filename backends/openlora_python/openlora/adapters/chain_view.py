"""What of a chain requests go by: one final block, and the terms in force there. In the catalog's file.

Only the network's sync writes it, all of it in one transaction, so that whoever reads it in one sees one block.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CHAIN_ORIGIN = "chain"
"""`origin` of adapters that a chain's registry announces. Their names are `<owner's address>/<name>`."""

CLOCK_TOLERANCE_SECONDS = 60.0  # a time further ahead than this means that the clock was set back
SCHEMA = """
CREATE TABLE IF NOT EXISTS chain_view (
    id INTEGER PRIMARY KEY CHECK (id = 1), chain_id INTEGER NOT NULL, registry TEXT NOT NULL, number INTEGER NOT NULL,
    hash TEXT NOT NULL, parameters TEXT, base_card TEXT, read_at REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS chain_terms (
    name TEXT NOT NULL, digest TEXT NOT NULL, card TEXT NOT NULL, PRIMARY KEY (name, digest)
) STRICT, WITHOUT ROWID;
"""


@dataclass(frozen=True)
class ChainView:
    """A final block of a chain, and what holds there for every request."""

    chain_id: int
    registry: str  # checksummed address
    number: int
    hash: str  # 64 hex digits
    parameters: str | None  # digest of those in force, 64 hex digits
    base_card: dict[str, Any] | None  # of the base model, where its owner registered it and is followed
    read_at: float  # seconds since 1970: when the chain said so

    def is_fresh(self, now: float, max_age_seconds: float) -> bool:
        """Whether access may be granted by it."""
        return -CLOCK_TOLERANCE_SECONDS <= now - self.read_at <= max_age_seconds


@dataclass(frozen=True)
class ChainTerms:
    """An adapter in force, and the card it is served with."""

    name: str
    digest: str
    card: dict[str, Any]


def read_view(connection: sqlite3.Connection) -> ChainView | None:
    row = connection.execute(
        "SELECT chain_id, registry, number, hash, parameters, base_card, read_at FROM chain_view"
    ).fetchone()
    if row is None:
        return None
    *facts, base_card, read_at = row
    return ChainView(*facts, None if base_card is None else json.loads(base_card), read_at)


def write_view(connection: sqlite3.Connection, view: ChainView, terms: Sequence[ChainTerms]) -> None:
    """Within the caller's transaction. Terms that are as they were cost no write."""
    base_card = None if view.base_card is None else json.dumps(view.base_card)
    connection.execute(
        "INSERT OR REPLACE INTO chain_view VALUES (1, ?, ?, ?, ?, ?, ?, ?)",
        (view.chain_id, view.registry, view.number, view.hash, view.parameters, base_card, view.read_at),
    )
    wanted = {(one.name, one.digest): json.dumps(one.card) for one in terms}
    found = {(name, digest): card for name, digest, card in connection.execute("SELECT * FROM chain_terms")}
    connection.executemany("DELETE FROM chain_terms WHERE name = ? AND digest = ?", found.keys() - wanted.keys())
    connection.executemany(
        "INSERT OR REPLACE INTO chain_terms VALUES (?, ?, ?)",
        [(*key, card) for key, card in wanted.items() if found.get(key) != card],
    )
