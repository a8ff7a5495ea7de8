"""What may be evicted, and in which order."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from enum import IntEnum
from itertools import chain
from typing import Generic, TypeVar

Entry = TypeVar("Entry")


class Worth(IntEnum):
    """Why something that nobody uses now is kept; the lowest goes first."""

    NONE = 0
    EXPECTED = 1  # a request that was submitted will want it
    PINNED = 2  # the catalog asks to keep it
    PINNED_AND_EXPECTED = 3


class EvictionOrder(Generic[Entry]):
    """Entries by what they are worth, and those of one worth least recently used first. Every operation takes constant
    time, but for `candidates`, which takes that of what it gives."""

    def __init__(self) -> None:
        self._entries: dict[Worth, OrderedDict[Entry, None]] = {worth: OrderedDict() for worth in Worth}

    def put(self, entry: Entry, worth: Worth) -> None:
        """It was used just now, and may be evicted from now on."""
        self.discard(entry)
        self._entries[worth][entry] = None

    def discard(self, entry: Entry) -> None:
        """It may not be evicted; no news if that was so."""
        for entries in self._entries.values():
            entries.pop(entry, None)

    def candidates(self, highest: Worth = Worth.PINNED_AND_EXPECTED) -> Iterator[Entry]:
        """Those worth at most `highest`, the first to go first."""
        return chain.from_iterable(self._entries[worth] for worth in Worth if worth <= highest)
