"""The receipt log: a projection of the journal that gives the same bytes however often it is interrupted."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attribution_cases import (
    Acknowledgements,
    append_completion,
    append_intent,
    commit_of,
    make_intent,
    python_environment,
    request_id,
    salt,
)
from coincurve import PrivateKey
from eth_account import Account
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from openlora.attribution.commands import receipts_app
from openlora.attribution.frames import Frame, Mark, decode_frame, list_segments, segment_path
from openlora.attribution.journal import STATUS_ABORTED, CompletionFrame, IntentFrame, Journal, ProgressFrame
from openlora.attribution.keys import load_keys
from openlora.attribution.log import LoggedReceipt, NewReceipt, ReceiptLog
from openlora.attribution.log_key import LogKey
from openlora.attribution.projection import Projector
from openlora.attribution.receipt import ReceiptHasher, decode_leaf, encode_leaf, receipt_from_frames, sign_digest
from openlora.attribution.receipt_json import parse_receipt_document
from openlora.attribution.verify import verify_receipt
from openlora.errors import Internal, InvalidArgument, ReceiptInvalid, Unavailable

# eth_account brings py_ecc, which raises this to 100,000: deep JSON would end the test process instead of raising.
sys.setrecursionlimit(1_000)

PROMPT, ANSWER = "the-secret-prompt", "the-secret-answer"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state directory with an empty log. Copies of it have the same keys and log id, so their receipts compare."""
    state = tmp_path_factory.mktemp("template") / "state"
    ReceiptLog.open(state).close()
    return state


@pytest.fixture(scope="module")
def served(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state directory after three requests."""
    state = shutil.copytree(template, tmp_path_factory.mktemp("served") / "state")
    with Journal.open(state / "journal") as journal, ReceiptLog.open(state) as log:
        acknowledged = Acknowledgements()
        journal.append([make_intent(1, PROMPT)], acknowledged.on_durable, acknowledged.on_error)
        append_intent(journal, 2, 3)
        append_completion(journal, 1, text=ANSWER)
        append_completion(journal, 2, status=2)
        append_completion(journal, 3, status=3, tokens=0)
        assert Projector(state / "journal", log).project() == range(3)
    return state


def project_all(state: Path, limit: int = 1024) -> list[LoggedReceipt]:
    with ReceiptLog.open(state) as log:
        projector = Projector(state / "journal", log)
        while projector.project(limit):
            pass
        return log.list(limit=10**6)


def test_receipts_follow_the_journal_and_verify(served: Path) -> None:
    with ReceiptLog.open(served, read_only=True) as log:
        assert log.size() == 3
        assert [one.receipt.status for one in log.list()] == [1, 2, 3]
        assert [one.seq for one in log.list(start=1, limit=1)] == [1]
        assert log.get(3) is None and log.get(2**70) is None
        assert log.get_by_request(request_id(2)) == log.get(1)
        assert log.get_by_request(request_id(9)) is None
        for one in log.list():
            verified = verify_receipt(log.receipt_json(one.seq), log.key)
            assert verified.known and verified.receipt == one.receipt == decode_leaf(one.leaf)
        document = log.receipt_json(0, with_salts=True)
        assert document["salts"] == {"prompt": "0x" + salt(1).hex(), "output": "0x" + salt(2).hex()}
        assert verify_receipt(document, log.key, PROMPT, ANSWER).texts == ("prompt", "output")
        assert "salts" not in log.receipt_json(0)
        with pytest.raises(InvalidArgument, match="no receipt 3"):
            log.receipt_json(3)
        with pytest.raises(Internal, match="opened to be read"):
            log.append([], log.low_water)


def test_a_receipt_comes_as_soon_as_its_completion_is_acknowledged(template: Path, tmp_path: Path) -> None:
    state = shutil.copytree(template, tmp_path / "state")
    with Journal.open(state / "journal") as journal, ReceiptLog.open(state) as log:
        projector = Projector(state / "journal", log)
        assert projector.project() == range(0)
        append_intent(journal, 1, 2, 3)
        assert projector.project() == range(0)
        for number in (3, 1, 2):
            seq = append_completion(journal, number)
            assert projector.project() == range(seq, seq + 1)
            assert log.receipt_json(seq)["request_id"] == "0x" + request_id(number)
        assert projector.project() == range(3, 3)


# One step: a request's number and what happens to it. Steps that can't be (progress before the intent) do nothing.
STEPS = st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["intent", "progress", "end"])), min_size=1, max_size=40)


def write_journal(directory: Path, steps: list[tuple[int, str]]) -> None:
    acknowledged = Acknowledgements()
    intents: set[int] = set()
    sent: dict[int, int] = {}
    with Journal.open(directory, segment_bytes=6_000) as journal:
        for number, step in steps:
            if step == "intent" and number not in intents:
                intents.add(number)
                sent[number] = 0
                append_intent(journal, number)
            elif step == "progress" and number in sent:
                sent[number] += 1
                commit = commit_of(number, "x" * sent[number])
                journal.append_progress([ProgressFrame(request_id(number), sent[number], commit)])
            elif step == "end" and number in sent:
                tokens = sent.pop(number)
                commit, callbacks = commit_of(number, "x" * tokens), (acknowledged.on_durable, acknowledged.on_error)
                journal.append_completion(request_id(number), 1 + number % 3, tokens, commit, 1_700_000_500, *callbacks)


def cut_journal(source: Path, target: Path, keep: int) -> list[Frame]:
    """Copy the first `keep` bytes of a journal's segments; the frames that are whole in them."""
    target.mkdir()
    frames: list[Frame] = []
    for number in list_segments(source):
        content = segment_path(source, number).read_bytes()[: max(keep, 0)]
        keep -= len(content)
        if content:
            segment_path(target, number).write_bytes(content)
        place = 0
        while (found := decode_frame(content, place)) is not None:
            frames.append(found[0])
            place = found[1]
    return frames


def receipts_of(frames: list[Frame], log_id: bytes) -> list[bytes]:
    """What the frames mean, by the plainest reading: leaves of what ended, then of what a crash cut short."""
    intents: dict[str, IntentFrame] = {}
    sent: dict[str, ProgressFrame] = {}
    ends: list[CompletionFrame] = []
    for frame in frames:
        if isinstance(frame, IntentFrame):
            intents[frame.request_id] = frame
        elif isinstance(frame, ProgressFrame):
            sent[frame.request_id] = frame
        elif isinstance(frame, CompletionFrame):
            ends.append(frame)
    times = [frame.started_at for frame in intents.values()] + [frame.ended_at for frame in ends]
    ended = {frame.request_id for frame in ends}
    for number, intent in ((int(name, 16), intent) for name, intent in intents.items() if name not in ended):
        last = sent.get(intent.request_id, ProgressFrame("", 0, commit_of(number, "")))
        closing = (STATUS_ABORTED, last.out_tokens, last.output_commit, max(times))
        ends.append(CompletionFrame(intent.request_id, len(ends), *closing))
    return [receipt_from_frames(intents[frame.request_id], frame, log_id).leaf for frame in ends]


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(steps=STEPS, cut=st.floats(0, 1), limit=st.integers(1, 5))
def test_a_journal_cut_at_any_byte_gives_the_receipts_of_its_prefix(
    template: Path, steps: list[tuple[int, str]], cut: float, limit: int
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        whole, state = Path(scratch) / "whole", shutil.copytree(template, Path(scratch) / "state")
        write_journal(whole, steps)
        size = sum(segment_path(whole, number).stat().st_size for number in list_segments(whole))
        frames = cut_journal(whole, state / "journal", round(cut * size))
        with Journal.open(state / "journal") as journal:
            ended = sum(isinstance(frame, CompletionFrame) for frame in frames)
            started = sum(isinstance(frame, IntentFrame) for frame in frames)
            assert len(journal.recovery.aborted) == started - ended
        cut_log = project_all(state, limit)
        key = LogKey.parse((state / "log.pub").read_text().strip())
        assert [one.leaf for one in cut_log] == receipts_of(frames, key.log_id)
        uncut = shutil.copytree(template, Path(scratch) / "uncut")
        shutil.copytree(whole, uncut / "journal")
        assert project_all(uncut)[:ended] == cut_log[:ended]  # signatures too


def test_a_projection_that_restarts_anywhere_gives_the_same_bytes(template: Path, tmp_path: Path) -> None:
    chance = random.Random(3)
    once, often = (shutil.copytree(template, tmp_path / name) for name in ("once", "often"))
    open_requests: list[int] = []
    number = 0
    with Journal.open(often / "journal", segment_bytes=10_000) as journal:
        log = ReceiptLog.open(often)
        projector = Projector(often / "journal", log)
        for _ in range(150):
            step = chance.random()
            if step < 0.45:
                append_intent(journal, number)
                open_requests.append(number)
                number += 1
            elif step < 0.8 and open_requests:
                append_completion(journal, open_requests.pop(chance.randrange(len(open_requests))))
            elif step < 0.9:
                projector.project(limit=chance.randint(1, 3))
            else:
                log.close()
                log = ReceiptLog.open(often)
                projector = Projector(often / "journal", log)
        log.close()
    with Journal.open(often / "journal") as journal:
        assert len(journal.recovery.aborted) == len(open_requests) > 0
    shutil.copytree(often / "journal", once / "journal")
    in_parts = project_all(often, limit=2)
    assert len(in_parts) == number
    assert project_all(once) == in_parts
    assert project_all(once) == in_parts  # again: nothing new


PROJECT = """
import sys
from pathlib import Path
from openlora.attribution.log import ReceiptLog
from openlora.attribution.projection import Projector
state = Path(sys.argv[1])
projector = Projector(state / "journal", ReceiptLog.open(state))
print("open", flush=True)
while projector.project(limit=3):
    pass
"""


def test_a_projection_killed_at_random_moments_logs_everything_once(template: Path, tmp_path: Path) -> None:
    chance = random.Random(4)
    killed, whole = (shutil.copytree(template, tmp_path / name) for name in ("killed", "whole"))
    with Journal.open(killed / "journal") as journal:
        append_intent(journal, *range(600))
        acknowledged = Acknowledgements()
        for number in reversed(range(600)):
            callbacks = (acknowledged.on_durable, acknowledged.on_error)
            journal.append_completion(request_id(number), 1, 1, commit_of(number, ""), 1_800_000_000, *callbacks)
        acknowledged.wait(600)
    shutil.copytree(killed / "journal", whole / "journal")
    for _ in range(6):
        command = [sys.executable, "-c", PROJECT, str(killed)]
        with subprocess.Popen(command, env=python_environment(), stdout=subprocess.PIPE) as child:
            assert child.stdout is not None and child.stdout.readline() == b"open\n"
            time.sleep(chance.uniform(0, 0.03))  # the random moment
            child.send_signal(signal.SIGKILL)
    assert project_all(killed) == project_all(whole)
    assert len(project_all(whole)) == 600


def test_what_is_projected_may_be_erased_and_open_requests_are_still_found(template: Path, tmp_path: Path) -> None:
    state = shutil.copytree(template, tmp_path / "state")
    with (
        Journal.open(state / "journal", segment_bytes=4_000, retain_seconds=-1) as journal,
        ReceiptLog.open(state) as log,
    ):
        projector = Projector(state / "journal", log)
        for number in range(20):
            append_intent(journal, number)
            if number != 5:
                append_completion(journal, number)
                projector.project()
                projector.release(log.size() - 1)  # a checkpoint that does not cover the last one
                assert number != 3 or Mark(state / "journal", "projected").read() is None
                if number > 3:
                    projector.release(log.size())
        low = Mark(state / "journal", "projected").read()
        assert low is not None and low == log.low_water
        assert (
            0 < list_segments(state / "journal")[0] <= low.segment
        )  # rotation erased what lies before the open intent
        projector = Projector(state / "journal", log)  # a restart
        assert projector.project() == range(19, 19)
        append_completion(journal, 5)
        assert projector.project() == range(19, 20)
        assert log.get(19).receipt.request_id.hex() == request_id(5)


def test_a_journal_and_a_log_that_contradict_each_other_stop_the_projection(template: Path, tmp_path: Path) -> None:
    state = shutil.copytree(template, tmp_path / "state")
    with Journal.open(state / "journal") as journal:
        append_intent(journal, 1, 2)
        append_completion(journal, 1)
        shutil.copytree(state / "journal", tmp_path / "backup")
        append_completion(journal, 2)
    assert len(project_all(state)) == 2
    shutil.rmtree(state / "journal")
    shutil.copytree(tmp_path / "backup", state / "journal")
    with Journal.open(state / "journal") as journal:  # closes request 2, then goes another way
        for number in (3, 4):
            append_intent(journal, number)
            append_completion(journal, number)
    with pytest.raises(Internal, match="was read to"):
        project_all(state)
    with sqlite3.connect(state / "log" / "receipts.sqlite") as connection:
        connection.execute("UPDATE log SET low_offset = 0")  # a log that would read it all again
    with pytest.raises(Internal, match="rolled back"):
        project_all(state)
    with ReceiptLog.open(state) as log:
        assert log.size() == 2
    fresh = shutil.copytree(template, tmp_path / "fresh")
    shutil.copytree(state / "journal", fresh / "journal")
    segment_path(fresh / "journal", 0).unlink()
    with pytest.raises(Internal, match="expects 0"):
        project_all(fresh)


def test_the_log_refuses_gaps_and_repeats(served: Path, tmp_path: Path) -> None:
    state = shutil.copytree(served, tmp_path / "state")
    with ReceiptLog.open(state) as log:
        before = log.list()
        new = _again(before[0], seq=3)
        with pytest.raises(Internal, match="already"):
            log.append([new], log.low_water)
        gap = _again(before[0], seq=7, request_id=b"n" * 32)
        with pytest.raises(Internal, match="next receipt is 3"):
            log.append([gap], log.low_water)
        assert log.list() == before
        good = _again(before[0], seq=3, request_id=b"n" * 32)
        log.append([good], log.low_water)
        assert log.size() == 4


def _again(logged: LoggedReceipt, **changes: Any) -> NewReceipt:
    receipt = dataclasses.replace(logged.receipt, **changes)
    return NewReceipt(receipt, encode_leaf(receipt), (b"", b"", b""), salt(1), salt(2))


def test_keys_log_id_and_public_line_are_made_once(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with ReceiptLog.open(state, origin="example.org/log1") as log:
        key = log.key
    files = ["keys", "keys/checkpoint.key", "keys/receipt.key", "log", "log.pub", "log/lock", "log/receipts.sqlite"]
    assert sorted(str(path.relative_to(state)) for path in state.rglob("*")) == files
    assert (state / "log/receipts.sqlite").stat().st_mode & 0o777 == 0o600
    keys = load_keys(state / "keys", create=False)
    assert (key.signer, key.checkpoint_key, key.origin) == (keys.signer, keys.checkpoint_public, "example.org/log1")
    assert (state / "log.pub").read_text() == key.line + "\n"
    (state / "log.pub").write_text("something else")
    with ReceiptLog.open(state) as log:
        assert log.key == key and (state / "log.pub").read_text() == key.line + "\n"
        with pytest.raises(Unavailable, match="another process"):
            ReceiptLog.open(state, wait=False)
        with ReceiptLog.open(state, read_only=True) as reader:
            assert reader.key == key
            with pytest.raises(Internal, match="opened to be read"):
                reader.forget_salts(0)
    with pytest.raises(Internal, match="origin"):
        ReceiptLog.open(state, origin="example.org/log2")
    (state / "keys/receipt.key").write_text("ab" * 32 + "\n")
    with pytest.raises(Internal, match="not those of the log"):
        ReceiptLog.open(state)
    (state / "keys/receipt.key").unlink()
    with pytest.raises(Internal, match="can't be read"):
        ReceiptLog.open(state)  # a log whose key is lost never gets a new one
    with pytest.raises(InvalidArgument, match="no receipt log"):
        ReceiptLog.open(tmp_path / "nowhere", read_only=True)


def test_no_text_lies_in_any_file_and_forgotten_salts_are_gone(served: Path, tmp_path: Path) -> None:
    state = shutil.copytree(served, tmp_path / "state")
    assert b"secret" not in _everything(state)
    secret_salt = b"\xa5\x5a" * 16
    with Journal.open(state / "journal") as journal, ReceiptLog.open(state) as log:
        acknowledged = Acknowledgements()
        intent = make_intent(9, prompt_salt=secret_salt)
        journal.append([intent], acknowledged.on_durable, acknowledged.on_error)
        append_completion(journal, 9)
        Projector(state / "journal", log).project()
        assert secret_salt in _everything(state / "log")
        log.forget_salts(3)
        assert secret_salt not in _everything(state / "log")
        with pytest.raises(InvalidArgument, match="forgotten"):
            log.receipt_json(3, with_salts=True)
        verify_receipt(log.receipt_json(3), log.key)


def test_salts_are_forgotten_by_a_command(served: Path, tmp_path: Path) -> None:
    state = shutil.copytree(served, tmp_path / "state")
    before = run("show", "1", "--json", "--state-dir", state)
    assert run("show", "1", "--json", "--salts", "--state-dir", state)[0] == 0
    with ReceiptLog.open(state):
        code, text = run("forget", "1", "--state-dir", state)
        assert code == 7 and "another process holds the receipt log" in text
    salts = [salt(number) for number in range(1, 5)]  # a receipt's output and the next one's prompt have one
    assert all(one in _everything(state / "log") for one in salts)
    for which in ("0", request_id(2), "2"):
        seq = json.loads(run("show", which, "--json", "--salts", "--state-dir", state)[1])["seq"]
        assert run("forget", which, "--state-dir", state)[0] == 0
        code, text = run("show", which, "--salts", "--state-dir", state)
        assert code == 2 and f"the salts of receipt {seq} were forgotten" in text
    assert not any(one in _everything(state / "log") for one in salts)
    assert json.loads(run("forget", "1", "--json", "--state-dir", state)[1])["seq"] == 1  # once more is no fault
    assert run("show", "1", "--json", "--state-dir", state) == before
    assert run("verify", "1", "--log", state / "log.pub", "--state-dir", state)[0] == 0
    for which in ("9", request_id(9), "x"):
        assert run("forget", which, "--state-dir", state)[0] == 2
    assert run("forget", "0", "--state-dir", tmp_path / "nowhere")[0] == 2 and not (tmp_path / "nowhere").exists()


def _everything(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in directory.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def document(served: Path) -> dict[str, Any]:
    with ReceiptLog.open(served, read_only=True) as log:
        return log.receipt_json(0, with_salts=True)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, the inner ones included."""
    children: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, child in children:
        yield (*path, step)
        yield from _places(child, (*path, step))


def _changed(value: Any) -> list[Any]:
    if isinstance(value, str):
        other = "0" if value[-1:] != "0" else "1"
        return [value[:-1] + other, value + "0", value.upper() + "X", "", None, 0]
    if isinstance(value, int):
        return [value + 1, value - 1, value + 0.5, str(value), None, -value - 1, 2**130]
    if isinstance(value, list):
        return [value[:-1], [*value, value[0]], None] if value else [[{}], None]
    return [{}, value | {"unknown": 1}, None, []]


def test_no_field_of_a_receipt_can_be_changed(document: dict[str, Any]) -> None:
    pinned = LogKey.parse(document["log"])
    verify_receipt(document, pinned, PROMPT, ANSWER)
    tried = 0
    for *path, last in _places(document):
        for change in ("value", "gone"):
            original = document
            for step in (*path, last):
                original = original[step]
            for value in _changed(original) if change == "value" else [None]:
                mutated = copy.deepcopy(document)
                place: Any = mutated
                for step in path:
                    place = place[step]
                if change == "gone":
                    del place[last]
                else:
                    place[last] = value
                with pytest.raises(ReceiptInvalid):
                    verify_receipt(mutated, pinned, PROMPT, ANSWER)
                    pytest.fail(f"{(*path, last)} was changed to {value!r}, and nobody noticed")
                tried += 1
    assert tried > 300
    with pytest.raises(ReceiptInvalid, match="unknown"):
        verify_receipt(document | {"note": 1}, pinned)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda d: d.update(schema="0x0102"), "schema"),
        (lambda d: d.update(price=d["price"] + 1), "leaf"),
        (lambda d: d["blobs"]["runtime"].update(dtype="int8"), "blobs.runtime"),
        (lambda d: d["blobs"]["adapters"]["adapters"][0].update(weight=1), "blobs.adapters"),
        (lambda d: d["blobs"]["terms"]["base"].update(owner="0x" + "11" * 20), "blobs.terms"),
        (lambda d: d["blobs"]["terms"]["base"].update(digest="11" * 32), "terms"),
        (lambda d: d.update(signature=d["signature"][:-2] + "1b" if d["signature"][-1] == "c" else "1c"), "signature"),
        (lambda d: d["salts"].update(prompt="0x" + "00" * 32), "prompt_commit"),
        (lambda d: d.pop("salts"), "salts"),
    ],
)
def test_the_first_thing_that_is_wrong_is_named(
    document: dict[str, Any], change: Callable[[dict[str, Any]], None], field: str
) -> None:
    mutated = copy.deepcopy(document)
    change(mutated)
    with pytest.raises(ReceiptInvalid) as caught:
        verify_receipt(mutated, LogKey.parse(document["log"]), PROMPT, ANSWER)
    assert caught.value.field == field


def test_a_forger_with_another_key_needs_another_log(document: dict[str, Any]) -> None:
    """Whatever is signed anew verifies at best as a receipt of an unknown log, never of the pinned one."""
    pinned = LogKey.parse(document["log"])
    thief = PrivateKey(b"\x09" * 32)
    forged = copy.deepcopy(document) | {"ended_at": document["ended_at"] + 1}
    receipt = dataclasses.replace(decode_leaf(bytes.fromhex(document["leaf"][2:])), ended_at=forged["ended_at"])

    def sign(log_id: bytes) -> None:
        leaf = encode_leaf(dataclasses.replace(receipt, log_id=log_id))
        signature = sign_digest(thief, ReceiptHasher(log_id).digest(leaf))
        forged.update(log_id="0x" + log_id.hex(), leaf="0x" + leaf.hex(), signature="0x" + signature.hex())

    sign(pinned.log_id)
    for pin in (pinned, None):
        with pytest.raises(ReceiptInvalid, match="signature: signed by"):
            verify_receipt(forged, pin)
    other = LogKey(pinned.origin, Account.from_key(thief.secret).address, pinned.checkpoint_key, pinned.nonce)
    sign(other.log_id)
    forged.update(log=other.line, signer=other.signer)
    with pytest.raises(ReceiptInvalid, match="not of the pinned"):
        verify_receipt(forged, pinned)
    assert verify_receipt(forged, None).known is False


def test_the_log_itself_cannot_ask_for_another_price(served: Path, document: dict[str, Any]) -> None:
    pinned, keys = LogKey.parse(document["log"]), load_keys(served / "keys", create=False)
    receipt = dataclasses.replace(decode_leaf(bytes.fromhex(document["leaf"][2:])), price=document["price"] + 1)
    leaf = encode_leaf(receipt)
    signature = sign_digest(keys.receipt, ReceiptHasher(pinned.log_id).digest(leaf))
    signed = {"price": receipt.price, "leaf": "0x" + leaf.hex(), "signature": "0x" + signature.hex()}
    with pytest.raises(ReceiptInvalid, match="price"):
        verify_receipt(document | signed, pinned)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "7",
        '{"seq": 1, "seq": 2}',
        '{"price": NaN}',
        "{",
        "[" * 100_000,
        '{"a":' * 100_000,
        b"\xff\xfe",
        '{"log_id": "x"}',
    ],
)
def test_json_from_strangers_is_refused_cleanly(text: str | bytes) -> None:
    with pytest.raises(ReceiptInvalid):
        verify_receipt(parse_receipt_document(text), None)


def test_verification_imports_no_server_part(document: dict[str, Any]) -> None:
    script = (
        "import json, sys; from openlora.attribution.verify import verify_receipt; "
        "from openlora.attribution.receipt_json import parse_receipt_document as parse; "
        "print(verify_receipt(parse(sys.stdin.read()), None).known); print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(document),
        env=python_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    known, modules = done.stdout.splitlines()
    assert known == "False"
    ours = {name for name in modules.split() if name.startswith("openlora.")}
    assert ours.isdisjoint({"openlora.attribution.log", "openlora.attribution.journal", "openlora.attribution.keys"})
    assert not any(name.startswith(("openlora.serving", "openlora.adapters")) for name in ours)
    assert {"torch", "zmq", "sqlite3", "tritonclient"}.isdisjoint(modules.split())


def run(*arguments: str | Path, stdin: str | None = None) -> tuple[int, str]:
    result = CliRunner().invoke(receipts_app, [str(one) for one in arguments], input=stdin, env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_the_commands_and_their_exit_codes(served: Path, document: dict[str, Any], tmp_path: Path) -> None:
    state, pin = ("--state-dir", served), ("--log", served / "log.pub")
    receipt = tmp_path / "receipt.json"
    receipt.write_text(json.dumps(document))
    (tmp_path / "known").write_text(document["log"] + "\n")
    (tmp_path / "prompt").write_text(PROMPT)
    (tmp_path / "other").write_text("another text")
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(document | {"out_tokens": 4}))
    empty = tmp_path / "empty"
    empty.write_text("")

    code, text = run("list", *state)
    assert code == 0 and "complete" in text and "f1f1f1f1×0.7" in text
    code, text = run("list", "--json", "--limit", "2", *state)
    assert code == 0 and [json.loads(line)["seq"] for line in text.splitlines()] == [1, 2]
    assert "salts" not in text and salt(1).hex() not in text
    for which in ("0", document["request_id"], request_id(1)):
        code, text = run("show", which, "--json", *state)
        assert code == 0 and json.loads(text) == {key: value for key, value in document.items() if key != "salts"}
    assert json.loads(run("show", "0", "--json", "--salts", *state)[1]) == document
    code, text = run("show", "0", *state)
    assert code == 0 and document["signature"][:40] in text and salt(1).hex()[:40] not in text
    for which in ("9", "99999999999999999999", request_id(9), "x"):
        assert run("show", which, *state)[0] == 2
    assert run("list", "--state-dir", tmp_path / "nowhere")[0] == 2

    assert run("verify", receipt)[0] == 3
    assert "log unknown" in run("verify", receipt)[1]
    assert run("verify", receipt, "--known-logs", empty)[0] == 3
    for given_pin in (pin, ("--log", document["log"]), ("--known-logs", tmp_path / "known")):
        assert run("verify", receipt, *given_pin)[0] == 0
        assert run("verify", changed, *given_pin)[0] == 1
    assert run("verify", changed)[0] == 1
    assert run("verify", "-", *pin, stdin=json.dumps(document))[0] == 0
    assert run("verify", "2", *pin, *state)[0] == 0
    assert run("verify", "--all", *pin, *state)[0] == 0
    assert json.loads(run("verify", "--all", "--json", *pin, *state)[1])["receipts"] == 3
    assert run("verify", "--all", *state)[0] == 3
    assert run("verify", receipt, *pin, "--prompt-file", tmp_path / "prompt")[0] == 0
    assert run("verify", receipt, *pin, "--prompt-file", tmp_path / "other")[0] == 1
    other_line = LogKey("elsewhere", document["signer"], bytes(32), bytes(32)).line
    assert run("verify", receipt, "--log", other_line)[0] == 1
    for wrong in ([], [receipt, "--all"], [tmp_path / "nowhere", *pin], [receipt, "--log", "nonsense"], ["8", *state]):
        assert run("verify", *wrong)[0] == 2


def test_a_changed_database_is_noticed(served: Path, tmp_path: Path) -> None:
    state = shutil.copytree(served, tmp_path / "state")
    with sqlite3.connect(state / "log" / "receipts.sqlite") as connection:
        leaf = connection.execute("SELECT leaf FROM receipts WHERE seq = 1").fetchone()[0]
        changed = dataclasses.replace(decode_leaf(leaf), out_tokens=6)
        connection.execute("UPDATE receipts SET leaf = ? WHERE seq = 1", (encode_leaf(changed),))
    code, text = run("verify", "--all", "--log", state / "log.pub", "--state-dir", state)
    assert code == 1 and "receipt 1" in text


def test_many_threads_may_ask_the_log(served: Path, tmp_path: Path) -> None:
    state = shutil.copytree(served, tmp_path / "state")
    documents: list[dict[str, Any]] = []
    with ReceiptLog.open(state) as log:
        threads = [
            threading.Thread(target=lambda: documents.extend(log.receipt_json(seq) for seq in (0, 1, 2) * 10))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(one["seq"] for one in documents) == [0] * 40 + [1] * 40 + [2] * 40
