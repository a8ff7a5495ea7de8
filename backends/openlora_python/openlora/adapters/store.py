"""Where adapters' bytes lie: a content-addressed cache that nobody but ingest writes, filled by copying.

Files are copied, never linked: a source that is rewritten later must not change, or tear, what is being served.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AdapterInvalid, Unavailable
from .leases import unleased
from .lora_config import MAX_CONFIG_BYTES, parse_object
from .manifest import (
    CARD_FILE,
    CHUNK_BYTES,
    CONFIG_FILE,
    SETTLED_NS,
    WEIGHTS_FILE,
    Manifest,
    ManifestFile,
    adapter_manifest,
)

MAX_CARD_BYTES = 64 << 10
INCOMING_PREFIX = ".incoming-"
ADMITTED_NS = 1_000_000_000  # mtime of what lies in the cache: whoever writes there gives it another one
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENXIO)


class SourceDirectory:
    """An adapter directory that belongs to somebody else. Only regular files that lie in it are read, links never.

    Raises:
        AdapterInvalid: when it can't be opened as a directory.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in NOT_THERE:
                raise
            kind = "a symbolic link" if path.is_symlink() else f"no readable directory ({error.strerror})"
            raise AdapterInvalid(f"{path.name} is {kind}") from error

    def __enter__(self) -> SourceDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)

    def state(self) -> dict[str, list[int]]:
        """Size, times, inode and device of the files that matter; it changes whenever one of them does."""
        found = {}
        for name in (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE):
            try:
                status = os.stat(name, dir_fd=self._handle, follow_symlinks=False)
            except FileNotFoundError:
                continue
            found[name] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]
        return found

    def open(self, name: str, limit: int) -> int:
        """A file descriptor of the regular file `name` of at most `limit` bytes.

        Raises:
            AdapterInvalid: when it is missing, a link, not a file, too large, or not readable.
        """
        try:
            # O_NONBLOCK: opening a named pipe must not wait for its other end
            handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._handle)
        except OSError as error:
            if error.errno not in NOT_THERE:
                raise
            raise AdapterInvalid(self._why_not(name, error)) from error
        status = os.fstat(handle)
        if stat.S_ISREG(status.st_mode) and status.st_size <= limit:
            return handle
        os.close(handle)
        if not stat.S_ISREG(status.st_mode):
            raise AdapterInvalid(f"{name} is not a regular file")
        raise AdapterInvalid(f"{name} is {status.st_size} bytes, at most {limit} are possible here")

    def card(self) -> dict[str, Any] | None:
        """`openlora.json`, a JSON object of at most 64 KiB; None when there is none."""
        if CARD_FILE not in self.state():
            return None
        with os.fdopen(self.open(CARD_FILE, MAX_CARD_BYTES), "rb") as file:
            return parse_object(file.read(MAX_CARD_BYTES + 1), CARD_FILE, MAX_CARD_BYTES)

    def _why_not(self, name: str, error: OSError) -> str:
        if error.errno == errno.ELOOP:
            return f"{name} is a symbolic link, which may lead anywhere; copy the file itself"
        if error.errno != errno.ENOENT:
            return f"{name} can't be read ({error.strerror})"
        if name == WEIGHTS_FILE and (pickle := self._first_pickle()):
            return f"holds only {pickle}, a pickle file that could run code; save it as {WEIGHTS_FILE}"
        return f"{name} is missing"

    def _first_pickle(self) -> str | None:
        with os.scandir(self._handle) as entries:  # one by one: there may be millions
            return min((entry.name for entry in entries if entry.name.endswith(PICKLE_SUFFIXES)), default=None)


class Incoming:
    """A copy that isn't in the cache yet."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: list[ManifestFile] = []

    def copy(self, source: SourceDirectory, name: str, limit: int, progress: Callable[[int], None]) -> None:
        """Copy one file, hashing what is written; `progress` gets the bytes of each piece."""
        state = hashlib.sha256()
        size = 0
        with (
            os.fdopen(source.open(name, limit), "rb") as original,
            open(self.directory / name, "xb", opener=_private) as copy,
        ):
            while piece := original.read(CHUNK_BYTES):
                size += len(piece)
                if size > limit:
                    raise AdapterInvalid(f"{name} grew past {limit} bytes while it was copied")
                state.update(piece)
                copy.write(piece)
                progress(len(piece))
            copy.flush()
            os.fsync(copy.fileno())
        self._files.append(ManifestFile(name, size, state.hexdigest()))

    @property
    def size(self) -> int:
        """Bytes that were copied."""
        return sum(file.size for file in self._files)

    def manifest(self) -> Manifest:
        return Manifest.of(self._files)


@dataclass(frozen=True)
class CachedCopy:
    """One adapter on disk: its digest, bytes, and when it was last asked for in seconds since 1970."""

    digest: str
    size: int
    last_used: float


class AdapterStore:
    """`<state>/adapters`: one directory per digest, mode 0700, that never changes once it is there."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o700)

    @property
    def directory(self) -> Path:
        return self._directory

    def path(self, digest: str) -> Path:
        return self._directory / digest

    @contextmanager
    def writing(self) -> Iterator[None]:
        """One writer at a time, so that whatever incoming copies lie around are those of a writer that died."""
        with open(self._directory / ".lock", "wb", opener=_private) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for leftover in self._directory.glob(f"{INCOMING_PREFIX}*"):
                shutil.rmtree(leftover)
            yield

    @contextmanager
    def incoming(self) -> Iterator[Incoming]:
        """A place to copy to, gone afterwards unless it was admitted. Only inside `writing()`."""
        directory = Path(tempfile.mkdtemp(dir=self._directory, prefix=INCOMING_PREFIX))
        try:
            yield Incoming(directory)
        finally:
            if directory.exists():
                shutil.rmtree(directory)

    def admit(self, incoming: Incoming) -> str:
        """Move a validated copy to its place, durable before this returns; the digest."""
        digest = incoming.manifest().digest
        target = self.path(digest)
        if target.exists() and not self._intact(digest):
            target.rename(tempfile.mkdtemp(dir=self._directory, prefix=INCOMING_PREFIX))  # for the next writer to clear
        if not target.exists():
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                os.utime(incoming.directory / name, ns=(ADMITTED_NS, ADMITTED_NS))
            _sync_directory(incoming.directory)
            incoming.directory.rename(target)
            _sync_directory(self._directory)
        os.utime(target)
        return digest

    def holds(self, digest: str) -> bool:
        """Whether both files of `digest` are there and, by their times, were not written since they came in.

        Their bytes were checked then; the engine hashes what it reads.
        """
        if digest == "":
            return False
        try:
            files = [os.lstat(self.path(digest) / name) for name in (CONFIG_FILE, WEIGHTS_FILE)]
        except (FileNotFoundError, NotADirectoryError):
            return False
        return all(stat.S_ISREG(file.st_mode) and file.st_mtime_ns == ADMITTED_NS for file in files)

    def copies(self) -> list[CachedCopy]:
        """All that is here, whole or not."""
        found = []
        for entry in self._directory.glob("[!.]*"):
            try:
                size = sum(file.stat().st_size for file in entry.iterdir())
                found.append(CachedCopy(entry.name, size, entry.stat().st_mtime))
            except FileNotFoundError:  # evicted just now
                continue
        return found

    def touch(self, digest: str) -> None:
        """It was used just now."""
        os.utime(self.path(digest))

    def is_leased(self, digest: str) -> bool:
        """Whether a request needs it now."""
        with unleased(self._directory, digest) as free:
            return not free

    def evict(self, digest: str) -> bool:
        """Take a copy away, at once for whoever looks, unless a request needs it. Only inside `writing()`."""
        leaving = tempfile.mkdtemp(dir=self._directory, prefix=INCOMING_PREFIX)
        with unleased(self._directory, digest) as free:
            if free:
                self.path(digest).rename(leaving)
        shutil.rmtree(leaving)
        return free

    def _intact(self, digest: str) -> bool:
        return self.holds(digest) and adapter_manifest(self.path(digest)).digest == digest


def mark_used(copy: Path, seconds: float) -> bool:
    """Note that a request is going to use this copy, so that it isn't the next to be evicted; False: it isn't there.

    A note of at most `seconds` ago does: many requests use one copy.
    """
    try:
        if time.time() - copy.stat().st_mtime > seconds:
            os.utime(copy)
    except FileNotFoundError:
        return False
    return True


def settled_state(state: dict[str, list[int]]) -> str:
    """`state` as text, or empty when a file is so young that a later change might leave the same timestamps."""
    newest = max((times for _, mtime, ctime, _, _ in state.values() for times in (mtime, ctime)), default=0)
    return json.dumps(state) if time.time_ns() - newest > SETTLED_NS else ""


def copy_adapter(
    source: SourceDirectory,
    state: dict[str, list[int]],
    incoming: Incoming,
    max_weight_bytes: int,
    progress: Callable[[int], None],
) -> None:
    """Both files of an adapter, as they were when `state` was taken.

    Raises:
        AdapterInvalid: for missing files, links and sizes out of bounds.
        Unavailable: when the source was written meanwhile: the copy may be half old and half new.
    """
    incoming.copy(source, CONFIG_FILE, MAX_CONFIG_BYTES, progress)
    incoming.copy(source, WEIGHTS_FILE, max_weight_bytes, progress)
    if source.state() != state:
        raise Unavailable("its files changed while they were copied; add it again when they are complete")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
