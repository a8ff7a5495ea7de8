"""How much host memory adapters may take when nobody said."""

from __future__ import annotations

import os
from pathlib import Path

_SHARE = 0.25  # of the machine's memory, or of what this process's control group may have
_AVAILABLE_SHARE = 0.5  # of what is left beside everything else
_LEAST = 64 << 20

_MEMINFO = Path("/proc/meminfo")
_GROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def default_adapter_bytes(claimed: int, meminfo: Path = _MEMINFO, group_limit: Path = _GROUP_LIMIT) -> int:
    """A quarter of the memory, and at most half of what is available now and not `claimed`: bytes that this process
    will take later, as its cache does that is filled over time."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if (limit := _number(group_limit)) is not None:
        total = min(total, limit)
    share = int(total * _SHARE)
    if (available := _available(meminfo)) is not None:
        share = min(share, int((min(available, total) - claimed) * _AVAILABLE_SHARE))
    return max(share, _LEAST)


def _available(meminfo: Path) -> int | None:
    """Bytes that may be had without swapping, where the kernel says so."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0]) if found else None


def _number(file: Path) -> int | None:
    """What a control group's file says, unless there is none or it says "max"."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
