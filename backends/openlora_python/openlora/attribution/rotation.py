"""Closing a log and opening the one that follows it: with new keys, another origin, and its predecessor's id.

The new log is made aside in `log.next`. That directory's rename is the moment of the change: what follows are moves,
which the next start finishes if they were interrupted. The closed log is a state directory of its own, `closed/<id>`,
to be read with every command. The journal stays where it is: what it has and the closed log does not goes into the new
one.
"""

from __future__ import annotations

import secrets
import shutil
from contextlib import closing
from pathlib import Path

from ..errors import Internal
from .frames import (
    CompletionFrame,
    SegmentHeader,
    decode_frame,
    list_segments,
    segment_path,
    sync_directory,
)
from .keys import load_keys
from .log_database import (
    connect,
    connect_to_write,
    create_log,
    migrate,
    stored_key,
)
from .log_key import LogKey

_DATABASE = "receipts.sqlite"
_LOG_FILES = (_DATABASE, f"{_DATABASE}-wal", f"{_DATABASE}-shm", "checkpoint", "cosigned")


def closed_directory(state_dir: Path, key: LogKey) -> Path:
    """Where a log lies when it is closed: a state directory."""
    return state_dir / "closed" / key.log_id.hex()[:16]


def begin_rotation(state_dir: Path, known: int = 0) -> LogKey:
    """Make the log that follows, and let `finish_rotation` put it in place. The caller holds the log's lock, closed.

    `known`: so many receipts of the log are known to have been there, although it may have forgotten some.
    """
    draft = state_dir / "log.draft"
    if draft.exists():
        shutil.rmtree(draft)  # what a crash left of an attempt that never counted
    draft.mkdir(mode=0o700)
    with closing(connect(state_dir / "log" / _DATABASE)) as old:
        migrate(old, state_dir / "log" / _DATABASE)
        sql = "SELECT first_completion, (SELECT count(*) FROM receipts), (SELECT max(size) FROM checkpoints) FROM log"
        first, size, signed = old.execute(sql).fetchone()
        predecessor = stored_key(old)
    keys = load_keys(draft / "keys", create=True)
    nonce = secrets.token_bytes(32)
    origin = predecessor.following_origin(nonce)
    key = LogKey(origin, keys.signer, keys.checkpoint_public, nonce, predecessor.log_id)
    with closing(connect_to_write(draft / _DATABASE)) as new:
        # Not again what is in the closed log, and nothing less than all that the journal has beyond.
        oldest, coming = _completions(state_dir / "journal")
        create_log(new, draft / _DATABASE, key, min(max(first + max(size, signed or 0, known), oldest), coming))
    sync_directory(draft)
    draft.rename(state_dir / "log.next")
    sync_directory(state_dir)
    return key


def finish_rotation(state_dir: Path) -> None:
    """Put the log that follows in its place, if one is waiting. The caller holds the lock, and no log is open."""
    waiting = state_dir / "log.next"
    if not waiting.exists():
        return
    log = state_dir / "log"
    if (waiting / _DATABASE).exists():
        with closing(connect(waiting / _DATABASE)) as new:
            key = stored_key(new)
        closed = state_dir / "closed" / key.predecessor.hex()[:16]
        for directory in (closed.parent, closed, closed / "log"):
            directory.mkdir(mode=0o700, exist_ok=True)
        if (log / _DATABASE).exists():
            _close_log(log / _DATABASE, closed, key)
        for name in _LOG_FILES:
            if (log / name).exists():
                (log / name).rename(closed / "log" / name)
        if (waiting / "keys").exists():
            if not (closed / "keys").exists():
                (state_dir / "keys").rename(closed / "keys")
            (waiting / "keys").rename(state_dir / "keys")
        for directory in (closed / "log", closed, closed.parent, state_dir):
            sync_directory(directory)
        (waiting / _DATABASE).rename(log / _DATABASE)
        sync_directory(log)
    waiting.rmdir()
    sync_directory(state_dir)


def _completions(journal: Path) -> tuple[int, int]:
    """The number of the first completion that the journal still has, and of the one that comes next."""
    numbers = []
    for segment in list_segments(journal):
        content, place = segment_path(journal, segment).read_bytes(), 0
        while (found := decode_frame(content, place)) is not None:
            frame, place = found
            if isinstance(frame, SegmentHeader):
                numbers.append(frame.next_seq)
            elif isinstance(frame, CompletionFrame):
                numbers.append(frame.seq + 1)
    return (numbers[0], numbers[-1]) if numbers else (0, 0)


def _close_log(path: Path, closed: Path, successor: LogKey) -> None:
    """Write down in the log what follows it, and its key line beside it."""
    with closing(connect_to_write(path)) as old:
        old.execute("UPDATE log SET successor = ?", (successor.line,))
        (closed / "log.pub").write_text(stored_key(old).line + "\n")
        busy, _, _ = old.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    if busy:
        raise Internal(f"somebody reads {path}, so it can't be moved: close that and start again")
