"""What checking one adapter may cost: its files are a stranger's, and so are the patterns in its configuration."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ..errors import AdapterInvalid


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Refuses the adapter when the body takes more CPU time; `re` looks for signals while it matches."""

    def over(number: int, frame: FrameType | None) -> None:
        raise AdapterInvalid(
            f"checking it took more than {seconds:.0f} s: the patterns in its configuration are too slow"
        )

    before = signal.signal(signal.SIGVTALRM, over)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """Refuses the adapter when the body needs `size` bytes of address space beyond what the process has now.

    A pattern of ten characters can make `re` remember any number of places to come back to.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    wanted = pages * resource.getpagesize() + size
    bound = min([limit for limit in (soft, hard, wanted) if limit != resource.RLIM_INFINITY])
    resource.setrlimit(resource.RLIMIT_AS, (bound, hard))
    try:
        yield
    except MemoryError as error:
        raise AdapterInvalid(f"checking it needs more than {size >> 20} MiB of memory") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
