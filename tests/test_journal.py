"""The usage journal: what is acknowledged survives, whatever happens to the process or the disk."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from attribution_cases import (
    Acknowledgements,
    append_completion,
    append_intent,
    commit_of,
    make_intent,
    python_environment,
    read_frames,
    request_id,
)

from openlora.attribution.frames import Mark, decode_frame, encode_frame, segment_path
from openlora.attribution.journal import (
    STATUS_ABORTED,
    CompletionFrame,
    IntentFrame,
    Journal,
    JournalReader,
    Position,
    ProgressFrame,
)
from openlora.errors import Internal, InvalidArgument, NotAuthenticated, Overloaded, Unavailable


def test_frames_come_back_in_order_with_consecutive_numbers(tmp_path: Path) -> None:
    with Journal.open(tmp_path / "journal") as journal:
        append_intent(journal, 1, 2)
        assert append_completion(journal, 2, status=2) == 0
        append_intent(journal, 3)
        assert append_completion(journal, 1) == 1
        frames = read_frames(tmp_path / "journal", (IntentFrame, CompletionFrame))
    intents = [make_intent(number) for number in (1, 2, 3)]
    assert [frame for frame in frames if isinstance(frame, IntentFrame)] == intents
    assert [type(frame) for frame in frames] == [IntentFrame] * 2 + [CompletionFrame, IntentFrame, CompletionFrame]
    assert frames[2] == CompletionFrame(request_id(2), 0, 2, 5, commit_of(2, "text"), 1_700_000_102)


def test_many_threads_share_commits_and_every_completion_gets_its_own_number(tmp_path: Path) -> None:
    acknowledged = Acknowledgements()

    def serve(first: int) -> None:
        for number in range(first, first + 50):
            append_intent(journal, number)
            commit, callbacks = commit_of(number, ""), (acknowledged.on_durable, acknowledged.on_error)
            journal.append_completion(request_id(number), 1, 1, commit, 1_800_000_000, *callbacks)

    with Journal.open(tmp_path / "journal") as journal:
        threads = [threading.Thread(target=serve, args=(first,)) for first in range(0, 400, 50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        acknowledged.wait(400)
    assert acknowledged.durable == list(range(400))
    assert [frame.seq for frame in read_frames(tmp_path / "journal", CompletionFrame)] == list(range(400))


def test_a_reader_follows_but_never_sees_what_is_not_durable(tmp_path: Path) -> None:
    reader = JournalReader(tmp_path / "journal")
    assert list(reader.read()) == []  # not even a directory yet
    with Journal.open(tmp_path / "journal") as journal:
        append_intent(journal, 1)
        assert [type(entry.frame).__name__ for entry in reader.read()] == ["SegmentHeader", "IntentFrame"]
        before = reader.position
        journal.append_progress([ProgressFrame(request_id(1), 1, bytes(32))])
        path = segment_path(tmp_path / "journal", before.segment)
        assert path.stat().st_size > before.offset
        assert list(reader.read()) == []
        append_completion(journal, 1)
        entries = list(reader.read())
        assert [type(entry.frame) for entry in entries] == [ProgressFrame, CompletionFrame]
        assert entries[0].start == before and entries[0].end == entries[1].start
        assert reader.position == entries[1].end == Position(0, path.stat().st_size)
        append_intent(journal, 2)
        journal.append_progress([ProgressFrame(request_id(2), 1, bytes(32))])  # behind the mark again
        assert [type(entry.frame) for entry in reader.read()] == [IntentFrame]
        resumed = JournalReader(tmp_path / "journal", entries[0].end)
        assert [entry.frame for entry in resumed.read()] == [entries[1].frame, make_intent(2)]


def test_a_crash_closes_open_requests_with_what_was_sent_last(tmp_path: Path) -> None:
    source, crashed = tmp_path / "journal", tmp_path / "crashed"
    with Journal.open(source) as journal:
        append_intent(journal, 1, 2, 3)
        append_completion(journal, 2)
        journal.append_progress(
            [ProgressFrame(request_id(1), 3, b"a" * 32), ProgressFrame(request_id(3), 1, b"b" * 32)]
        )
        journal.append_progress([ProgressFrame(request_id(1), 4, b"c" * 32)])
        journal.append_progress([ProgressFrame(request_id(2), 9, b"d" * 32)])  # late, after its completion
        append_intent(journal, 4)
        _copy(source, crashed)
        for number in (1, 3, 4):
            append_completion(journal, number)
    with open(segment_path(crashed, 0), "ab") as torn:
        torn.write(encode_frame(make_intent(5))[:-1])
    with Journal.open(crashed) as journal:
        report = journal.recovery
        last = 1_700_000_102  # the latest time in the journal
        assert report.aborted == (
            CompletionFrame(request_id(1), 1, STATUS_ABORTED, 4, b"c" * 32, last),
            CompletionFrame(request_id(3), 2, STATUS_ABORTED, 1, b"b" * 32, last),
            CompletionFrame(request_id(4), 3, STATUS_ABORTED, 0, commit_of(4, ""), last),
        )
        assert report.torn_bytes == len(encode_frame(make_intent(5))) - 1
        assert report.started_at == {request_id(number): 1_700_000_000 + number for number in (1, 2, 3, 4)}
        assert tuple(read_frames(crashed, CompletionFrame))[1:] == report.aborted
        append_intent(journal, 5)
        assert append_completion(journal, 5) == 4
    with Journal.open(crashed) as journal:
        assert journal.recovery.aborted == () and journal.recovery.torn_bytes == 0


WRITER = """
import os, sys
from pathlib import Path
from attribution_cases import append_completion, append_intent, commit_of, make_intent, request_id
from openlora.attribution.journal import Journal, ProgressFrame
def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
journal = Journal.open(Path(sys.argv[1]), segment_bytes=20_000)
say("open", len(journal.recovery.aborted), journal.recovery.torn_bytes)
first = int(sys.argv[2])
for number in range(first, first + 1_000_000):
    def complete(number=number):
        say("intent", number)
        journal.append_progress([ProgressFrame(request_id(number), 1, commit_of(number, "t"))])
        journal.append_completion(request_id(number), 1, 2, commit_of(number, "te"), 1_800_000_000,
                                  lambda seq: say("completion", number, seq), lambda error: None)
    journal.append([make_intent(number)], complete, lambda error: None)
    if number % 8 == 0:
        append_intent(journal, number + 10_000_000)  # waits, so that batches differ; stays open
"""


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    directory = tmp_path / "journal"
    chance = random.Random(9)
    intents: set[str] = set()
    completions: dict[str, int] = {}
    closed_by_recovery = 0
    for round_number in range(22):
        command = [sys.executable, "-c", WRITER, str(directory), str(round_number * 1_000_000)]
        with subprocess.Popen(command, env=python_environment(), stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            first = writer.stdout.readline().split()
            closed_by_recovery += int(first[1])
            said = b"".join(writer.stdout.readline() for _ in range(chance.randint(0, 60)))
            time.sleep(chance.uniform(0, 0.003))  # the random moment
            writer.send_signal(signal.SIGKILL)
            said += writer.stdout.read()
        lines = said.decode().split("\n")[:-1]  # what came without its newline was not said
        for line in lines:
            kind, number, *seq = line.split()
            intents.add(request_id(int(number)))
            if kind == "completion":
                completions[request_id(int(number))] = int(seq[0])
    with Journal.open(directory) as journal:
        closed_by_recovery += len(journal.recovery.aborted)
        found = {frame.request_id for frame in read_frames(directory, IntentFrame)}
        ends = read_frames(directory, CompletionFrame)
    assert len(completions) > 22
    assert intents <= found
    assert [frame.seq for frame in ends] == list(range(len(ends)))
    assert {frame.request_id for frame in ends} == found and len(ends) == len(found)  # each intent ended exactly once
    by_request = {frame.request_id: frame for frame in ends}
    assert {name: by_request[name].seq for name in completions} == completions
    assert all(by_request[name].status == 1 for name in completions)
    assert sum(frame.status == STATUS_ABORTED for frame in ends) == closed_by_recovery > 0


def test_nothing_is_acknowledged_before_it_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill can't tell written from synced, so the real fdatasync is watched."""
    synced = [0]
    checked: list[bool] = []
    real_fdatasync = os.fdatasync

    def watched(descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        real_fdatasync(descriptor)
        synced.append(size)

    def on_durable(*_: int) -> None:
        content = segment_path(tmp_path / "journal", 0).read_bytes()[: synced[-1]]
        checked.append(len(content) == synced[-1] and content.count(bytes.fromhex("c0ffee")) > len(checked))

    monkeypatch.setattr(os, "fdatasync", watched)
    nothing = Acknowledgements()
    with Journal.open(tmp_path / "journal") as journal:
        for number in range(50):
            marked = make_intent(number, caller="", output_salt=bytes.fromhex("c0ffee") + bytes(29))
            journal.append([marked], on_durable, nothing.on_error)
    assert checked == [True] * 50 and not nothing.errors


def test_a_failed_sync_is_never_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk error can't be had for real without privileges, so it is put in; the kernel reports it only once."""
    failures: list[BaseException] = []
    acknowledged = Acknowledgements()
    real_fdatasync = os.fdatasync

    def failing_once(descriptor: int) -> None:
        monkeypatch.setattr(os, "fdatasync", real_fdatasync)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Journal.open(tmp_path / "journal", on_failure=failures.append) as journal:
        append_intent(journal, 1)
        monkeypatch.setattr(os, "fdatasync", failing_once)
        with pytest.raises(Unavailable, match="Input/output error"):
            append_completion(journal, 1)
        with pytest.raises(Unavailable):
            journal.append([make_intent(2)], acknowledged.on_durable, acknowledged.on_error)
        assert [frame.status for frame in journal.reopen().aborted] == [STATUS_ABORTED]
        assert len(failures) == 1 and not acknowledged.durable


def test_a_full_disk_acknowledges_nothing_and_the_journal_goes_on_when_there_is_room(tmp_path: Path) -> None:
    """The limit on file sizes makes real writes fail half-way, as a full disk does."""
    directory = tmp_path / "journal"
    failures: list[BaseException] = []
    acknowledged = Acknowledgements()
    journal = Journal.open(directory, on_failure=failures.append)
    append_intent(journal, 1, 2)
    journal.append_progress([ProgressFrame(request_id(1), 3, commit_of(1, "abc"))])
    room = segment_path(directory, 0).stat().st_size + 1_000
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        callbacks = (acknowledged.on_durable, acknowledged.on_error)
        journal.append([make_intent(3)], *callbacks)
        acknowledged.wait()
        assert acknowledged.durable == [] and isinstance(acknowledged.errors[0], Unavailable)
        with pytest.raises(Unavailable):
            journal.append([make_intent(4)], *callbacks)
        with pytest.raises(Unavailable):
            journal.append_completion(request_id(1), 1, 1, bytes(32), 1_800_000_000, *callbacks)
        with pytest.raises(Unavailable):
            journal.append_progress([ProgressFrame(request_id(1), 4, bytes(32))])
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
        with pytest.raises(Unavailable):
            journal.reopen()
        assert isinstance(journal.failed, Unavailable)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    report = journal.reopen()
    assert journal.failed is None
    assert failures == [acknowledged.errors[0]]
    assert [(frame.request_id, frame.out_tokens) for frame in report.aborted] == [
        (request_id(1), 3),
        (request_id(2), 0),
    ]
    assert report.torn_bytes == 1_000
    append_intent(journal, 3)  # it was refused, so its id is free
    assert append_completion(journal, 3) == 2
    journal.close()
    assert {frame.request_id for frame in read_frames(directory, IntentFrame)} == {request_id(n) for n in (1, 2, 3)}


def test_a_progress_frame_that_fails_stops_the_journal(tmp_path: Path) -> None:
    told = threading.Event()
    journal = Journal.open(tmp_path / "journal", on_failure=lambda error: told.set())
    append_intent(journal, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (segment_path(tmp_path / "journal", 0).stat().st_size + 10, hard))
    try:
        with pytest.raises(Unavailable, match="can't be written"):
            journal.append_progress([ProgressFrame(request_id(1), 1, bytes(32))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert told.wait(60)
    with pytest.raises(Unavailable):
        append_completion(journal, 1)  # behind a torn frame nothing could be read, room or not
    assert [frame.out_tokens for frame in journal.reopen().aborted] == [0]
    journal.close()


def test_a_completion_that_was_not_acknowledged_does_not_count_after_reopen(tmp_path: Path) -> None:
    directory = tmp_path / "journal"
    with Journal.open(directory) as journal:
        append_intent(journal, 1)
        (directory / "durable").unlink()
        (directory / "durable").mkdir()  # the write and its sync will work, publishing them will not
        with pytest.raises(Unavailable):
            append_completion(journal, 1, tokens=7)
        (directory / "durable").rmdir()
        (closing,) = journal.reopen().aborted
        assert (closing.request_id, closing.seq, closing.status) == (request_id(1), 0, STATUS_ABORTED)
    assert [frame.status for frame in read_frames(directory, CompletionFrame)] == [STATUS_ABORTED]


def test_a_request_id_is_used_once(tmp_path: Path) -> None:
    nothing = Acknowledgements()
    with Journal.open(tmp_path / "journal") as journal:
        append_intent(journal, 1)
        append_completion(journal, 1)
        for frames in ([make_intent(1)], [make_intent(2), make_intent(2)]):
            with pytest.raises(NotAuthenticated, match="request_id"):
                journal.append(frames, nothing.on_durable, nothing.on_error)
        append_intent(journal, 2)
        with pytest.raises(Internal, match="no open intent"):
            append_completion(journal, 1)
        with pytest.raises(Internal, match="no open intent"):
            append_completion(journal, 9)
    with Journal.open(tmp_path / "journal") as journal:
        for number in (1, 2):
            with pytest.raises(NotAuthenticated):
                append_intent(journal, number)
        assert len(read_frames(tmp_path / "journal", IntentFrame)) == 2
    assert not nothing.durable and not nothing.errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"request_id": "AB" * 32}, "request_id"),
        ({"prompt_salt": b"short"}, "prompt_salt"),
        ({"in_tokens": 2**32}, "in_tokens"),
        ({"started_at": 1.5}, "started_at"),
        ({"label": "\ud800"}, "journal frame"),
        ({"runtime": {"engine": "torch"}}, "runtime"),
        ({"adapters": {"adapters": [{"digest": "f1" * 32, "weight": 0.7}], "method": "cat"}}, "adapters"),
        ({"adapters": {"adapters": [], "method": "cat"}}, "terms"),
        ({"base_digest": "bb" * 32}, "terms"),
    ],
)
def test_an_intent_that_no_receipt_could_follow_from_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    nothing = Acknowledgements()
    with Journal.open(tmp_path / "journal") as journal:
        with pytest.raises(InvalidArgument, match=message):
            journal.append([make_intent(1, **changes)], nothing.on_durable, nothing.on_error)
        append_intent(journal, 1)


def test_a_set_back_clock_ends_no_request_before_it_started(tmp_path: Path) -> None:
    acknowledged = Acknowledgements()
    with Journal.open(tmp_path / "journal") as journal:
        append_intent(journal, 1)
        callbacks = (acknowledged.on_durable, acknowledged.on_error)
        journal.append_completion(request_id(1), 1, 1, bytes(32), 1_600_000_000, *callbacks)
        acknowledged.wait()
        assert read_frames(tmp_path / "journal", CompletionFrame)[0].ended_at == 1_700_000_001


def test_too_many_waiting_intents_are_refused_and_completions_never(tmp_path: Path) -> None:
    busy, go_on = threading.Event(), threading.Event()
    acknowledged = Acknowledgements()
    callbacks = (acknowledged.on_durable, acknowledged.on_error)

    def hold() -> None:
        busy.set()
        go_on.wait(60)

    with Journal.open(tmp_path / "journal", queue_limit=3) as journal:
        append_intent(journal, 1)
        journal.append([make_intent(2)], hold, acknowledged.on_error)
        assert busy.wait(60)
        for number in (3, 4, 5):
            journal.append([make_intent(number)], *callbacks)
        with pytest.raises(Overloaded, match="retry_after_ms"):
            journal.append([make_intent(6)], *callbacks)
        journal.append_completion(request_id(1), 1, 1, bytes(32), 1_800_000_000, *callbacks)
        go_on.set()
        acknowledged.wait(4)
        assert acknowledged.durable == [None, None, None, 0] and not acknowledged.errors
        append_intent(journal, 6)


def test_a_failing_callback_keeps_nobody_else_from_theirs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nothing = Acknowledgements()

    def fail() -> None:
        raise ValueError("the caller's fault")

    with Journal.open(tmp_path / "journal") as journal:
        journal.append([make_intent(1)], fail, nothing.on_error)
        append_intent(journal, 2)
        assert append_completion(journal, 1) == 0
    assert "the caller's fault" in caplog.text


def test_a_second_opener_waits_for_the_first(tmp_path: Path) -> None:
    order: list[str] = []

    def open_second() -> None:
        with Journal.open(tmp_path / "journal") as journal:
            order.append("second opened")
            assert journal.recovery.aborted == ()

    first = Journal.open(tmp_path / "journal")
    with pytest.raises(Unavailable, match="another process"):
        Journal.open(tmp_path / "journal", wait=False)
    second = threading.Thread(target=open_second)
    second.start()
    append_intent(first, 1)
    append_completion(first, 1)
    order.append("first closes")
    first.close()
    second.join(60)
    assert order == ["first closes", "second opened"]


def test_segments_rotate_number_on_and_are_erased_once_projected_and_old(tmp_path: Path) -> None:
    directory = tmp_path / "journal"
    with Journal.open(directory, segment_bytes=8_000) as journal:
        for number in range(40):
            append_intent(journal, number)
            assert append_completion(journal, number) == number
        live = sorted(path.name for path in directory.glob("*.seg"))
        assert len(live) > 4
        assert [frame.seq for frame in read_frames(directory, CompletionFrame)] == list(range(40))
        assert journal.erase_before(3) == ()  # too young: their ids may still be replayed
        for path in directory.glob("*.seg"):
            os.utime(path, (0, 0))
        assert journal.erase_before(2) == (0, 1)
        append_intent(journal, 0)  # so old that no ticket can name it any more
        append_completion(journal, 0)
        current = JournalReader(directory)
        first_left = next(current.read())
        assert first_left.frame.segment == 2
        for _ in current.read():
            pass
        Mark(directory, "projected").publish(current.position)
    with Journal.open(directory, retain_seconds=-1) as journal:  # opening erases what was projected
        assert [path.name for path in sorted(directory.glob("*.seg"))][
            0
        ] == f"journal-{current.position.segment:08d}.seg"
        assert journal.erase_before(10**6) != ()
        assert len(list(directory.glob("*.seg"))) == 1  # never the one in use
        append_intent(journal, 100)
        assert append_completion(journal, 100) == 41
    with pytest.raises(Internal, match="missing"):
        list(JournalReader(directory, Position(1, 50)).read())


def test_a_header_torn_by_a_crash_is_made_anew(tmp_path: Path) -> None:
    directory = tmp_path / "journal"
    with Journal.open(directory) as journal:
        append_intent(journal, 1)
        append_completion(journal, 1)
    segment_path(directory, 1).write_bytes(segment_path(directory, 0).read_bytes()[:17])
    with Journal.open(directory) as journal:
        assert journal.recovery.torn_bytes == 17
        append_intent(journal, 2)
        assert append_completion(journal, 2) == 1


def test_damage_to_what_was_acknowledged_is_never_taken_for_a_torn_tail(tmp_path: Path) -> None:
    directory = tmp_path / "journal"
    with Journal.open(directory) as journal:
        append_intent(journal, 1)
        append_completion(journal, 1)
    path = segment_path(directory, 0)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:-3] + b"\0" + whole[-2:], whole[:60]):
        path.write_bytes(damaged)
        with pytest.raises(Internal, match="acknowledged frames are gone"):
            Journal.open(directory)
    with pytest.raises(Internal, match="damaged"):
        list(JournalReader(directory).read())
    path.write_bytes(whole)
    Journal.open(directory).close()
    path.write_bytes(whole[:-1])  # no longer the last segment
    with pytest.raises(Internal, match="damaged|comes next"):
        Journal.open(directory)


def test_a_frame_is_whole_or_not_there() -> None:
    encoded = encode_frame(make_intent(1))
    assert decode_frame(encoded, 0) == (make_intent(1), len(encoded))
    for length in range(len(encoded)):
        assert decode_frame(encoded[:length], 0) is None
    for place in range(len(encoded)):
        assert decode_frame(encoded[:place] + bytes([encoded[place] ^ 1]) + encoded[place + 1 :], 0) is None
    assert decode_frame(bytes(4096), 0) is None


def test_the_journal_holds_no_text_and_no_token_ids(tmp_path: Path) -> None:
    prompt, answer = "the-secret-prompt", "the-secret-answer"
    with Journal.open(tmp_path / "journal") as journal:
        acknowledged = Acknowledgements()
        journal.append([make_intent(1, prompt)], acknowledged.on_durable, acknowledged.on_error)
        acknowledged.wait()
        journal.append_progress([ProgressFrame(request_id(1), 2, commit_of(1, answer))])
        append_completion(journal, 1, text=answer)
    content = b"".join(path.read_bytes() for path in (tmp_path / "journal").iterdir())
    assert commit_of(1, answer) in content  # the search finds what is there
    assert b"secret" not in content
    fields = {name for kind in (IntentFrame, ProgressFrame, CompletionFrame) for name in kind.__struct_fields__}
    assert fields.isdisjoint({"text", "prompt", "output", "token_ids", "tokens"})


def _copy(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
