"""What the page shows of the receipt log: pages of receipts, one receipt, its search. Never salts, texts or callers.

Every call opens the log anew, read-only: the server may be making it, restoring it or beginning another one meanwhile.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..attribution.commitments import ADAPTERS_TAG
from ..attribution.frames import STATUS_NAMES
from ..attribution.log import LoggedReceipt, ReceiptLog
from ..errors import InvalidArgument
from .proofs import ProofMaker

SCANNED = 100_000  # receipts that one search by adapter looks at; the next page goes on behind them

_ADAPTERS_HASH = "substr(leaf, 225, 32)"  # the leaf's eighth word
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ReceiptPage:
    """Receipts, newest first. `before` is where the next page begins; None = there is none."""

    receipts: list[dict[str, Any]]
    before: int | None
    size: int


class ReceiptsView:
    """The log of one state directory."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._path = state_dir / "log" / "receipts.sqlite"
        self._proofs = ProofMaker()

    @property
    def exists(self) -> bool:
        """Whether there is a log already."""
        return self._path.exists()

    def overview(self) -> dict[str, Any]:
        """Whose log it is, its size, when its newest receipt ended, and its newest checkpoint."""
        with self._log() as log:
            size, key = log.size(), log.key
            newest = log.get(size - 1)
            signed = log.newest_checkpoint()
        return {
            "id": key.log_id.hex(),
            "origin": key.origin,
            "signer": key.signer,
            "key_line": key.line,
            "size": size,
            "newest_at": newest.receipt.ended_at if newest else None,
            "checkpoint": {"size": signed.size, "root": signed.root.hex()} if signed else None,
        }

    def page(self, before: int | None, limit: int, adapter: str | None = None) -> ReceiptPage:
        """Up to `limit` receipts below number `before` (None: the newest), those that used `adapter` (a digest).

        With an adapter at most SCANNED receipts are looked at, so a page may hold few, or none, and have a next one.
        """
        with self._log() as log, closing(self._connect()) as connection:
            size = log.size()
            top = size if before is None else min(before, size)
            if adapter is None:
                start = max(0, top - limit)
                rows = log.list(start, top - start)[::-1]
            else:
                start, rows = _with_adapter(connection, adapter, top, limit)
            blobs = _adapters(connection, [one.receipt.adapters_hash for one in rows])
        listed = [_row(one, blobs[one.receipt.adapters_hash]) for one in rows]
        return ReceiptPage(listed, start if start > 0 else None, size)

    def document(self, seq: int) -> dict[str, Any]:
        """A receipt as its client keeps it, without salts. InvalidArgument: there is no such receipt."""
        with self._log() as log:
            return log.receipt_json(seq)

    def proof(self, seq: int) -> str:
        """The proof file of a receipt. InvalidArgument: no such receipt. Unavailable: not yet."""
        with self._log() as log:
            return str(self._proofs.prove(log, seq))

    def number_of(self, request_id: str) -> int | None:
        """The number of a request's receipt; `request_id` is 64 hex digits."""
        with self._log() as log:
            found = log.get_by_request(request_id)
        return found.seq if found else None

    @contextmanager
    def _log(self) -> Iterator[ReceiptLog]:
        with closing(ReceiptLog.open(self._state_dir, read_only=True)) as log:
            yield log

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=10.0)
        connection.execute("PRAGMA query_only = ON")
        return connection


def _row(logged: LoggedReceipt, adapters: list[dict[str, Any]]) -> dict[str, Any]:
    receipt = logged.receipt
    return {
        "seq": logged.seq,
        "request_id": receipt.request_id.hex(),
        "status": STATUS_NAMES[receipt.status],
        "adapters": adapters,
        "in_tokens": receipt.in_tokens,
        "out_tokens": receipt.out_tokens,
        "price": receipt.price,
        "ended_at": receipt.ended_at,
    }


def _with_adapter(
    connection: sqlite3.Connection, adapter: str, top: int, limit: int
) -> tuple[int, list[LoggedReceipt]]:
    """Where to go on, and receipts below `top` that used the adapter. A leaf names the blob that lists adapters."""
    if _DIGEST.fullmatch(adapter) is None:
        raise InvalidArgument(f"{adapter!r:.80} is not 64 hex digits", field="adapter")
    lists = "SELECT sha256 FROM blobs WHERE content >= ? AND content < ? AND instr(content, ?) > 0"
    start = max(0, top - SCANNED)
    found = connection.execute(
        f"SELECT seq, leaf, leaf_hash, signature FROM receipts WHERE seq >= ? AND seq < ? "
        f"AND {_ADAPTERS_HASH} IN ({lists}) ORDER BY seq DESC LIMIT ?",
        (start, top, ADAPTERS_TAG, ADAPTERS_TAG + b"\xff", f'"{adapter}"'.encode(), limit),
    ).fetchall()
    rows = [LoggedReceipt(*row) for row in found]
    return (rows[-1].seq if len(rows) == limit else start), rows


def _adapters(connection: sqlite3.Connection, hashes: Sequence[bytes]) -> dict[bytes, list[dict[str, Any]]]:
    """The adapters, with weights in 1e-6 units, of each blob."""
    wanted = list(set(hashes))
    places = ", ".join("?" * len(wanted))
    found = connection.execute(f"SELECT sha256, content FROM blobs WHERE sha256 IN ({places})", wanted)
    return {sha256: json.loads(content.removeprefix(ADAPTERS_TAG))["adapters"] for sha256, content in found}
