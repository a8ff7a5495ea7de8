"""No delivered answer without a receipt, and none twice: after kill -9, after a power cut, after errors of the disk."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

import durability_cases
import pytest
from durability_cases import Acknowledged, check_books, keep_projecting, keep_writing
from power_cut import CREATE, RENAME, SYNC_END, UNLINK, Recording, build_recorder

COUNT = 150  # requests of one recorded run
NAMING = (CREATE, RENAME, UNLINK)


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler, which the recorder of writes needs")
    return build_recorder(tmp_path_factory.mktemp("recorder"))


def work(root: Path, seed: int, first: int, *flags: str) -> list[str]:
    return [sys.executable, durability_cases.__file__, *map(str, (root, seed, first, COUNT)), *flags]


def told_until(recording: Recording, cut: int, before: list[str]) -> tuple[Acknowledged, list[str]]:
    lines = before + [data.decode() for _, data in recording.said("said", cut)]
    told = Acknowledged()
    for line in lines:
        told.take(line)
    return told, lines


class Cutter:
    """Checks what is left of a recorded run after random cuts."""

    def __init__(self, scratch: Path, seed: int) -> None:
        self.seed = seed
        self.chance = random.Random(seed)
        self.lines: list[str] = []  # said before this recording began
        self.archive = scratch / "archive"
        self.archive.mkdir()
        self._scratch = scratch
        self._numbers = itertools.count()

    def cut(self, recording: Recording, at: int) -> tuple[Path, list[str]]:
        """One cut, checked; what was left, before anybody repaired it, and what had been said by then."""
        place = self._scratch / f"cut-{next(self._numbers)}"
        archive = place.with_suffix(".archive")
        recording.cut(at, self.chance, place)
        shutil.copytree(self.archive, archive)
        for name, content in recording.contents(at).items():
            if name.endswith(".seg"):
                (archive / name).write_bytes(content)
        told, lines = told_until(recording, at, self.lines)
        checked = shutil.copytree(place, place.with_suffix(".checked"))
        try:
            check_books(checked / "state", told, archive)
        except Exception as error:
            error.add_note(f"seed {self.seed}, cut before event {at} of {len(recording.events)}: {place}")
            raise
        shutil.rmtree(checked)
        return place, lines


def cut_again_and_again(recorder: Path, scratch: Path, seed: int, runs: int, cuts: int) -> None:
    """Each run begins with what a cut of the one before has left, so that cuts of recovery are among them."""
    cutter = Cutter(scratch, seed)
    root = scratch / "root"
    root.mkdir()
    delivered = 0
    for run in range(runs):
        recording = Recording(recorder, root, scratch / f"events-{run}")
        done = recording.run(work(root, seed + run, run * 1_000_000))
        assert done.returncode == 0 and "Traceback" not in done.stderr, (seed, run, done.stderr)
        events = len(recording.events)
        named = [index for index, event in enumerate(recording.events) if event.kind in NAMING]
        for at in (
            *(cutter.chance.randrange(events // 5) for _ in range(cuts // 3)),  # while it recovers
            *(min(cutter.chance.choice(named) + cutter.chance.randint(1, 4), events) for _ in range(cuts // 3)),
            *(cutter.chance.randint(0, events) for _ in range(cuts // 3)),
        ):
            left, lines = cutter.cut(recording, at)
            shutil.rmtree(left)
            shutil.rmtree(left.with_suffix(".archive"))
        at = cutter.chance.randrange(events // 2, events)
        root, cutter.lines = cutter.cut(recording, at)
        cutter.archive = root.with_suffix(".archive")
        (root / "said").unlink(missing_ok=True)
        delivered = sum(line.startswith("receipt") for line in cutter.lines)
    assert delivered > COUNT // 4 * runs


def test_a_power_cut_takes_nothing_that_was_acknowledged(recorder: Path, tmp_path: Path) -> None:
    cut_again_and_again(recorder, tmp_path, seed=random.randrange(2**32), runs=3, cuts=12)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_power_cuts_take_nothing_that_was_acknowledged(recorder: Path, tmp_path: Path) -> None:
    for number in range(8):
        scratch = tmp_path / str(number)
        scratch.mkdir()
        cut_again_and_again(recorder, scratch, seed=random.randrange(2**32), runs=5, cuts=50)
        shutil.rmtree(scratch)


def fail_a_sync(recorder: Path, scratch: Path, seed: int, path: str, dies: bool, cuts: int) -> bool:
    """Whether there was such a sync to fail; the process goes on after it or is started again on the same files."""
    cutter = Cutter(scratch, seed)
    root = scratch / "root"
    root.mkdir()
    recording = Recording(recorder, root, scratch / "events")
    done = recording.run(work(root, seed, 0, *(["--die"] if dies else [])), (cutter.chance.randint(1, 30), path))
    failures = [index for index, event in enumerate(recording.events) if event.kind == SYNC_END and event.failed]
    if not failures:
        return False
    opened = any(line == b"open\n" for _, line in recording.said("said", len(recording.events)))
    assert dies or done.returncode == 0 or not opened, done.stderr
    acknowledged_by = "receipt" if "sqlite" in path else "intent completion"
    again = next(
        (
            index
            for index, event in enumerate(recording.events)
            if index > failures[0] and event.kind == SYNC_END and path in event.path
        ),
        len(recording.events),
    )
    for index, line in recording.said("said", again):
        if index > failures[0]:
            assert line.split()[0].decode() not in acknowledged_by.split(), f"seed {seed}: {line} after the failure"
    if dies:
        done = recording.run(work(root, seed + 1, 1_000_000))
        assert done.returncode == 0 and "Traceback" not in done.stderr, (seed, done.stderr)
    events = len(recording.events)
    for at in (events, *(cutter.chance.randint(failures[0], events) for _ in range(cuts))):
        cutter.cut(recording, at)
    return True


SYNCED = ("/journal-", "/receipts.sqlite-wal", "/journal")  # the last: the directory too


@pytest.mark.parametrize("dies", [False, True], ids=["goes-on", "restarts"])
@pytest.mark.parametrize("path", SYNCED)
def test_nothing_is_acknowledged_after_a_failed_sync(recorder: Path, tmp_path: Path, path: str, dies: bool) -> None:
    for number in range(10):
        scratch = tmp_path / str(number)
        scratch.mkdir()
        if fail_a_sync(recorder, scratch, random.randrange(2**32), path, dies, cuts=5):
            return
    pytest.fail(f"no sync of {path} was there to fail")


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dies", [False, True], ids=["goes-on", "restarts"])
@pytest.mark.parametrize("path", SYNCED)
def test_many_failed_syncs(recorder: Path, tmp_path: Path, path: str, dies: bool) -> None:
    failed = 0
    for number in range(20):
        scratch = tmp_path / str(number)
        scratch.mkdir()
        failed += fail_a_sync(recorder, scratch, random.randrange(2**32), path, dies, cuts=20)
        shutil.rmtree(scratch)
    assert failed > 10


class Victim:
    """A process that says what it acknowledged, until it is killed."""

    def __init__(self, target: Callable[..., None], *arguments: object) -> None:
        context = multiprocessing.get_context("forkserver")  # forks from a process that has imported everything
        context.set_forkserver_preload(["durability_cases"])
        self.words, said = context.Pipe(duplex=False)
        self._rest = b""
        self.process = context.Process(target=target, args=(said, *arguments), daemon=True)
        self.process.start()
        said.close()

    def read(self) -> list[str]:
        """What was said since; waits for something. Empty at its end."""
        read = os.read(self.words.fileno(), 1 << 16)
        lines = (self._rest + read).split(b"\n")
        self._rest = lines.pop()
        return [line.decode() for line in lines]

    def kill(self) -> list[str]:
        """`kill -9`; what it had still said."""
        self.process.kill()
        self.process.join()
        said = []
        while lines := self.read():
            said += lines
        self.words.close()
        return said


def kill_again_and_again(state: Path, kills: int, seed: int) -> None:
    """The writer of the journal, the projection or both, in load or as they start."""
    chance = random.Random(seed)
    told = Acknowledged()
    victims: dict[str, Victim] = {}
    starts = itertools.count()
    delivered_to: set[int] = set()
    killed = 0
    while killed < kills:
        if "journal" not in victims:
            number = next(starts)
            victims["journal"] = Victim(keep_writing, state, seed + number, number * 1_000_000)
        if "log" not in victims:
            victims["log"] = Victim(keep_projecting, state, seed + next(starts))
        enough = len(told.receipts) + chance.choice((0, 1, 10, 20, 40))
        while len(told.receipts) < enough:
            ready = wait([victim.words for victim in victims.values()], timeout=60)
            assert ready, f"seed {seed}: nothing was acknowledged for a minute"
            for victim in victims.values():
                if victim.words in ready:
                    said = victim.read()
                    assert said, f"seed {seed}: a process ended by itself"
                    for line in said:
                        told.take(line)
        time.sleep(chance.uniform(0, 0.004))  # the random moment
        for name in chance.choice((["journal"], ["log"], ["journal", "log"])):
            for line in victims.pop(name).kill():
                told.take(line)
            killed += 1
        delivered_to.add(len(told.receipts))
    for victim in victims.values():
        for line in victim.kill():
            told.take(line)
    assert len(delivered_to) > kills // 4, "hardly anything was delivered between the kills"
    archive = state.with_name("archive")
    archive.mkdir()
    try:
        check_books(state, told, archive)
    except Exception as error:
        error.add_note(f"seed {seed}")
        raise
    print(
        f"\n{killed} kills: {len(told.receipts)} receipts delivered, {len(told.completions)} completions acknowledged"
    )


def test_kill_9_takes_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    kill_again_and_again(tmp_path / "state", 20, random.randrange(2**32))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_two_hundred_kills_take_nothing_and_double_nothing(tmp_path: Path) -> None:
    kill_again_and_again(tmp_path / "state", 200, random.randrange(2**32))
