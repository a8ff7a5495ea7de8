"""A safetensors file, read in pieces.

The library's own readers map the file, or want all of it in memory and copy it there with Python's lock held. A mapped
file that someone rewrites is a SIGBUS for every request, and a lock held for milliseconds is a step that comes late.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from math import prod
from pathlib import Path

import msgspec
import torch

MAX_HEADER_BYTES = 8 << 20
_LENGTH_BYTES = 8  # of the header's length, in front of it
_PIECE_BYTES = 1 << 20  # read at once, or one tensor where that is larger
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class BadTensorFile(Exception):
    """Why a file is no safetensors file that can be read."""


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that was not read yet."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # in the file

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """An open file, for a `with` block. `tensors` are its tensors in the order in which they lie in it."""

    def __init__(self, path: Path) -> None:
        """Read the header and check that the tensors it names are what the file holds.

        Raises:
            BadTensorFile: naming what is wrong.
            OSError: the file system failed.
        """
        # O_NONBLOCK: opening a named pipe must not wait for its other end.
        self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._hashed, self._hash = 0, hashlib.sha256()
        try:
            status = os.fstat(self._file)
            if not stat.S_ISREG(status.st_mode):
                raise BadTensorFile("it is not a regular file")
            self.size = status.st_size
            self.tensors = _tensors(self._header(), self.size)
        except BaseException:
            self.close()
            raise
        self._buffer, self._start, self._filled = bytearray(), 0, 0  # a piece of the file, and what of it is here

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._file)

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        """The tensor, until another one is read: it lies where that one may.

        Raises:
            BadTensorFile: the file has become shorter.
            OSError: the file system failed.
        """
        if not tensor.nbytes:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        offset = tensor.start - self._start
        if not 0 <= offset <= self._filled - tensor.nbytes:
            size = min(max(tensor.nbytes, _PIECE_BYTES), self.size - tensor.start)
            if len(self._buffer) < size:
                self._buffer = bytearray(size)
            self._filled, offset = 0, 0
            self._fill(tensor.start, size)
            self._start, self._filled = tensor.start, size
        count = prod(tensor.shape)
        return torch.frombuffer(self._buffer, dtype=tensor.dtype, count=count, offset=offset).view(tensor.shape)

    def sha256(self) -> str:
        """Of the whole file, once its tensors were all read in their order; 64 hex digits."""
        if self._hashed != self.size:
            raise BadTensorFile(f"{self._hashed} of its {self.size} bytes were read in their order")
        return self._hash.hexdigest()

    def _header(self) -> bytes:
        self._buffer = bytearray(_LENGTH_BYTES)
        self._fill(0, _LENGTH_BYTES)
        length = int.from_bytes(self._buffer, "little")
        if length > MAX_HEADER_BYTES:
            raise BadTensorFile(f"its header is said to take {length} bytes, at most {MAX_HEADER_BYTES} are right")
        self._buffer = bytearray(length)
        self._fill(_LENGTH_BYTES, length)
        return bytes(self._buffer)

    def _fill(self, start: int, size: int) -> None:
        """`size` bytes of the file to the beginning of the buffer."""
        free = memoryview(self._buffer)[:size]
        while free:
            got = os.preadv(self._file, [free], start)
            if got == 0:
                raise BadTensorFile("it ends too early")
            if start <= self._hashed < start + got:
                self._hash.update(free[self._hashed - start : got])
                self._hashed = start + got
            free, start = free[got:], start + got


def _tensors(header: bytes, file_size: int) -> list[StoredTensor]:
    try:
        raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in raw.items()}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadTensorFile(f"its header is not what safetensors writes: {error}") from error
    end = data = _LENGTH_BYTES + len(header)
    tensors = []
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            raise BadTensorFile(f"{name} has the unknown dtype {entry.dtype}")
        if any(size < 0 for size in entry.shape):
            raise BadTensorFile(f"{name} has the shape {entry.shape}")
        tensor = StoredTensor(name, dtype, entry.shape, end)
        begin, stop = (data + offset for offset in entry.data_offsets)
        if begin != end or stop != end + tensor.nbytes:
            raise BadTensorFile(
                f"{name} is said to lie at {entry.data_offsets}, {(end - data, end - data + tensor.nbytes)} is right"
            )
        end = stop
        tensors.append(tensor)
    if end != file_size:
        raise BadTensorFile(f"it has {file_size} bytes, its header speaks of {end}")
    return tensors
