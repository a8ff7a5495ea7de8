"""The quota ledger on disk: `quota.sqlite` as of some completion of the usage journal, and the journal from there on.

Saving every second is enough: what a crash loses of it is in the journal, whose segments are erased two minutes after
they were last written to at the earliest. A ledger that can't be saved for a minute therefore grants no quota any more.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from threading import Lock

from ...attribution.frames import CompletionFrame, IntentFrame, SegmentHeader
from ...attribution.reader import JournalReader
from ...transaction import create_private
from .quota import KEPT_DAYS, LedgerState, QuotaLedger, Reservation, day_of

UNSAVED_SECONDS = 60.0
BUSY_SECONDS = 10.0
SCHEMA = """
CREATE TABLE IF NOT EXISTS ledger (
    id INTEGER PRIMARY KEY CHECK (id = 1), unknown_until INTEGER NOT NULL, next_seq INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS used (
    day INTEGER NOT NULL, account TEXT NOT NULL, tokens INTEGER NOT NULL CHECK (tokens >= 0), PRIMARY KEY (day, account)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS reserved (
    request_id TEXT PRIMARY KEY, started_at INTEGER NOT NULL, accounts TEXT NOT NULL,
    in_tokens INTEGER NOT NULL, max_tokens INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
"""

RESERVED_COLUMNS = "request_id, started_at, accounts, in_tokens, max_tokens"

log = logging.getLogger(__name__)


class LedgerKeeper:
    """Brings the ledger from the disk, and saves it again and again. Make it before the journal is opened.

    Opening a journal may erase segments that are old; so they are read before, and what recovery added after.
    """

    def __init__(self, path: Path, journal_directory: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """A file that can't be read is left as it is: the ledger then grants no quota, and nothing is saved."""
        self._path = path
        self._journal_directory = journal_directory
        self._lock = Lock()
        self._connection: sqlite3.Connection | None = None
        self._clock = clock
        self._saved_at = clock()
        self._damage = ""
        try:
            saved = load_ledger(path)
        except (sqlite3.Error, ValueError, OSError) as error:
            log.error("%s: %s", path, error)
            self._damage = f"{path.name} is damaged; remove it while the server is stopped"
            saved = LedgerState()
        self._state = catch_up(saved, journal_directory)

    def open(self) -> QuotaLedger:
        """The ledger, once the journal is open and every request of an earlier process has its completion."""
        state = catch_up(self._state, self._journal_directory)
        state.reserved = {}
        self.ledger = QuotaLedger(state)
        self.ledger.fault = self._damage
        return self.ledger

    def save(self) -> None:
        """Write what has changed; never raises."""
        if self._damage:
            return
        with self._lock:
            state = self.ledger.snapshot()
            if state is not None:
                try:
                    if self._connection is None:
                        self._connection = _connect(self._path)
                    _write(self._connection, state)
                except (sqlite3.Error, OSError) as error:
                    log.error("%s: %s", self._path, error)
                    self.ledger.not_saved(state)
                    self._disconnect()
                else:
                    self._saved_at = self._clock()
            elif not self.ledger.behind:
                self._saved_at = self._clock()
            self.ledger.unsaved = self._clock() - self._saved_at > UNSAVED_SECONDS

    def close(self) -> None:
        """Save for the last time."""
        self.save()
        with self._lock:
            self._disconnect()

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None


def load_ledger(path: Path) -> LedgerState:
    """What was saved last, an empty one if nothing was. sqlite3.Error, ValueError: the file is damaged."""
    if not path.exists():
        return LedgerState()
    with closing(_connect(path)) as connection:
        row = connection.execute("SELECT unknown_until, next_seq FROM ledger").fetchone()
        used = connection.execute("SELECT day, account, tokens FROM used").fetchall()
        reserved = connection.execute(f"SELECT {RESERVED_COLUMNS} FROM reserved").fetchall()
    if row is None:
        return LedgerState()
    return LedgerState(
        *row,
        {(day, account): tokens for day, account, tokens in used},
        {
            request_id: Reservation(started_at, tuple(json.loads(accounts)), in_tokens, max_tokens)
            for request_id, started_at, accounts, in_tokens, max_tokens in reserved
        },
    )


def catch_up(state: LedgerState, journal_directory: Path) -> LedgerState:
    """`state` with every later completion of the journal booked; `reserved` are the requests that have none.

    Where completions are missing that were not saved either, what was used until today is not known.
    """
    used, running = dict(state.used), dict(state.reserved)
    next_seq, lost = 0, 0
    for frame, _, _ in JournalReader(journal_directory).read():
        if isinstance(frame, SegmentHeader):
            lost += max(0, frame.next_seq - max(next_seq, state.next_seq))
            next_seq = frame.next_seq
        elif isinstance(frame, IntentFrame):
            running[frame.request_id] = Reservation(frame.started_at, frame.accounts, frame.in_tokens, 0)
        elif isinstance(frame, CompletionFrame):
            next_seq = frame.seq + 1
            reservation = running.pop(frame.request_id, None)
            if frame.seq < state.next_seq:
                continue
            if reservation is None:
                lost += 1
                continue
            for account in reservation.accounts:
                place = (reservation.day, account)
                used[place] = used.get(place, 0) + reservation.in_tokens + frame.out_tokens
    unknown_until = state.unknown_until
    if lost:
        log.warning("the quota ledger lost %d requests; nothing with a quota is granted until midnight UTC", lost)
        unknown_until = day_of(time.time()) + 1
    return LedgerState(unknown_until, next_seq, used, running)


def _write(connection: sqlite3.Connection, state: LedgerState) -> None:
    """One transaction: as a whole or not at all."""
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT OR REPLACE INTO ledger VALUES (1, ?, ?)", (state.unknown_until, state.next_seq))
        connection.executemany(
            "INSERT OR REPLACE INTO used VALUES (?, ?, ?)", [(*place, tokens) for place, tokens in state.used.items()]
        )
        connection.execute("DELETE FROM used WHERE day < ?", (day_of(time.time()) - KEPT_DAYS,))
        connection.execute("DELETE FROM reserved")
        connection.executemany(
            f"INSERT INTO reserved ({RESERVED_COLUMNS}) VALUES (?, ?, ?, ?, ?)",
            [
                (request_id, one.started_at, json.dumps(one.accounts), one.in_tokens, one.max_tokens)
                for request_id, one in state.reserved.items()
            ],
        )


def _connect(path: Path) -> sqlite3.Connection:
    create_private(path)
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # the journal may erase what is saved here
        connection.executescript(SCHEMA)
    except sqlite3.Error:
        connection.close()
        raise
    return connection
