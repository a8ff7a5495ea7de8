"""Which copies leave the cache when it is full: the least recently used ones that can be fetched again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import Overloaded
from .catalog_reader import CatalogReader
from .sources import SourceLimits
from .store import AdapterStore, CachedCopy


class CacheRoom:
    """What the quota leaves in a cache, by what the catalog and living requests say of the copies that are there."""

    def __init__(self, catalog_path: Path, store: AdapterStore, limits: SourceLimits) -> None:
        self._catalog_path = catalog_path
        self._store = store
        self._limits = limits

    def check(self, more: int) -> list[str]:
        """What would have to be evicted for `more` bytes; raises Overloaded when that isn't enough."""
        if self._limits.cache_bytes is None:
            return []
        with CatalogReader(self._catalog_path) as reader:
            kept = reader.irreplaceable()
        return evictions(
            self._store.copies(), lambda digest: digest in kept or self._store.is_leased(digest), more, self._limits
        )

    def make(self, digest: str, size: int) -> None:
        """Evict what must go for a copy of `size` bytes, unless it is there. Only inside `writing()`.

        Raises:
            Overloaded: as `check`.
        """
        if self._store.holds(digest):
            return
        while chosen := self.check(size):  # what somebody needs since it was chosen stays, and others are
            for leaving in chosen:
                self._store.evict(leaving)


def evictions(
    copies: Sequence[CachedCopy],
    stays: Callable[[str], bool],
    more: int,
    limits: SourceLimits,
    now: float | None = None,
) -> list[str]:
    """What has to go, in this order, so that `more` bytes fit into the quota.

    Args:
        stays: whether a digest must not go. What was used within `limits.keep_seconds` stays as well: a request may be
            on its way to it.
        now: seconds since 1970; default: the clock's.

    Raises:
        Overloaded: when that much can't be evicted.
    """
    if limits.cache_bytes is None:
        return []
    oldest = (time.time() if now is None else now) - limits.keep_seconds
    over = sum(copy.size for copy in copies) + more - limits.cache_bytes
    chosen = []
    for copy in sorted(copies, key=lambda copy: (copy.last_used, copy.digest)):
        if over <= 0:
            break
        if copy.last_used < oldest and not stays(copy.digest):
            chosen.append(copy.digest)
            over -= copy.size
    if over > 0:
        raise Overloaded(
            f"the adapter cache may hold {limits.cache_bytes} bytes, and with {more} more {over} are too many: the rest"
            " is in use or can't be fetched again. Remove adapters, or raise sources.cache_bytes"
        )
    return chosen
