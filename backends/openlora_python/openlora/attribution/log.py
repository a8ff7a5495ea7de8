"""The receipt log: signed receipts in SQLite, in the order of their numbers. The attribution step owns it.

It is a projection of the usage journal (see `projection`), made durable in transactions that move the projection's
position along. The state directory holds `log/receipts.sqlite`, `keys/` and the public key line in `log.pub`.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from openlora.attribution.frames import START, Position, sync_directory
from openlora.attribution.keys import LogKeys, load_keys
from openlora.attribution.log_key import ZERO32, LogKey
from openlora.attribution.receipt import Receipt, ReceiptHasher, decode_leaf, leaf_hash, sign_digest
from openlora.attribution.receipt_json import receipt_document
from openlora.errors import Internal, InvalidArgument, Unavailable

_TABLES = (
    # low_…: where in the journal the projection begins again after a restart
    """CREATE TABLE log (id INTEGER PRIMARY KEY CHECK (id = 1), key_line TEXT NOT NULL, init_leaf BLOB NOT NULL,
        low_segment INTEGER NOT NULL, low_offset INTEGER NOT NULL) STRICT""",
    """CREATE TABLE receipts (seq INTEGER PRIMARY KEY, request_id BLOB NOT NULL UNIQUE, leaf BLOB NOT NULL,
        leaf_hash BLOB NOT NULL, signature BLOB NOT NULL) STRICT""",
    # content: domain tag and canonical JSON, or the preimage of a registry reference: exactly what was hashed
    "CREATE TABLE blobs (sha256 BLOB PRIMARY KEY, content BLOB NOT NULL) STRICT",
    "CREATE TABLE salts (seq INTEGER PRIMARY KEY, prompt BLOB NOT NULL, output BLOB NOT NULL) STRICT",
)


@dataclass(frozen=True)
class LoggedReceipt:
    """A receipt as it lies in the log."""

    seq: int
    leaf: bytes
    leaf_hash: bytes
    signature: bytes

    @cached_property
    def receipt(self) -> Receipt:
        return decode_leaf(self.leaf)


@dataclass(frozen=True)
class NewReceipt:
    """A receipt on its way into the log."""

    receipt: Receipt
    leaf: bytes
    blobs: tuple[bytes, ...]  # in the order of `Receipt.blob_hashes`
    prompt_salt: bytes
    output_salt: bytes


class ReceiptLog:
    """One log and its keys; `open` it, never construct it. Thread-safe."""

    def __init__(self, connection: sqlite3.Connection, keys: LogKeys | None, key: LogKey, lock: int | None) -> None:
        self.key = key
        self._connection = connection
        self._keys = keys
        self._lock_descriptor = lock
        self._hasher = ReceiptHasher(key.log_id)
        self._statements = threading.RLock()

    @classmethod
    def open(
        cls, state_dir: Path, *, origin: str | None = None, read_only: bool = False, wait: bool = True
    ) -> ReceiptLog:
        """Open the log of a state directory; the first time make its keys, its id and `log.pub`.

        `origin` names a new log and defaults to one made of its nonce. The writer holds a lock: another one waits for
        it, or gets Unavailable with `wait` false. A read-only log needs neither keys nor lock. InvalidArgument: there
        is nothing to read. Internal: the keys are not those of the log, or SQLite would not keep what is committed.
        """
        path = state_dir / "log" / "receipts.sqlite"
        if read_only:
            if not path.exists():
                raise InvalidArgument(f"no receipt log at {path}", field="state-dir")
            connection = _connect(path)
            connection.execute("PRAGMA query_only = ON")
            if not _has_log(connection):
                raise InvalidArgument(f"the receipt log at {path} is still being made", field="state-dir")
            return cls(connection, None, _stored_key(connection), None)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = _lock(path.parent, wait)
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # it holds salts
            connection = _connect(path)
            _require_durable(connection)
            new = not _has_log(connection)
            keys = load_keys(state_dir / "keys", create=new)
            if new:
                _create_log(connection, keys, origin)
                sync_directory(path.parent)
            key = _stored_key(connection)
            if (key.signer, key.checkpoint_key) != (keys.signer, keys.checkpoint_public):
                raise Internal(f"the keys in {state_dir / 'keys'} are not those of the log in {path}")
            if origin is not None and origin != key.origin:
                raise Internal(f"the log in {path} has the origin {key.origin!r}, not {origin!r}")
            _publish_key(state_dir / "log.pub", key)
        except BaseException:
            os.close(lock)
            raise
        return cls(connection, keys, key, lock)

    def close(self) -> None:
        """Close the file and let go of the lock."""
        self._connection.close()
        if self._lock_descriptor is not None:
            os.close(self._lock_descriptor)

    def __enter__(self) -> ReceiptLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def size(self) -> int:
        """How many receipts there are; they are numbered from 0 without a gap."""
        return self._query("SELECT coalesce(max(seq) + 1, 0) FROM receipts")[0][0]

    def get(self, seq: int) -> LoggedReceipt | None:
        """The receipt with this number."""
        if not 0 <= seq < 2**63:
            return None
        rows = self._query("SELECT seq, leaf, leaf_hash, signature FROM receipts WHERE seq = ?", seq)
        return LoggedReceipt(*rows[0]) if rows else None

    def get_by_request(self, request_id: str) -> LoggedReceipt | None:
        """The receipt of a request, by its id of 64 hex digits."""
        sql = "SELECT seq, leaf, leaf_hash, signature FROM receipts WHERE request_id = ?"
        rows = self._query(sql, bytes.fromhex(request_id))
        return LoggedReceipt(*rows[0]) if rows else None

    def list(self, start: int = 0, limit: int = 100) -> list[LoggedReceipt]:
        """Up to `limit` receipts from number `start` on, in order."""
        sql = "SELECT seq, leaf, leaf_hash, signature FROM receipts WHERE seq >= ? ORDER BY seq LIMIT ?"
        return [LoggedReceipt(*row) for row in self._query(sql, start, limit)]

    def receipt_json(self, seq: int, *, with_salts: bool = False) -> dict[str, Any]:
        """The client's form of a receipt. Salts only when asked for: they open the commitments to the texts.

        InvalidArgument: no such receipt, or its salts were forgotten.
        """
        logged = self.get(seq)
        if logged is None:
            raise InvalidArgument(f"no receipt {seq}; the log holds {self.size()}", field="seq")
        receipt = logged.receipt
        blobs = [self._query("SELECT content FROM blobs WHERE sha256 = ?", one)[0][0] for one in receipt.blob_hashes]
        salts = None
        if with_salts:
            rows = self._query("SELECT prompt, output FROM salts WHERE seq = ?", seq)
            if not rows:
                raise InvalidArgument(f"the salts of receipt {seq} were forgotten", field="salts")
            salts = rows[0]
        return receipt_document(receipt, logged.signature, self.key, blobs, salts)

    def forget_salts(self, seq: int) -> None:
        """Erase the salts of a receipt for good: nobody can open its commitments any more; the receipt stays valid."""
        self._writable()
        with self._statements:
            self._connection.execute("DELETE FROM salts WHERE seq = ?", (seq,))
            busy, _, _ = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if busy:
                raise Unavailable("a reader keeps the forgotten salts in the write-ahead log; forget them again later")

    @property
    def low_water(self) -> Position:
        """From where in the journal the projection begins again: every open intent lies behind it."""
        return Position(*self._query("SELECT low_segment, low_offset FROM log")[0])

    def append(self, new: Iterable[NewReceipt], low_water: Position) -> None:
        """Sign receipts and commit them with the projection's position, all or nothing, durably.

        Internal: a number or request id is there already, or a number is left out.
        """
        keys = self._writable()
        receipts, blobs, salts = [], {}, []
        with self._statements:
            for seq, item in enumerate(new, self.size()):
                if item.receipt.seq != seq:
                    raise Internal(f"the log's next receipt is {seq}, not {item.receipt.seq}")
                signature = sign_digest(keys.receipt, self._hasher.digest(item.leaf))
                receipts.append((seq, item.receipt.request_id, item.leaf, leaf_hash(item.leaf), signature))
                blobs.update(zip(item.receipt.blob_hashes, item.blobs, strict=True))
                salts.append((seq, item.prompt_salt, item.output_salt))
            execute, many = self._connection.execute, self._connection.executemany
            execute("BEGIN IMMEDIATE")
            try:
                many("INSERT INTO receipts VALUES (?, ?, ?, ?, ?)", receipts)
                many("INSERT OR IGNORE INTO blobs VALUES (?, ?)", list(blobs.items()))
                many("INSERT INTO salts VALUES (?, ?, ?)", salts)
                execute("UPDATE log SET low_segment = ?, low_offset = ?", low_water)
                execute("COMMIT")
            except sqlite3.IntegrityError as error:
                raise Internal(f"the log has a receipt already: {error}") from error
            finally:
                if self._connection.in_transaction:
                    execute("ROLLBACK")

    def _writable(self) -> LogKeys:
        if self._keys is None:
            raise Internal("this log was opened to be read")
        return self._keys

    def _query(self, sql: str, *values: object) -> list[Any]:
        with self._statements:
            return self._connection.execute(sql, values).fetchall()


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10.0)


def _require_durable(connection: sqlite3.Connection) -> None:
    """Set what durability and erasure need, and read it back: builds of SQLite differ in what they honour."""
    wanted = {"journal_mode": "wal", "synchronous": 2, "secure_delete": 1, "fullfsync": 1}  # 2 = FULL
    for name, value in wanted.items():
        connection.execute(f"PRAGMA {name} = {value}")
        found = connection.execute(f"PRAGMA {name}").fetchone()[0]
        if found != value:
            raise Internal(f"SQLite {sqlite3.sqlite_version} keeps {name} at {found!r} instead of {value!r}")


def _has_log(connection: sqlite3.Connection) -> bool:
    return connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'log'").fetchone() is not None


def _lock(directory: Path, wait: bool) -> int:
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        os.close(descriptor)
        raise Unavailable(f"another process holds the receipt log in {directory}", retry_after_ms=1_000) from error
    return descriptor


def _create_log(connection: sqlite3.Connection, keys: LogKeys, origin: str | None) -> None:
    nonce = secrets.token_bytes(32)
    key = LogKey(
        origin=origin or f"openlora/{nonce[:8].hex()}",
        signer=keys.signer,
        checkpoint_key=keys.checkpoint_public,
        nonce=nonce,
        predecessor=ZERO32,
    )
    connection.execute("BEGIN IMMEDIATE")
    for statement in _TABLES:
        connection.execute(statement)
    connection.execute("INSERT INTO log VALUES (1, ?, ?, ?, ?)", (key.line, key.init_leaf, *START))
    connection.execute("COMMIT")


def _stored_key(connection: sqlite3.Connection) -> LogKey:
    row = connection.execute("SELECT key_line FROM log").fetchone()
    return LogKey.parse(row[0])


def _publish_key(path: Path, key: LogKey) -> None:
    """Write `log.pub` anew at each start: it follows from the log, whatever happened to the file."""
    draft = path.with_suffix(".pub.new")
    draft.write_text(key.line + "\n")
    draft.rename(path)
