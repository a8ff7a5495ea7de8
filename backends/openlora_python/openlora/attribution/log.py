"""The receipt log: signed receipts in SQLite, in the order of their numbers. The attribution step owns it.

It is a projection of the usage journal (see `projection`), made durable in transactions that move the projection's
position along. The state directory holds `log/receipts.sqlite`, `keys/` and the public key line in `log.pub`; logs that
were closed (see `rotation`) lie in `closed/`, each in a state directory of its own.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import Internal, InvalidArgument, Unavailable
from ..transaction import transaction
from .checkpoint import Checkpoint, sign_checkpoint
from .file_identity import file_identity
from .frames import Position, make_directory, sync_directory
from .keys import LogKeys, load_keys
from .log_database import (
    connect,
    connect_to_write,
    create_log,
    has_log,
    lock_log,
    migrate,
    stored_key,
    version_of,
)
from .log_key import ZERO32, LogKey
from .receipt import Receipt, ReceiptHasher, decode_leaf, leaf_hash, sign_digest
from .receipt_json import receipt_document
from .rotation import finish_rotation

KEPT_CHECKPOINTS = 1_000  # the newest ones; the tree gives the roots of all others

_PAGE = 50_000
_KNOWN_BLOBS = 10_000


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
class SignedCheckpoint:
    """A tree that the log has signed."""

    size: int
    root: bytes
    note: str  # checkpoint.verify_checkpoint


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

    def __init__(self, path: Path, connection: sqlite3.Connection, keys: LogKeys | None, lock: int | None) -> None:
        self.path = path
        self.key = stored_key(connection)
        self._connection = connection
        self._keys = keys
        self._lock_descriptor = lock
        self._hasher = ReceiptHasher(self.key.log_id)
        self._statements = threading.RLock()
        self._has_checkpoints = version_of(connection) > 0  # a file that is only read may be of an older version
        self._known_blobs: set[bytes] = set()  # some of those that are in the file

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
            return cls(path, _connect_to_read(path), None, None)
        make_directory(path.parent, 0o700)
        lock = lock_log(path.parent, wait)
        try:
            finish_rotation(state_dir)
            connection = connect_to_write(path)
            new = not has_log(connection)
            keys = load_keys(state_dir / "keys", create=new)
            if new:
                create_log(connection, path, _new_key(keys, origin))
            sync_directory(path.parent)  # SQLite does this for the write-ahead log, but takes an error for success
            migrate(connection, path)
            log = cls(path, connection, keys, lock)
            if (log.key.signer, log.key.checkpoint_key) != (keys.signer, keys.checkpoint_public):
                raise Internal(f"the keys in {state_dir / 'keys'} are not those of the log in {path}")
            if origin is not None and not log.key.is_of(origin):
                raise Internal(f"the log in {path} has the origin {log.key.origin!r}, not {origin!r}")
            publish_key(state_dir, log.key)
        except BaseException:
            os.close(lock)
            raise
        return log

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
        blobs = []
        for sha256 in receipt.blob_hashes:
            blob = self.blob(sha256)
            if blob is None:
                raise Internal(f"receipt {seq} names the blob {sha256.hex()}, which the log in {self.path} lacks")
            blobs.append(blob)
        salts = None
        if with_salts:
            rows = self._query("SELECT prompt, output FROM salts WHERE seq = ?", seq)
            if not rows:
                raise InvalidArgument(f"the salts of receipt {seq} were forgotten", field="salts")
            salts = rows[0]
        return receipt_document(receipt, logged.signature, self.key, blobs, salts)

    def blob(self, sha256: bytes) -> bytes | None:
        """What was hashed to this: tag and canonical JSON, or the preimage of a registry reference."""
        rows = self._query("SELECT content FROM blobs WHERE sha256 = ?", sha256)
        return rows[0][0] if rows else None

    def blob_hashes(self) -> list[bytes]:
        """The hashes of all blobs."""
        return [row[0] for row in self._query("SELECT sha256 FROM blobs")]

    def leaf_hashes(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The hashes of the leaves from number `start` to before `stop`, in order; by default of all there are now."""
        stop = self.size() if stop is None else stop
        for first in range(start, stop, _PAGE):
            sql = "SELECT leaf_hash FROM receipts WHERE seq >= ? AND seq < ? ORDER BY seq"
            for row in self._query(sql, first, min(first + _PAGE, stop)):
                yield row[0]

    def checkpoints(self) -> list[SignedCheckpoint]:
        """The newest checkpoints that were signed, ascending; a log of an older version has none."""
        if not self._has_checkpoints:
            return []
        return [SignedCheckpoint(*row) for row in self._query("SELECT size, root, note FROM checkpoints ORDER BY size")]

    def newest_checkpoint(self) -> SignedCheckpoint | None:
        """The last checkpoint that was signed, released or not."""
        return (self.checkpoints() or [None])[-1]

    @property
    def in_custody(self) -> bool:
        """Whether this is the file that may sign: neither copied nor restored since it last was (see `custody`)."""
        rows = self._query("SELECT identity FROM custody")
        return bool(rows) and rows[0][0] == file_identity(self.path)

    def take_custody(self) -> None:
        """From now on this file signs. Only after a comparison with what others saw of the log."""
        self._writable()
        self._query("UPDATE custody SET identity = ?", file_identity(self.path))

    def sign_checkpoint(self, size: int, root: bytes) -> SignedCheckpoint:
        """Sign a tree's size and root, and return the note when that it was signed is durable.

        Internal: it would contradict what was signed before, or this is not the file that may sign.
        """
        keys = self._writable()
        checkpoint = Checkpoint(self.key.origin, size, root)
        note = str(sign_checkpoint(checkpoint, keys.checkpoint))
        with self._statements:
            if not self.in_custody:
                raise Internal(f"{self.path} was copied or restored: nothing is signed until it was compared")
            newest = self.newest_checkpoint()
            if newest is not None and (size < newest.size or (size == newest.size and root != newest.root)):
                raise Internal(f"a checkpoint of {newest.size} receipts is signed; this one of {size} contradicts it")
            with transaction(self._connection):
                self._connection.execute("INSERT OR IGNORE INTO checkpoints VALUES (?, ?, ?)", (size, root, note))
                self._connection.execute(
                    "DELETE FROM checkpoints WHERE size < (SELECT min(size) FROM "
                    "(SELECT size FROM checkpoints ORDER BY size DESC LIMIT ?))",
                    (KEPT_CHECKPOINTS,),
                )
        return SignedCheckpoint(size, root, note)

    @property
    def first_completion(self) -> int:
        """The number of the journal's completion that receipt 0 is of: completions count on when a log is closed."""
        return self._query("SELECT first_completion FROM log")[0][0] if self._has_checkpoints else 0

    @property
    def successor(self) -> LogKey | None:
        """The log that follows a closed one."""
        rows = self._query("SELECT successor FROM log") if self._has_checkpoints else [(None,)]
        return LogKey.parse(rows[0][0]) if rows[0][0] is not None else None

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

        Internal: a number or request id is there already, a number is left out, or the log is closed.
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
                new_blobs = [blob for blob in blobs.items() if blob[0] not in self._known_blobs]
                many("INSERT OR IGNORE INTO blobs VALUES (?, ?)", new_blobs)
                many("INSERT INTO salts VALUES (?, ?, ?)", salts)
                sql = "UPDATE log SET low_segment = ?, low_offset = ? WHERE successor IS NULL"
                if execute(sql, low_water).rowcount != 1:
                    raise Internal(f"the log in {self.path} is closed")
                execute("COMMIT")
                if len(self._known_blobs) > _KNOWN_BLOBS:
                    self._known_blobs.clear()
                self._known_blobs.update(blobs)
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


def _connect_to_read(path: Path) -> sqlite3.Connection:
    if not path.exists():
        raise InvalidArgument(f"no receipt log at {path}", field="state-dir")
    connection = connect(path)
    connection.execute("PRAGMA query_only = ON")
    if not has_log(connection):
        raise InvalidArgument(f"the receipt log at {path} is still being made", field="state-dir")
    return connection


def _new_key(keys: LogKeys, origin: str | None) -> LogKey:
    nonce = secrets.token_bytes(32)
    origin = origin or f"openlora/{nonce[:8].hex()}"
    return LogKey(origin, keys.signer, keys.checkpoint_public, nonce, ZERO32)


def publish_key(state_dir: Path, key: LogKey) -> None:
    """Write `log.pub` anew at each start: it follows from the log, whatever happened to the file."""
    draft = state_dir / "log.pub.new"
    draft.write_text(key.line + "\n")
    draft.rename(state_dir / "log.pub")
