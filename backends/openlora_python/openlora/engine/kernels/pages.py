"""Memory for weights that are streamed from beginning to end in every step: on huge pages where the system allows it.

A step reads all weights once. On pages of 4 KiB the translation of addresses misses its cache at every page, and the
CPU's prefetcher stops there too: measured, half of the memory bandwidth at one row.
"""

from __future__ import annotations

import mmap
from math import prod

import torch

_HUGE_PAGE = 2 << 20


def streamed(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros on the CPU. Without huge pages it is an ordinary one: they are advice to the kernel."""
    size = prod(shape) * dtype.itemsize
    if size < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    # It lives as long as the tensor.
    memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE_PAGE
    return whole[start : start + size].view(dtype).view(shape)


def occupied(size: int) -> int:
    """Bytes of memory that a streamed tensor of `size` bytes takes at most: huge pages are taken whole."""
    return size if size < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE") else -(-size // _HUGE_PAGE) * _HUGE_PAGE
