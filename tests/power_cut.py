"""What a power cut leaves of the files of a process: its writes are recorded (native/write_recorder.c), then cut.

The model is what POSIX promises and no more. A write or a new size is durable once a sync of that file that began after
it has succeeded; a name (create, rename, unlink, mkdir) once a sync of its directory has. Of everything else any part
may be there: each sector of each write by itself, each name by itself. After a sync of a file that
failed, what it should have made durable may be there or not for ever, whatever later syncs say: the kernel has dropped
its marks of what is to be written. (Names are in the file system's own journal, and wait for the next sync.)
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from attribution_cases import python_environment

CREATE, WRITE, TRUNCATE, SYNC_BEGIN, SYNC_END, RENAME, UNLINK, MAKE_DIRECTORY = range(1, 9)
_EVENT = struct.Struct("<IIQQQII")
_SOURCE = Path(__file__).parent / "native" / "write_recorder.c"


@dataclass(frozen=True)
class Event:
    kind: int
    failed: bool
    inode: int
    number: int  # offset, new size or number of the sync
    path: str
    other_path: str
    data: bytes


def build_recorder(directory: Path) -> Path:
    """Compile the library for LD_PRELOAD."""
    library = directory / "write_recorder.so"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
    subprocess.run(["cc", *flags, "-o", str(library), str(_SOURCE), "-ldl"], check=True)
    return library


class Recording:
    """The files below `root` before and during the processes that ran there, one after the other."""

    def __init__(self, library: Path, root: Path, log: Path) -> None:
        self._library = library
        self.root = root
        self._log = log
        self._before = {path: path.stat().st_ino for path in root.rglob("*")}
        self._content = {path: path.read_bytes() for path in self._before if path.is_file()}
        self.events: list[Event] = []

    def run(self, command: Sequence[str], fail: tuple[int, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a process to its end. `fail`: which sync of which paths gets EIO."""
        environment = python_environment(
            LD_PRELOAD=str(self._library), RECORDER_ROOT=str(self.root), RECORDER_LOG=str(self._log)
        )
        if fail is not None:
            environment |= {"RECORDER_FAIL": str(fail[0]), "RECORDER_FAIL_PATH": fail[1]}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        self.events = _parse(self._log.read_bytes())
        return done

    def said(self, name: str, cut: int) -> list[tuple[int, bytes]]:
        """(index of the event, data) of what was written to the file `name` until the cut."""
        wanted = {event.inode for event in self.events if event.kind == CREATE and Path(event.path).name == name}
        wanted |= {inode for path, inode in self._before.items() if path.name == name}
        return [
            (index, event.data)
            for index, event in enumerate(self.events[:cut])
            if event.kind == WRITE and event.inode in wanted
        ]

    def cut(self, at: int, chance: random.Random, target: Path) -> None:
        """Write into `target` what might be left of `root` when the power went before event `at`."""
        sector, share = chance.choice((512, 4096)), chance.choice((0.0, 1.0, chance.random(), chance.random()))
        target.mkdir()
        disk = self._disk(at)
        for path, file in disk.names_after_cut(chance, share).items():
            place = target / path.relative_to(self.root)
            if file is None:
                place.mkdir(mode=0o700)
            elif not path.name.endswith("-shm"):  # SQLite makes it anew
                place.write_bytes(file.after_cut(chance, share, sector))
                place.chmod(0o600)

    def contents(self, at: int) -> dict[str, bytes]:
        """By name, the last content of every file that there ever was until event `at`, as its process saw it."""
        disk = self._disk(at)
        return {path.name: file.whole() for path, file in disk.seen.items() if file is not None}

    def _disk(self, at: int) -> _Disk:
        disk = _Disk(self.root, self._before, self._content)
        for event in self.events[:at]:
            disk.take(event)
        return disk


@dataclass
class _Change:
    """A write, a new size, or a change of names. `None` for durable means that it never will be for sure."""

    event: Event
    file: _File | None = None
    durable: bool | None = False


class _Synced:
    """Changes in order, and which of them a sync has covered."""

    def __init__(self) -> None:
        self.changes: list[_Change] = []
        self._settled = 0
        self._begun: dict[int, int] = {}

    def sync(self, event: Event) -> None:
        if event.kind == SYNC_BEGIN:
            self._begun[event.number] = len(self.changes)
            return
        covered = self._begun.pop(event.number)
        for change in self.changes[self._settled : covered]:
            if change.durable is False:
                change.durable = None if event.failed else True
        self._settled = max(self._settled, covered)


@dataclass
class _File(_Synced):
    before: bytes = b""

    def __post_init__(self) -> None:
        super().__init__()

    def whole(self) -> bytes:
        return self.after_cut(random.Random(0), 1.0, 512)

    def after_cut(self, chance: random.Random, share: float, sector: int) -> bytes:
        content = bytearray(self.before)
        for change in self.changes:
            event = change.event
            if event.kind == TRUNCATE:
                if change.durable or chance.random() < share:
                    del content[event.number :]
                    content.extend(bytes(event.number - len(content)))
                continue
            start, end = event.number, event.number + len(event.data)
            if not change.durable and share < 1 and chance.random() < share:
                content.extend(bytes(max(0, end - len(content))))  # the new size without the bytes
            edges = [start, *range(start - start % sector + sector, end, sector), end]
            for left, right in zip(edges, edges[1:], strict=False):
                if change.durable or chance.random() < share:
                    content.extend(bytes(max(0, left - len(content))))
                    content[left:right] = event.data[left - start : right - start]
        return bytes(content)


@dataclass
class _Disk:
    root: Path
    inodes: Mapping[Path, int]
    content: Mapping[Path, bytes]
    files: dict[int, _File] = field(default_factory=dict)  # by inode: the latest file that has it
    directories: dict[Path, _Synced] = field(default_factory=dict)
    before: dict[Path, _File | None] = field(default_factory=dict)  # None: a directory
    names: dict[Path, _File | None] = field(default_factory=dict)  # as the process sees them
    seen: dict[Path, _File | None] = field(default_factory=dict)  # those that are gone too
    _changes: list[_Change] = field(default_factory=list)  # of names, in order

    def __post_init__(self) -> None:
        for path, inode in self.inodes.items():
            file = _File(self.content[path]) if path in self.content else None
            self.before[path] = file
            if file is not None:
                self.files[inode] = file
        self.names = dict(self.before)
        self.seen = dict(self.before)

    def take(self, event: Event) -> None:
        path = Path(event.path)
        if event.kind in (WRITE, TRUNCATE):
            self.files[event.inode].changes.append(_Change(event))
        elif event.kind in (SYNC_BEGIN, SYNC_END):
            is_directory = path == self.root or self.names.get(path, event) is None
            if not is_directory:
                self.files[event.inode].sync(event)
            elif not event.failed:
                self._directory(path).sync(event)
        else:
            change = _Change(event)
            if event.kind == CREATE:
                change.file = self.files[event.inode] = _File()
            elif event.kind == RENAME:
                change.file = self.names[path]
            self._directory(path.parent).changes.append(change)
            self._changes.append(change)
            _apply(self.names, change)
            self.seen |= self.names

    def names_after_cut(self, chance: random.Random, share: float) -> dict[Path, _File | None]:
        """What is there, directories before what is in them."""
        names = dict(self.before)
        for change in self._changes:
            if change.durable or chance.random() < share:
                _apply(names, change)
        kept = {self.root: None}
        for path in sorted(names, key=lambda path: len(path.parts)):
            if path.parent in kept:  # what lies in a lost directory is lost
                kept[path] = names[path]
        del kept[self.root]
        return kept

    def _directory(self, path: Path) -> _Synced:
        return self.directories.setdefault(path, _Synced())


def _apply(names: dict[Path, _File | None], change: _Change) -> None:
    event = change.event
    if event.kind in (RENAME, UNLINK):
        names.pop(Path(event.path), None)
    if event.kind == RENAME:
        names[Path(event.other_path)] = change.file
    elif event.kind in (CREATE, MAKE_DIRECTORY):
        names[Path(event.path)] = change.file


def _parse(recorded: bytes) -> list[Event]:
    events, place = [], 0
    while place < len(recorded):
        kind, failed, inode, number, data_bytes, *path_bytes = _EVENT.unpack_from(recorded, place)
        place += _EVENT.size
        parts = []
        for length in (*path_bytes, data_bytes):
            parts.append(recorded[place : place + length])
            place += length
        events.append(Event(kind, bool(failed), inode, number, os.fsdecode(parts[0]), os.fsdecode(parts[1]), parts[2]))
    return events
