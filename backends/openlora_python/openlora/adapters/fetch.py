"""Downloading one adapter from a source into a directory of its own, where a later attempt can go on with it.

Each source has one directory below the cache, locked by whoever downloads: others wait and then find the result.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from ..errors import AdapterInvalid, Unavailable
from .manifest import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from .sources import (
    MIN_BYTES_PER_SECOND,
    RemoteFile,
    Source,
    SourceChanged,
    SourceFault,
    SourceLimits,
    SourceUri,
    Transient,
    open_source,
)

FETCHING_DIRECTORY = ".fetching"  # below the cache
DESCRIPTION_FILE = "described.json"  # what the source said of the files that are here in part
REQUIRED = (CONFIG_FILE, WEIGHTS_FILE)
FILES = (CONFIG_FILE, CARD_FILE, WEIGHTS_FILE)  # the small ones first
STEPS = 100  # an attempt counts as one that failed unless it brought a step of the file

Result = TypeVar("Result")
Description = dict[str, RemoteFile]
Advance = Callable[[int, int | None], None]  # bytes there, bytes in all


class Part:
    """The directory of one source, locked."""

    def __init__(self, directory: Path, handle: int) -> None:
        self.directory = directory
        self._handle = handle

    @property
    def resumable(self) -> bool:
        """Whether another attempt could prove that it goes on with the same files."""
        note = self.directory / DESCRIPTION_FILE
        return note.is_file() and note.stat().st_size > 0

    def release(self, keep: bool) -> None:
        """Unlock it; unless it is kept for another attempt, it is gone."""
        if keep:
            os.utime(self.directory)
        else:
            shutil.rmtree(self.directory)
        os.close(self._handle)


class FetchArea:
    """All parts, in number and age within bounds."""

    def __init__(self, cache: Path, limits: SourceLimits) -> None:
        self._directory = cache / FETCHING_DIRECTORY
        self._limits = limits

    def alone(self, uri: SourceUri) -> Part:
        """The part of `uri`, as soon as nobody else holds it. Its name tells nothing that isn't public."""
        directory = self._directory / hashlib.sha256(uri.public.encode()).hexdigest()[:32]
        while True:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if (part := _locked(directory, fcntl.LOCK_EX)) is not None:
                return part

    def sweep(self) -> None:
        """Remove the parts that nobody works on and that are too old or too many."""
        for place, (age, directory) in enumerate(sorted(self._ages())):
            if age <= self._limits.part_age_seconds and place < self._limits.max_parts:
                continue
            if (part := _locked(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)) is not None:
                part.release(keep=False)

    def _ages(self) -> Iterator[tuple[float, Path]]:
        for directory in self._directory.glob("*"):
            try:
                yield time.time() - directory.stat().st_mtime, directory
            except FileNotFoundError:  # its download has just ended
                continue


def _locked(directory: Path, how: int) -> Part | None:
    """None when somebody else has it (with LOCK_NB) or removed it meanwhile."""
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, how)
        if os.stat(directory).st_ino == os.fstat(handle).st_ino:
            return Part(directory, handle)
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(handle)
    return None


@dataclass(frozen=True)
class Wanted:
    """What the caller allows and already has.

    `largest` are bytes by file name; `room` raises when so many more bytes can't be kept; `known` tells, of a state
    that the source is in, whether its files are here already. Only `files` are asked for, and of those `unread` aren't
    read: that they are there, and how large they are, is enough.
    """

    largest: Mapping[str, int]
    room: Callable[[int], object]
    known: Callable[[str], Result | None]
    files: tuple[str, ...] = FILES
    unread: tuple[str, ...] = ()


def fetch(uri: SourceUri, directory: Path, wanted: Wanted, limits: SourceLimits, advance: Advance) -> str | Result:
    """Have the files of the adapter at `uri` in `directory`.

    Returns:
        The state of the source, empty when it has no means to tell that it changed; or what `wanted.known` knows.

    Raises:
        AdapterInvalid: what is there can't be an adapter.
        Unavailable: the source doesn't answer as it should, often enough; what came is kept to go on with it.
        Overloaded: no room for it.
        OSError: nothing can be written here.
    """
    source = open_source(uri, limits)
    try:
        download = _Download(uri, source, directory, wanted, limits, advance)
        return _attempts(limits, SourceChanged, download.run)
    finally:
        source.close()


class _Download:
    def __init__(
        self, uri: SourceUri, source: Source, directory: Path, wanted: Wanted, limits: SourceLimits, advance: Advance
    ) -> None:
        self._uri = uri
        self._source = source
        self._directory = directory
        self._wanted = wanted
        self._limits = limits
        self._advance = advance
        self._done = 0

    def run(self) -> str | Result:
        described = self._describe()
        state = state_of(described)
        if state and (known := self._wanted.known(state)) is not None:
            return known
        read = {name: file for name, file in described.items() if name not in self._wanted.unread}
        sizes = [file.size for file in read.values()]
        total = None if None in sizes else sum(sizes)
        self._wanted.room(total or 0)
        self._keep_only(described, state)
        self._done = 0
        try:
            for name, file in read.items():
                self._have(name, file, total)
            if self._describe() != described:
                raise SourceChanged(f"{self._uri.public} changed while it was downloaded")
        except SourceChanged:
            self._forget()
            raise
        return state

    def _describe(self) -> Description:
        found = {name: self._patiently(partial(self._source.describe, name)) for name in self._wanted.files}
        for name in REQUIRED:
            if found[name] is None:
                raise AdapterInvalid(f"{name} is missing at {self._uri.public}")
        described = {name: file for name, file in found.items() if file is not None}
        for name, file in described.items():
            self._check_size(name, file.size or 0)
        return described

    def _check_size(self, name: str, size: int) -> None:
        if size > (most := self._wanted.largest[name]):
            raise AdapterInvalid(f"{name} is {size} bytes or more, at most {most} are possible here")

    def _keep_only(self, described: Description, state: str) -> None:
        """Parts of anything but these very files are removed."""
        note = self._directory / DESCRIPTION_FILE
        if state and note.is_file() and note.read_text() == state:
            return
        self._forget()
        note.write_text(state)

    def _forget(self) -> None:
        for name in (*FILES, DESCRIPTION_FILE):
            (self._directory / name).unlink(missing_ok=True)

    def _have(self, name: str, file: RemoteFile, total: int | None) -> None:
        """One whole file, in as many attempts as bring it further."""
        path = self._directory / name
        path.touch(mode=0o600)

        def there() -> int:
            return path.stat().st_size if file.tag else 0  # without a tag the next attempt starts at 0

        step = max((file.size or self._wanted.largest[name]) // STEPS, 1)
        self._patiently(lambda: self._read(name, file, path, total), lambda: there() // step)
        self._done += path.stat().st_size

    def _patiently(self, action: Callable[[], Result], reached: Callable[[], int] = lambda: 0) -> Result:
        return _attempts(self._limits, Transient, action, reached)

    def _read(self, name: str, file: RemoteFile, path: Path, total: int | None) -> None:
        start = path.stat().st_size if file.tag else 0
        if file.size is not None and start >= file.size > 0:
            return
        with self._source.reading(name, start, file) as (start, pieces), open(path, "r+b") as part:
            part.seek(start)
            part.truncate()
            size = start
            for piece in _paced(pieces, self._limits.stall_seconds, f"{self._uri.public}/{name}"):
                size += len(piece)
                self._check_size(name, size)
                if file.size is not None and size > file.size:
                    raise SourceChanged(f"{self._uri.public}/{name} is longer than the {file.size} bytes it claims")
                part.write(piece)
                self._advance(self._done + size, total)
        if file.size is not None and size < file.size:
            raise Transient(f"{self._uri.public}/{name} ended after {size} of {file.size} bytes")


def _paced(pieces: Iterator[bytes], seconds: float, place: str) -> Iterator[bytes]:
    """`pieces`, unless they come so slowly that the source is as good as stalled."""
    since, size = time.monotonic(), 0
    for piece in pieces:
        size += len(piece)
        yield piece
        if (passed := time.monotonic() - since) >= seconds:
            if size < passed * MIN_BYTES_PER_SECOND:
                raise Transient(f"{place}: {size} bytes in {passed:.0f} s, the source has stalled")
            since, size = time.monotonic(), 0


def _attempts(
    limits: SourceLimits,
    fault: type[SourceFault],
    action: Callable[[], Result],
    reached: Callable[[], int] = lambda: 0,
) -> Result:
    """Run `action` until it succeeds, or fails by `fault` `attempts` times in a row without reaching further.

    Between attempts: exponential back-off with full jitter, and at least what the source asks for.
    """
    failed, best = 0, reached()
    while True:
        try:
            return action()
        except fault as error:
            failed += 1
            if (now := reached()) > best:
                failed, best = 0, now
            if failed >= limits.attempts:
                raise Unavailable(f"{error}, {limits.attempts} times") from error
            longest = limits.longest_wait_seconds
            wait = random.uniform(0, min(limits.first_wait_seconds * 2**failed, longest))
            time.sleep(min(max(wait, error.retry_after), longest))


def state_of(described: Description) -> str:
    """Files, sizes and tags as text; empty when a file has no tag."""
    if not all(file.tag for file in described.values()):
        return ""
    return json.dumps({name: [file.size, file.tag] for name, file in sorted(described.items())})
