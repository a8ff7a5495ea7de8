"""The frames of the usage journal, and how they lie in a segment file.

A segment `journal-<n>.seg` is a row of frames: length (4 bytes, little-endian) ‖ payload ‖ SHA-256(payload).
The payload is a msgpack array whose first item is the frame's type. The first frame of a segment is its header.
Frames never hold text or token ids: texts appear as salted commitments only.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from ..errors import Internal, InvalidArgument

STATUS_COMPLETE = 1
STATUS_CANCELLED = 2
STATUS_ERROR = 3
STATUS_ABORTED = 4
STATUS_NAMES = {1: "complete", 2: "cancelled", 3: "error", 4: "aborted"}

MAX_PAYLOAD = 16 << 20
_LENGTH = struct.Struct("<I")
_HASH_BYTES = 32
_ITEM = re.compile(r"`\$\[(\d+)\]")
_MARK = struct.Struct("<QQ8s")

RequestId = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Bytes32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
Tokens = Annotated[int, Meta(ge=0, lt=2**32)]
Seconds = Annotated[int, Meta(ge=0, lt=2**37)]  # to the year 6325


class Position(NamedTuple):
    """A place between two frames. Positions order as the journal does."""

    segment: int
    offset: int  # bytes from the start of the segment


START = Position(0, 0)


class SegmentHeader(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """The first frame of a segment: its number, and the completion number that comes next."""

    segment: int
    next_seq: int


class IntentFrame(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """A request that may produce tokens; durable before the first one leaves."""

    request_id: RequestId
    caller: str
    label: str  # the client's own id
    base_digest: RequestId
    runtime: dict[str, Any]  # blobs.RuntimeBlob
    adapters: dict[str, Any]  # blobs.AdaptersBlob
    terms: dict[str, Any]  # blobs.TermsBlob
    prompt_salt: Bytes32
    output_salt: Bytes32
    prompt_commit: Bytes32
    in_tokens: Tokens
    started_at: Seconds
    accounts: tuple[str, ...] = ()  # of the quota ledger; older journals have none
    registry: bytes = b""  # RegistryReference.preimage, or nothing; older journals have none


class ProgressFrame(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """What is about to be sent: counts everything sent up to and with the response that follows it."""

    request_id: str
    out_tokens: int
    output_commit: bytes


class CompletionFrame(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """The end of a request. `seq` counts completions from 0 over the life of the journal."""

    request_id: RequestId
    seq: Annotated[int, Meta(ge=0)]
    status: Annotated[int, Meta(ge=STATUS_COMPLETE, le=STATUS_ABORTED)]
    out_tokens: Tokens
    output_commit: Bytes32
    ended_at: Seconds


Frame = SegmentHeader | IntentFrame | ProgressFrame | CompletionFrame


_decode = msgspec.msgpack.Decoder(Frame).decode


class Entry(NamedTuple):
    """A frame and where it lies."""

    frame: Frame
    start: Position
    end: Position


def encode_frame(frame: Frame) -> bytes:
    """The frame as it lies in a segment."""
    try:
        payload = msgspec.msgpack.encode(frame)
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"text that is not Unicode: {error}", field="journal frame") from error
    if len(payload) > MAX_PAYLOAD:
        raise InvalidArgument(f"a journal frame has {len(payload)} bytes, at most {MAX_PAYLOAD} are possible")
    return _LENGTH.pack(len(payload)) + payload + hashlib.sha256(payload).digest()


def encode_checked(frame: IntentFrame | CompletionFrame) -> bytes:
    """`encode_frame`, refusing fields out of range before they are written: readers would stop at them for ever."""
    encoded = encode_frame(frame)
    try:
        _decode(memoryview(encoded)[_LENGTH.size : -_HASH_BYTES])
    except msgspec.ValidationError as error:
        item = _ITEM.search(str(error))  # the payload is an array: the type, then the fields
        field = frame.__struct_fields__[int(item[1]) - 1] if item else "journal frame"
        raise InvalidArgument(str(error), field=field) from error
    return encoded


def decode_frame(buffer: bytes, offset: int) -> tuple[Frame, int] | None:
    """The frame at `offset` and the offset behind it; None where no whole, undamaged frame starts."""
    start = offset + _LENGTH.size
    if len(buffer) < start:
        return None
    (length,) = _LENGTH.unpack_from(buffer, offset)
    end = start + length + _HASH_BYTES
    if length > MAX_PAYLOAD or len(buffer) < end:
        return None
    payload = buffer[start : start + length]
    if hashlib.sha256(payload).digest() != buffer[start + length : end]:
        return None
    try:
        return _decode(payload), end
    except msgspec.ValidationError as error:
        raise Internal(f"a journal frame at offset {offset} has an unknown form: {error}") from error


def segment_path(directory: Path, segment: int) -> Path:
    return directory / f"journal-{segment:08d}.seg"


def list_segments(directory: Path) -> list[int]:
    """The numbers of the segments that are there, ascending."""
    return sorted(int(path.stem.removeprefix("journal-")) for path in directory.glob("journal-*.seg"))


def sync_directory(directory: Path) -> None:
    """Make creations, renames and removals in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(directory: Path, mode: int = 0o777) -> None:
    """Make a directory and what is missing above it, durably: what is synced in a directory that is lost is lost."""
    if not directory.parent.is_dir():
        make_directory(directory.parent)
    directory.mkdir(mode, exist_ok=True)
    sync_directory(directory.parent)


def write_again(path: Path, start: int = 0) -> None:
    """Make what a file says from `start` on durable, although a sync of it may have failed in a process that is gone.

    Such a failure takes the kernel's marks of what is not on the disk yet: reads show it, and the next sync
    succeeds without it. Only new writes are written.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        while chunk := os.pread(descriptor, 1 << 20, start):
            start += os.pwrite(descriptor, chunk, start)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Mark:
    """A position in a small file that one process moves and others read.

    `durable`, moved by the journal's writer after each fdatasync, bounds what readers may see: a receipt made from a
    frame that a power cut takes back could never be taken back itself. `projected`, moved by the receipt log when a
    checkpoint covers what it has, bounds what the writer may erase. Marks are not synced: after a power cut an old one
    only means less is seen or erased until it moves again.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self.path = directory / name

    def publish(self, position: Position) -> None:
        body = struct.pack("<QQ", *position)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(descriptor, body + hashlib.sha256(body).digest()[:8], 0)
        finally:
            os.close(descriptor)

    def read(self) -> Position | None:
        """Where the mark stands; None where there is none or a power cut left it unreadable."""
        for _ in range(8):  # a read that met a write half-way is read again
            try:
                descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            try:
                packed = os.read(descriptor, _MARK.size + 1)
            finally:
                os.close(descriptor)
            if len(packed) == _MARK.size:
                segment, offset, check = _MARK.unpack(packed)
                if hashlib.sha256(packed[:16]).digest()[:8] == check:
                    return Position(segment, offset)
        return None
