"""A journal and a log under load, what they acknowledged, and whether what is left of them holds it.

`python durability_cases.py ROOT SEED FIRST COUNT [--die]` writes and projects usage in the state directory ROOT/state
and says by lines in the file ROOT/said what was acknowledged; with `--die` it ends where a disk error is seen.
`write_usage` and `project_usage` are its halves, for processes of their own.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from attribution_cases import commit_of, make_intent, request_id

from openlora.attribution.checkpointer import Checkpointer
from openlora.attribution.frames import IntentFrame, list_segments, make_directory, segment_path
from openlora.attribution.journal import STATUS_ABORTED, STATUS_COMPLETE, Journal, JournalReader, ProgressFrame
from openlora.attribution.log import LoggedReceipt, ReceiptLog
from openlora.attribution.merkle_tree import MerkleTree
from openlora.attribution.projection import Projector
from openlora.errors import Unavailable

Say = Callable[[str], object]
SEGMENT_BYTES = 12_000
OUTSTANDING = 24  # requests that are under way at once


def write_usage(state: Path, say: Say, seed: int, first: int, count: int, retain_seconds: int) -> None:
    """Requests by the real journal, some of them left open; says what is durable."""
    chance = random.Random(seed)
    places = threading.Semaphore(OUTSTANDING)
    failed = threading.Event()
    journal = Journal.open(
        state / "journal",
        segment_bytes=SEGMENT_BYTES,
        retain_seconds=retain_seconds,
        on_failure=lambda error: failed.set(),
    )
    say("open")

    def serve(*numbers: int) -> None:
        def fail(error: BaseException) -> None:
            places.release()

        def fail_all(error: BaseException) -> None:
            for _ in numbers:
                places.release()

        def started() -> None:
            for number in numbers:
                say(f"intent {number}")
                if number % 9 == 0:
                    places.release()
                    continue
                try:
                    journal.append_progress([ProgressFrame(request_id(number), 1, commit_of(number, "t"))])
                    commit = commit_of(number, "te")
                    ended = lambda seq, number=number: (say(f"completion {number} {seq}"), places.release())  # noqa: E731
                    journal.append_completion(
                        request_id(number), STATUS_COMPLETE, 2, commit, 1_800_000_000, ended, fail
                    )
                except Unavailable as error:
                    fail(error)

        try:
            journal.append([make_intent(number) for number in numbers], started, fail_all)
        except Unavailable as error:
            fail_all(error)

    number = first
    while number < first + count:
        batch = range(number, number + chance.randint(1, 4))
        number = batch.stop
        for _ in batch:
            places.acquire()
        if failed.is_set() or journal.failed is not None:
            failed.wait()
            failed.clear()
            say("stopped")
            while journal.failed is not None:
                with suppress(Unavailable):
                    journal.reopen()
            say("open")
        serve(*batch)
    for _ in range(OUTSTANDING):
        places.acquire()
    journal.close()


def project_usage(state: Path, say: Say, seed: int, ended: Callable[[], bool], on_error: Say | None = None) -> None:
    """The real projection into the real log; says which receipts an answer could leave with."""
    chance = random.Random(seed)
    with ReceiptLog.open(state) as log:
        log.take_custody()  # the files of a test are copies
        projector, checkpointer = Projector(state / "journal", log), Checkpointer(log)
        say("log")
        while True:
            last = ended()
            try:
                new = projector.project(chance.randint(1, 8))
                if chance.random() < 0.2 and checkpointer.sign_due(now=True):
                    projector.release(checkpointer.signed_size)
                    if (signed := log.newest_checkpoint()) is not None:
                        say(f"checkpoint {signed.size} {signed.root.hex()}")
            except sqlite3.Error as error:
                if on_error is None:
                    raise
                on_error(str(error))
                continue
            for one in log.list(new.start, len(new)):
                say(f"receipt {one.seq} {receipt_digest(one)}")
            if not new:
                if last:
                    return
                time.sleep(0.001)  # nobody tells it of new ones


def receipt_digest(logged: LoggedReceipt) -> str:
    return hashlib.sha256(logged.leaf + logged.leaf_hash + logged.signature).hexdigest()


@dataclass
class Acknowledged:
    """What somebody outside was told, and so must be there for ever."""

    intents: set[str] = field(default_factory=set)
    completions: dict[int, str] = field(default_factory=dict)  # number → request id
    receipts: dict[int, str] = field(default_factory=dict)  # number → digest of its bytes
    checkpoints: dict[int, str] = field(default_factory=dict)  # size → root

    def take(self, line: str) -> None:
        match line.split():
            case ["intent", number]:
                self.intents.add(request_id(int(number)))
            case ["completion", number, seq]:
                self.completions[int(seq)] = request_id(int(number))
            case ["receipt", seq, digest]:
                assert self.receipts.setdefault(int(seq), digest) == digest, f"receipt {seq} has changed"
            case ["checkpoint", size, root]:
                assert self.checkpoints.setdefault(int(size), root) == root, f"two checkpoints of {size}"


def check_books(state: Path, told: Acknowledged, archive: Path) -> None:
    """Reopen journal and log, project, and hold the outcome against what was told and against an undisturbed run.

    `archive` keeps the segments that were erased since the state began, so that the whole journal can be projected
    again; it is completed with those that are there.
    """
    with Journal.open(state / "journal", segment_bytes=SEGMENT_BYTES) as journal:
        assert not journal.recovery.aborted or journal.recovery.aborted[0].status == STATUS_ABORTED
    receipts = project_all(state)
    names = [one.receipt.request_id.hex() for one in receipts]
    assert [one.seq for one in receipts] == [one.receipt.seq for one in receipts] == list(range(len(receipts)))
    assert len(set(names)) == len(names), "a request has two receipts"
    for seq, name in told.completions.items():
        assert seq < len(receipts), f"completion {seq} was acknowledged and has no receipt; there are {len(receipts)}"
        assert (names[seq], receipts[seq].receipt.status) == (name, STATUS_COMPLETE), f"receipt {seq} is another's"
    for seq, digest in told.receipts.items():
        assert seq < len(receipts), f"receipt {seq} was delivered and is gone; there are {len(receipts)}"
        assert receipt_digest(receipts[seq]) == digest, f"receipt {seq} was delivered with other bytes"
    assert told.intents <= set(names), "an acknowledged intent has no receipt"
    tree = MerkleTree(one.leaf_hash for one in receipts)
    for size, root in told.checkpoints.items():
        assert tree.root(size).hex() == root, f"the checkpoint of {size} is not of these receipts"
    with ReceiptLog.open(state) as log:
        Checkpointer(log)  # that the log is what it has signed

    undisturbed = archive.with_name(archive.name + ".whole")
    shutil.copytree(state, undisturbed)
    present = list_segments(state / "journal")
    for number in list_segments(archive):
        if number < present[0]:
            shutil.copy(segment_path(archive, number), segment_path(undisturbed / "journal", number))
    assert list_segments(undisturbed / "journal") == list(range(present[-1] + 1))
    _empty_log(undisturbed)
    again = project_all(undisturbed)
    assert again == receipts, "an undisturbed projection gives other receipts"
    started = {
        entry.frame.request_id
        for entry in JournalReader(undisturbed / "journal").read()
        if isinstance(entry.frame, IntentFrame)
    }
    assert started == set(names)
    shutil.rmtree(undisturbed)


def project_all(state: Path) -> list[LoggedReceipt]:
    with ReceiptLog.open(state) as log:
        projector = Projector(state / "journal", log)
        while projector.project():
            pass
        return log.list(limit=10**6)


def _empty_log(state: Path) -> None:
    """The same log, its id and keys, before its first receipt."""
    with closing(sqlite3.connect(state / "log" / "receipts.sqlite")) as connection, connection:
        for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            if table != "log":
                connection.execute(f"DELETE FROM {table}")
        connection.execute("UPDATE log SET low_segment = 0, low_offset = 0")


def keep_writing(said: Connection, state: Path, seed: int, first: int) -> None:
    """`write_usage` without end, in a process of its own."""
    write_usage(state, _say_to(said.fileno()), seed, first, 1_000_000, retain_seconds=10**6)


def keep_projecting(said: Connection, state: Path, seed: int) -> None:
    """`project_usage` without end, in a process of its own."""
    project_usage(state, _say_to(said.fileno()), seed, lambda: False)


def _say_to(descriptor: int) -> Say:
    """Whole lines: writes this short are not mixed, and not cut."""
    return lambda line: os.write(descriptor, f"{line}\n".encode())


def main() -> None:
    root, seed, first, count = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    state = root / "state"
    make_directory(state)  # as the launcher does, before it starts the others
    dies = sys.argv[5:] == ["--die"]
    write_line = _say_to(os.open(root / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND))
    written = threading.Event()

    def say(line: str) -> None:
        write_line(line)
        if dies and line == "stopped":
            os._exit(9)

    def log_failed(why: str) -> None:
        say(f"log-failed {why}")
        if dies:
            os._exit(9)

    project = threading.Thread(target=project_usage, args=(state, say, seed, written.is_set, log_failed))
    project.start()
    try:
        write_usage(state, say, seed, first, count, retain_seconds=-1)
    finally:  # a journal that can't be opened ends both
        written.set()
        project.join()


if __name__ == "__main__":
    main()
