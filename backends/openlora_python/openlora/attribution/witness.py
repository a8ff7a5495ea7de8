"""A witness (c2sp.org/tlog-witness): cosigns checkpoints of known logs, each consistent with all that it saw before.

What it saw of each log lies in `witness.sqlite`; the check of the old size and the change are one transaction, durable
before anybody gets the cosignature, so that two requests at once can't take the state back.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..errors import Internal, InvalidArgument, OpenLoRAError, ReceiptInvalid
from ..transaction import transaction
from .checkpoint import Checkpoint, checkpoint_key, cosign, parse_checkpoint
from .log_key import LogKey
from .merkle_tree import EMPTY_ROOT, verify_consistency
from .signed_note import COSIGNATURE_V1, NoteKey, SignedNote, parse_base64, parse_note

MAX_BODY = 1 << 16

_MAX_HASHES = 63
_OLD = re.compile(r"old (0|[1-9][0-9]{0,18})")
_TABLE = """CREATE TABLE IF NOT EXISTS logs (origin TEXT PRIMARY KEY, size INTEGER NOT NULL, root BLOB NOT NULL,
    note TEXT NOT NULL) STRICT"""


@dataclass(frozen=True)
class Answer:
    """What a request gets: an HTTP status and a body."""

    status: int
    body: str
    content_type: str = "text/plain; charset=utf-8"


class Witness:
    """One witness and its state. Thread-safe."""

    def __init__(
        self,
        state_dir: Path,
        logs: Sequence[LogKey],
        key: Ed25519PrivateKey,
        name: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """InvalidArgument: two logs have one origin. Internal: SQLite would not keep what is committed."""
        self._logs = {log.origin: checkpoint_key(log) for log in logs}
        if len(self._logs) != len(logs):
            raise InvalidArgument("two of the known logs have the same origin", field="known-logs")
        self._origins = {hashlib.sha256(origin.encode()).hexdigest(): origin for origin in self._logs}
        self._key = key
        self._clock = clock
        self.public = NoteKey(name, COSIGNATURE_V1, key.public_key().public_bytes_raw())
        self._lock = threading.Lock()
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = state_dir / "witness.sqlite"
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10.0)
        for pragma, value in {"journal_mode": "wal", "synchronous": 2}.items():
            self._connection.execute(f"PRAGMA {pragma} = {value}")
            if self._connection.execute(f"PRAGMA {pragma}").fetchone()[0] != value:
                raise Internal(f"SQLite {sqlite3.sqlite_version} does not keep {pragma} at {value!r}")
        self._connection.execute(_TABLE)

    def close(self) -> None:
        self._connection.close()

    def add_checkpoint(self, body: bytes) -> Answer:
        """The request of a log that wants its checkpoint cosigned."""
        try:
            old_size, proof, note, checkpoint = _parse(body)
        except ReceiptInvalid as error:
            return Answer(400, f"{error.message}\n")
        known = self._logs.get(checkpoint.origin)
        if known is None:
            return Answer(404, f"the log {checkpoint.origin!r} is not known here\n")
        signatures = known.signatures_of(note)
        if not signatures or not all(known.is_signed(note.text.encode(), one) for one in signatures):
            return Answer(403, "no signature of the log's known key, or a wrong one\n")
        if old_size > checkpoint.size:
            return Answer(400, f"old {old_size} is over the checkpoint's {checkpoint.size}\n")
        with self._lock, transaction(self._connection):
            return self._advance(old_size, proof, note, checkpoint, known)

    def newest(self, origin_hash: str) -> Answer:
        """The newest checkpoint cosigned for the log whose origin has this SHA-256, for monitors."""
        with self._lock:
            sql = "SELECT note FROM logs WHERE origin = ?"
            row = self._connection.execute(sql, (self._origins.get(origin_hash, ""),)).fetchone()
        return Answer(200, row[0]) if row is not None else Answer(404, "no checkpoint of such a log\n")

    def _advance(
        self, old_size: int, proof: Sequence[bytes], note: SignedNote, checkpoint: Checkpoint, known: NoteKey
    ) -> Answer:
        """Within the transaction: compare with what was seen last, and go on from there."""
        sql = "SELECT size, root FROM logs WHERE origin = ?"
        size, root = self._connection.execute(sql, (checkpoint.origin,)).fetchone() or (0, EMPTY_ROOT)
        if old_size != size:
            return Answer(409, f"{size}\n", "text/x.tlog.size")
        if not verify_consistency(size, root, checkpoint.size, checkpoint.root, proof):
            return Answer(422, f"not consistent with the {size} leaves that were seen before\n")
        cosignature = cosign(note, self._key, self.public.name, int(self._clock()))
        ours = tuple(one for one in note.signatures if (one.name, one.key_id) == (known.name, known.key_id))
        kept = SignedNote(note.text, (*ours, cosignature))
        values = (checkpoint.origin, checkpoint.size, checkpoint.root, str(kept))
        self._connection.execute("INSERT OR REPLACE INTO logs VALUES (?, ?, ?, ?)", values)
        return Answer(200, cosignature.line)


def _parse(body: bytes) -> tuple[int, list[bytes], SignedNote, Checkpoint]:
    """Old size, proof, note and its checkpoint. ReceiptInvalid: another form."""
    try:
        head, separator, rest = body.decode().partition("\n\n")
    except UnicodeDecodeError as error:
        raise ReceiptInvalid("the body is not UTF-8") from error
    first, *lines = head.split("\n")
    old = _OLD.fullmatch(first)
    if old is None or not separator or len(lines) > _MAX_HASHES:
        raise ReceiptInvalid(f"wants 'old N', at most {_MAX_HASHES} hashes, an empty line and a checkpoint")
    proof = [parse_base64(line, "proof") for line in lines]
    note = parse_note(rest)
    try:
        return int(old[1]), proof, note, parse_checkpoint(note)
    except OpenLoRAError as error:
        raise ReceiptInvalid(error.message) from error
