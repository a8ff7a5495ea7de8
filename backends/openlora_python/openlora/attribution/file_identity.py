"""Which file this is: what a process can know of whether its data directory was copied or restored.

The number of the file and the nanosecond of its birth, within one machine. The device's number is left out: it changes
when a machine starts again. A file system that keeps no births gives 0, and an image of a whole machine looks like
itself: only the chain or a witness can tell those.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_MACHINE = Path("/etc/machine-id")
_AT_FDCWD = -100
_STATX_BTIME = 0x800


class _Timestamp(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_uint32), ("_reserved", ctypes.c_int32))


class _Statx(ctypes.Structure):
    """`struct statx` of Linux, as far as the time of birth; the rest is room."""

    _fields_ = (
        ("mask", ctypes.c_uint32),
        ("_before", ctypes.c_uint8 * 76),
        ("birth", _Timestamp),
        ("_after", ctypes.c_uint8 * 160),
    )


def file_identity(path: Path) -> str:
    """One line that stays the same while this file lives on this machine, and is another for a copy of it."""
    machine = _MACHINE.read_text().strip() if _MACHINE.exists() else ""
    return f"machine={machine} inode={path.stat().st_ino} birth={_birth(path)}"


def _birth(path: Path) -> int:
    """When the file was made, in nanoseconds since 1970; 0 where nobody knows."""
    statx = getattr(ctypes.CDLL(None), "statx", None)
    found = _Statx()
    if statx is None or statx(_AT_FDCWD, os.fsencode(path), 0, _STATX_BTIME, ctypes.byref(found)) != 0:
        return 0
    return found.birth.seconds * 10**9 + found.birth.nanoseconds if found.mask & _STATX_BTIME else 0
