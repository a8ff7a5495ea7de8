"""Checkpoints are signed once, durably, and by one file only, whatever restarts, copies, restores and rotation do."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from attribution_cases import (
    Acknowledgements,
    append_completion,
    append_intent,
    commit_of,
    make_intent,
    python_environment,
    request_id,
    serve_receipts,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from openlora.attribution.checkpoint import Checkpoint, sign_checkpoint, verify_checkpoint
from openlora.attribution.checkpointer import Checkpointer
from openlora.attribution.commands import receipts_app
from openlora.attribution.custody import Custody, rotate, settle_custody
from openlora.attribution.frames import Mark
from openlora.attribution.journal import Journal
from openlora.attribution.keys import load_keys
from openlora.attribution.log import KEPT_CHECKPOINTS, NewReceipt, ReceiptLog
from openlora.attribution.log_key import LogKey
from openlora.attribution.merkle_tree import MerkleTree
from openlora.attribution.projection import Projector
from openlora.attribution.receipt import encode_leaf
from openlora.attribution.verify import verify_receipt
from openlora.attribution.witness import Witness
from openlora.errors import Internal, Unavailable


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory with five receipts under a checkpoint."""
    serve_receipts(tmp_path / "state", *range(5))
    return tmp_path / "state"


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(receipts_app, [str(one) for one in arguments])
    return result.exit_code, result.output


def key_of(state: Path) -> LogKey:
    return LogKey.parse((state / "log.pub").read_text().strip())


def released(state: Path) -> Checkpoint:
    return verify_checkpoint((state / "log" / "checkpoint").read_bytes(), key_of(state))


def change(state: Path, *statements: str) -> None:
    with closing(sqlite3.connect(state / "log" / "receipts.sqlite")) as connection, connection:
        for statement in statements:
            connection.execute(statement)


# --- checkpoints -------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_of_all_receipts_and_not_more_than_one_a_second(state: Path) -> None:
    with closing(ReceiptLog.open(state)) as log:
        tree = MerkleTree(log.leaf_hashes())
        checkpointer = Checkpointer(log)
        assert (checkpointer.signed_size, released(state).size) == (5, 5)
        assert checkpointer.sign_due()  # nothing new
    serve_receipts(state, 5, checkpointed=False)
    with closing(ReceiptLog.open(state)) as log:
        checkpointer = Checkpointer(log)
        assert checkpointer.sign_due() and released(state).size == 6  # the first is due at once
    serve_receipts(state, 6, checkpointed=False)
    with closing(ReceiptLog.open(state)) as log:
        checkpointer = Checkpointer(log)
        checkpointer.sign_due()
        projector = Projector(state / "journal", log)
        serve_size = log.size()
        projector.release(serve_size - 1)
        assert Mark(state / "journal", "projected").read() is None
        projector.release(serve_size)
        assert Mark(state / "journal", "projected").read() == log.low_water
        tree = MerkleTree(log.leaf_hashes())
        assert [(one.size, one.root) for one in log.checkpoints()] == [(n, tree.root(n)) for n in (5, 6, 7)]
        assert log.newest_checkpoint().note == (state / "log" / "checkpoint").read_text()


def test_a_second_checkpoint_waits_its_time(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("openlora.attribution.checkpointer.time.monotonic", lambda: now[0])
    with closing(ReceiptLog.open(state)) as log:
        checkpointer = Checkpointer(log)
        sizes = []
        for number in range(5, 15):
            log_more(log, state, number)
            sizes.append(checkpointer.sign_due() and checkpointer.signed_size)
            now[0] += 0.3
        assert sizes == [6, False, False, False, 10, False, False, False, 14, False]
        assert checkpointer.sign_due(now=True) and released(state).size == 15


def log_more(log: ReceiptLog, state: Path, number: int) -> None:
    """One more receipt into a log that is open: a copy of the last one, with its own number and request."""
    last = log.get(log.size() - 1).receipt
    receipt = dataclasses.replace(last, seq=log.size(), request_id=bytes.fromhex(request_id(10**6 + number)))
    blobs = tuple(log.blob(one) for one in receipt.blob_hashes)
    log.append([NewReceipt(receipt, encode_leaf(receipt), blobs, bytes(32), bytes(32))], log.low_water)


def test_that_it_was_signed_is_durable_before_the_note_is_released(state: Path) -> None:
    serve_receipts(state, 5, checkpointed=False)
    with closing(ReceiptLog.open(state)) as log:
        checkpointer = Checkpointer(log)
        (state / "log" / "checkpoint.new").mkdir()  # the note can't be written
        with pytest.raises(OSError):
            checkpointer.sign_due(now=True)
        assert released(state).size == 5
    (state / "log" / "checkpoint.new").rmdir()
    with closing(ReceiptLog.open(state)) as log:
        assert log.newest_checkpoint().size == 6
        assert Checkpointer(log).signed_size == 6 and released(state).size == 6  # released after all


def test_nothing_is_signed_that_contradicts_what_was_signed(state: Path) -> None:
    with closing(ReceiptLog.open(state)) as log:
        tree = MerkleTree(log.leaf_hashes())
        for size, root in ((4, tree.root(4)), (5, tree.root(4))):
            with pytest.raises(Internal, match="contradicts"):
                log.sign_checkpoint(size, root)
        assert log.sign_checkpoint(5, tree.root(5)) == log.newest_checkpoint()
        assert len(log.checkpoints()) == 1
        for size in range(6, KEPT_CHECKPOINTS + 20):
            log.sign_checkpoint(size, bytes(32))
        kept = [one.size for one in log.checkpoints()]
        assert len(kept) == KEPT_CHECKPOINTS and kept[-1] == KEPT_CHECKPOINTS + 19


@pytest.mark.parametrize(
    "statement", ["UPDATE receipts SET leaf_hash = zeroblob(32) WHERE seq = 1", "DELETE FROM receipts WHERE seq = 4"]
)
def test_a_log_that_is_not_what_it_signed_signs_no_more(state: Path, statement: str) -> None:
    change(state, statement)
    with closing(ReceiptLog.open(state)) as log, pytest.raises(Internal, match="not those whose checkpoint"):
        Checkpointer(log)
    rotate(state)
    serve_receipts(state, 9)
    assert released(state).size == 1


KILLED = """
import sys
from pathlib import Path
from openlora.attribution.checkpointer import Checkpointer
from openlora.attribution.log import ReceiptLog
from openlora.attribution.projection import Projector
state = Path(sys.argv[1])
log = ReceiptLog.open(state)
projector, checkpointer = Projector(state / "journal", log), Checkpointer(log)
print("open", flush=True)
while projector.project(limit=3):
    checkpointer.sign_due(now=True)
"""


def test_a_log_killed_at_random_moments_never_released_what_it_forgot(state: Path) -> None:
    chance, notes = random.Random(7), set()
    serve_receipts(state, *range(5, 6), checkpointed=False)
    acknowledged = Acknowledgements()
    callbacks = (acknowledged.on_durable, acknowledged.on_error)
    with Journal.open(state / "journal") as journal:
        journal.append([make_intent(number) for number in range(6, 400)], *callbacks)
        for number in range(6, 400):
            journal.append_completion(request_id(number), 1, 5, commit_of(number, "text"), 1_800_000_000, *callbacks)
        acknowledged.wait(395)
    for _ in range(6):
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, str(state)], env=python_environment(), stdout=subprocess.PIPE
        ) as child:
            assert child.stdout.readline() == b"open\n"
            threading.Event().wait(chance.uniform(0, 0.05))  # the random moment
            child.send_signal(signal.SIGKILL)
        notes.add(released(state))
    serve_receipts(state, 400)
    with closing(ReceiptLog.open(state, read_only=True)) as log:
        tree = MerkleTree(log.leaf_hashes())
        signed = {one.size: one.root for one in log.checkpoints()}
    assert tree.size == 401
    assert all(signed[one.size] == one.root == tree.root(one.size) for one in notes)
    assert run("fsck", "--state-dir", state)[0] == 0


def test_a_log_of_the_first_version_is_read_and_migrated(state: Path) -> None:
    change(
        state,
        "DROP TABLE checkpoints",
        "DROP TABLE custody",
        "ALTER TABLE log DROP COLUMN first_completion",
        "ALTER TABLE log DROP COLUMN successor",
        "PRAGMA user_version = 0",
    )
    (state / "log" / "checkpoint").unlink()
    assert run("verify", "--all", "--log", state / "log.pub", "--state-dir", state)[0] == 0
    assert run("checkpoint", "--state-dir", state)[0] == 7
    assert run("fsck", "--state-dir", state)[0] == 0
    serve_receipts(state, 5)
    assert released(state).size == 6
    assert settle_custody(state, []) is Custody.KEPT
    change(state, "PRAGMA user_version = 9")
    with pytest.raises(Internal, match="version 9"):
        ReceiptLog.open(state)


# --- custody -----------------------------------------------------------------------------------------------------


def test_a_directory_that_was_moved_goes_on_and_a_copy_does_not(state: Path, tmp_path: Path) -> None:
    moved = state.rename(tmp_path / "moved")
    assert settle_custody(moved, []) is Custody.KEPT
    copy = shutil.copytree(moved, tmp_path / "copy")
    serve_receipts(copy, 7)
    assert released(copy).size == 5  # receipts go on, checkpoints don't
    with closing(ReceiptLog.open(copy)) as log, pytest.raises(Internal, match="copied or restored"):
        log.sign_checkpoint(6, MerkleTree(log.leaf_hashes()).root())
    old = key_of(moved)
    assert settle_custody(copy, []) is Custody.CLOSED
    assert settle_custody(copy, []) is Custody.KEPT
    new = key_of(copy)
    assert new.predecessor == old.log_id
    assert {new.origin, new.signer, new.checkpoint_key}.isdisjoint({old.origin, old.signer, old.checkpoint_key})
    serve_receipts(copy, 8)
    assert released(copy).size == 1
    serve_receipts(moved, 9)
    assert released(moved).size == 6 and key_of(moved) == old
    assert settle_custody(tmp_path / "nothing", []) is Custody.KEPT


@pytest.fixture
def witness(state: Path, tmp_path: Path) -> Witness:
    """A witness that has cosigned the log's five receipts."""
    key = Ed25519PrivateKey.generate()
    one = Witness(tmp_path / "witness", [key_of(state)], key, "witness.example")
    assert one.add_checkpoint(b"old 0\n\n" + (state / "log" / "checkpoint").read_bytes()).status == 200
    return one


def seen_by(witness: Witness) -> Callable[[LogKey], Checkpoint | None]:
    def newest(key: LogKey) -> Checkpoint | None:
        answer = witness.newest(hashlib.sha256(key.origin.encode()).hexdigest())
        return verify_checkpoint(answer.body, key) if answer.status == 200 else None

    return newest


def unreachable(key: LogKey) -> Checkpoint | None:
    raise Unavailable("no answer")


def unknown(key: LogKey) -> Checkpoint | None:
    return None


def test_a_restored_log_that_begins_with_all_that_was_seen_signs_on(
    state: Path, witness: Witness, tmp_path: Path
) -> None:
    copy = shutil.copytree(state, tmp_path / "copy")
    key = key_of(state)
    assert settle_custody(copy, [seen_by(witness), unreachable]) is Custody.UNCOMPARED
    serve_receipts(copy, 7)
    assert released(copy).size == 5
    assert settle_custody(copy, [unknown, seen_by(witness)]) is Custody.TAKEN
    serve_receipts(copy, 8)
    assert released(copy).size == 7 and key_of(copy) == key


def test_a_log_that_is_behind_or_forked_is_closed(state: Path, witness: Witness, tmp_path: Path) -> None:
    behind = shutil.copytree(state, tmp_path / "behind")
    forked = shutil.copytree(state, tmp_path / "forked")
    serve_receipts(forked, 100, 101, checkpointed=False)
    serve_receipts(state, 5)
    with closing(ReceiptLog.open(state, read_only=True)) as log:
        proof = MerkleTree(log.leaf_hashes()).consistency_proof(5)
    lines = ["old 5", *(base64.b64encode(one).decode() for one in proof)]
    body = "\n".join(lines) + "\n\n" + (state / "log" / "checkpoint").read_text()
    assert witness.add_checkpoint(body.encode()).status == 200
    for copy in (behind, forked):
        old = key_of(copy)
        assert settle_custody(copy, [seen_by(witness), unreachable]) is Custody.CLOSED
        assert key_of(copy).predecessor == old.log_id
    assert settle_custody(shutil.copytree(state, tmp_path / "unseen"), [unknown]) is Custody.CLOSED
    assert settle_custody(shutil.copytree(state, tmp_path / "good"), [seen_by(witness)]) is Custody.TAKEN


def test_a_database_restored_in_place_forgot_a_released_checkpoint(state: Path, tmp_path: Path) -> None:
    database = state / "log" / "receipts.sqlite"
    backup = database.read_bytes()
    serve_receipts(state, 5)
    database.write_bytes(backup)  # the same file, with its inode and birth
    with closing(ReceiptLog.open(state)) as log:
        assert log.in_custody
        with pytest.raises(Internal, match="is of 6 receipts"):
            Checkpointer(log)
    old = key_of(state)
    assert settle_custody(state, []) is Custody.CLOSED
    assert key_of(state).predecessor == old.log_id
    serve_receipts(state, 6)  # the journal went on: request 5 has its receipt in the closed log, and no second one
    assert logged(state) == [6]


def test_a_log_restored_in_place_is_compared_although_its_file_looks_the_same(
    state: Path, witness: Witness, tmp_path: Path
) -> None:
    """As `rsync --inplace` or `cp -a` over the old files puts a backup back: database, note and file stay one thing."""
    assert settle_custody(state, [seen_by(witness), unreachable]) is Custody.KEPT
    copy_in_place = {file: file.read_bytes() for file in (state / "log").iterdir() if file.is_file()}
    serve_receipts(state, 5)
    later = Checkpoint(key_of(state).origin, 6, released(state).root)
    for file, content in copy_in_place.items():
        file.write_bytes(content)
    with closing(ReceiptLog.open(state)) as log:
        assert log.in_custody and log.size() == 5
    for nothing_new in (unreachable, unknown, seen_by(witness)):
        assert settle_custody(state, [nothing_new]) is Custody.KEPT
    old = key_of(state)
    assert settle_custody(state, [unreachable, lambda key: later]) is Custody.CLOSED
    assert key_of(state).predecessor == old.log_id
    closed = state / "closed" / old.log_id.hex()[:16]
    note = (closed / "log" / "checkpoint").read_bytes()
    assert verify_checkpoint(note, old).size == 5  # and nothing more was signed
    serve_receipts(state, 6)
    assert logged(state) == [6]


def logged(state: Path) -> list[int]:
    with closing(ReceiptLog.open(state, read_only=True)) as log:
        assert [one.receipt.seq for one in log.list()] == list(range(log.size()))
        return [int(one.receipt.request_id.hex(), 16) for one in log.list()]


def test_the_new_log_takes_from_the_journal_all_that_comes_whatever_was_restored(
    state: Path, witness: Witness, tmp_path: Path
) -> None:
    whole = shutil.copytree(state, tmp_path / "whole")  # a backup of everything
    without = shutil.copytree(state, tmp_path / "without")  # and of all but the journal
    shutil.rmtree(without / "journal")
    late = shutil.copytree(state, tmp_path / "late")
    serve_receipts(state, 5, 6)
    shutil.rmtree(late / "journal")
    shutil.copytree(state / "journal", late / "journal")  # the journal is of later than the log
    head = released(state)
    for copy, numbers in ((whole, [8, 9]), (without, [8, 9]), (late, [8, 9])):
        assert settle_custody(copy, [lambda key: head]) is Custody.CLOSED
        serve_receipts(copy, 8, 9)
        assert logged(copy) == numbers
        assert released(copy).size == 2 and run("fsck", "--state-dir", copy)[0] == 0


# --- rotation ----------------------------------------------------------------------------------------------------


def test_rotation_closes_the_log_with_a_last_checkpoint_and_goes_on_in_a_new_one(state: Path) -> None:
    serve_receipts(state, 5, checkpointed=False)
    old = key_of(state)
    with closing(ReceiptLog.open(state)):
        assert run("rotate", "--state-dir", state)[0] == 7  # somebody has it
    code, text = run("rotate", "--json", "--state-dir", state)
    assert code == 0
    closed = Path(json.loads(text)["closed"])
    new = key_of(state)
    assert json.loads(text)["log"] == new.line and new.predecessor == old.log_id
    assert new.origin.startswith(old.origin + "/") and new.is_of(old.origin)
    assert key_of(closed) == old and released(closed).size == 6
    for command in (["verify", "--all", "--log", closed / "log.pub"], ["fsck"], ["prove", "5"], ["list"]):
        assert run(*command, "--state-dir", closed)[0] == 0
    with closing(ReceiptLog.open(closed)) as log:
        assert log.successor == new
        with pytest.raises(Internal, match="is closed"):
            log_more(log, closed, 1)
    serve_receipts(state, 6, 7)
    with closing(ReceiptLog.open(state, origin=old.origin)) as log:
        assert (log.size(), log.first_completion, released(state).size) == (2, 6, 2)
        assert log.get(0).receipt.request_id.hex() == request_id(6)
        for seq in range(2):
            assert verify_receipt(log.receipt_json(seq), new).known
    assert run("fsck", "--state-dir", state)[0] == 0
    assert run("rotate", "--state-dir", state)[0] == 0
    third = key_of(state)
    assert third.predecessor == new.log_id and third.is_of(old.origin) and not third.is_of("elsewhere")
    assert len(list((state / "closed").iterdir())) == 2
    assert run("rotate", "--state-dir", state / "nowhere")[0] == 2


def test_what_the_journal_has_and_the_closed_log_has_not_goes_into_the_new_one(state: Path) -> None:
    with Journal.open(state / "journal") as journal:
        append_intent(journal, 5, 6)
        append_completion(journal, 5)
    rotate(state)
    with Journal.open(state / "journal"):
        """Closes request 6 as aborted."""
    serve_receipts(state, 7)
    with closing(ReceiptLog.open(state, read_only=True)) as log:
        assert [one.receipt.request_id.hex() for one in log.list()] == [request_id(number) for number in (5, 6, 7)]
        assert [one.receipt.status for one in log.list()] == [1, 4, 1]
        assert [one.receipt.seq for one in log.list()] == [0, 1, 2]
    assert run("fsck", "--state-dir", state)[0] == 0


class _PowerCut(Exception):
    pass


def test_a_rotation_interrupted_anywhere_is_finished_or_never_was(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, old = Path.rename, key_of(state)
    outcomes = []
    for allowed in range(20):
        copy = shutil.copytree(state, tmp_path / f"cut{allowed}")
        left = [allowed]

        def cut(path: Path, target: Path, left: list[int] = left) -> Path:
            if left[0] == 0:
                raise _PowerCut
            left[0] -= 1
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", cut)
        try:
            rotate(copy)
            interrupted = False
        except _PowerCut:
            interrupted = True
        monkeypatch.undo()
        serve_receipts(copy, 50)
        new = key_of(copy)
        outcomes.append(new != old)
        if new != old:
            assert new.predecessor == old.log_id and released(copy).size == 1
            closed = copy / "closed" / old.log_id.hex()[:16]
            assert key_of(closed) == old and released(closed).size == 5
            assert load_keys(closed / "keys", create=False).signer == old.signer
            assert run("fsck", "--state-dir", closed)[0] == 0
        assert run("fsck", "--state-dir", copy)[0] == 0
        assert not (copy / "log.next").exists()
        if not interrupted:
            break
    assert outcomes[0] is False and outcomes[-1] is True and len(outcomes) > 5
    assert outcomes == sorted(outcomes)


def test_a_closed_checkpoint_is_not_taken_for_the_new_logs(state: Path) -> None:
    old = key_of(state)
    note = (state / "log" / "checkpoint").read_text()
    rotate(state)
    assert not (state / "log" / "checkpoint").exists()
    (state / "log" / "checkpoint").write_text(note)  # of another log
    assert settle_custody(state, []) is Custody.KEPT
    serve_receipts(state, 5)
    assert released(state).size == 1
    keys = load_keys(state / "keys", create=False)
    assert str(sign_checkpoint(Checkpoint(old.origin, 5, bytes(32)), keys.checkpoint)) != note


def test_checkpoints_are_written_in_any_locale(state: Path) -> None:
    serve_receipts(state, 5, checkpointed=False)
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}  # Triton's stubs
    environment = python_environment(**locale)
    script = KILLED + "checkpointer.sign_due(now=True)\n"
    subprocess.run([sys.executable, "-c", script, str(state)], env=environment, check=True, timeout=60)
    assert released(state).size == 6
    for command in (["checkpoint"], ["prove", "5"]):
        shown = [sys.executable, "-m", "openlora.cli", "receipts", *command, "--state-dir", str(state)]
        done = subprocess.run(shown, env=environment, capture_output=True, timeout=60, check=True)
        assert done.stdout.endswith((state / "log" / "checkpoint").read_bytes())
