"""One adapter on its way between disk, host memory and a device slot: what `Residency` keeps of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from .adapter_block import Adapter
from .eviction import Worth


class Readable(Protocol):
    """An adapter of which everything is known but its numbers (`adapter_file.OpenAdapter`)."""

    nbytes: int

    def read(self) -> Adapter: ...


@dataclass(eq=False)
class Entry:
    """What is known of an adapter that somebody wants, or that is in host memory."""

    digest: str
    path: str
    pinned: bool = False  # by the catalog: evicted last
    expecting: int = 0  # requests from submission to end
    holders: int = 0  # requests that hold a slot for it
    slot: bool = False
    size: int = 0  # bytes of host memory that it has, or that are reserved for it
    lacks_room: int = 0  # bytes that were not to be had when a load for a holder wanted them
    loading: bool = False
    host: Adapter | None = None
    device: Adapter | None = None
    error: Exception | None = None

    @property
    def worth(self) -> Worth:
        return Worth(2 * self.pinned + (self.expecting > 0))
