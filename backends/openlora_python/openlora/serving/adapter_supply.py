"""The bytes of a request's adapters: in the cache before the engine reads them, and not evicted while it lives."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from ..adapters.leases import Leases
from ..adapters.store import AdapterStore
from ..engine.api import AdapterUse
from ..errors import Overloaded
from .fetch_client import FetchClient
from .ticket import Ticket

RETRY_AFTER_MS = 1000


class AdapterSupply:
    """What living requests need of the cache. All on one loop, but for `lease`."""

    def __init__(self, cache: Path, client: FetchClient, most_waiting: int) -> None:
        """At most `most_waiting` requests wait for bytes at once: a source that hangs must not take all places."""
        self._store = AdapterStore(cache)
        self._leases = Leases(cache)
        self._client = client
        self._most_waiting = most_waiting
        self._waiting = 0

    def lease(self, ticket: Ticket) -> list[tuple[str, str]]:
        """Keep the adapters of a request in the cache, or what will be fetched; digests and names of those to be
        fetched. May wait for the disk."""
        for use in ticket.adapters:
            self._leases.take(use.digest)
        named = zip(ticket.adapters, ticket.adapter_names, strict=True)
        return [(use.digest, name) for use, name in named if not self._store.holds(use.digest)]

    def release(self, adapters: Sequence[AdapterUse]) -> None:
        """The request is over."""
        for use in adapters:
            self._leases.give_back(use.digest)

    async def bring(self, missing: Sequence[tuple[str, str]]) -> None:
        """Returns when they are in the cache.

        Raises:
            Overloaded: too many requests wait already.
            OpenLoRAError: as `FetchClient.fetch`.
        """
        if self._waiting >= self._most_waiting:
            raise Overloaded(
                f"{self._waiting} requests wait for adapters to be fetched already", retry_after_ms=RETRY_AFTER_MS
            )
        self._waiting += 1
        try:
            await asyncio.gather(*(self._client.fetch(digest, name) for digest, name in missing))
        finally:
            self._waiting -= 1
