"""The generation step's side of the fetcher process: one question a digest, however many requests wait for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import OpenLoRAError, Unavailable, from_message
from ..processes.process_client import ProcessClient
from .fetch_wire import Fetch, Fetched, FromFetcher, Ready

DEATHS = 2  # of fetchers over one adapter, which then may be the reason
RETRY_AFTER_MS = 5000

OnEnd = Callable[[OpenLoRAError | None, float], None]


@dataclass
class _Flight:
    """A digest that was asked for, until it is answered."""

    name: str
    end: asyncio.Future[OpenLoRAError | None]
    since: float  # on the monotonic clock
    deaths: int = 0


class FetchClient(ProcessClient):
    """Lives on one asyncio loop. What a fetcher left behind is asked of the next one, once.

    `on_end` is called on the loop with the fault, if any, and the seconds of each fetch that ended.
    """

    def __init__(self, address: str, on_end: OnEnd) -> None:
        super().__init__(address, FromFetcher, Ready)
        self._on_end = on_end
        self._flights: dict[str, _Flight] = {}

    async def fetch(self, digest: str, name: str) -> None:
        """Returns when the bytes of `digest` are in the cache.

        Cancelling this only ends the waiting. The download goes on: whoever asked for the adapter is likely to ask
        again, and a source that hangs ends it by itself.

        Raises:
            OpenLoRAError: why they are not, naming the adapter.
        """
        flight = self._flights.get(digest)
        if flight is None:
            end = asyncio.get_running_loop().create_future()
            flight = self._flights[digest] = _Flight(name, end, time.monotonic())
            await self._send(Fetch(digest, name))
        error = await asyncio.shield(flight.end)
        if error is not None:
            raise type(error)(f"adapter {name}: {error.message}", retry_after_ms=error.retry_after_ms)

    async def _welcomed(self, welcome: Ready) -> None:
        for digest, flight in list(self._flights.items()):
            await self._send(Fetch(digest, flight.name))

    def _hear(self, message: FromFetcher) -> None:
        if isinstance(message, Fetched) and message.digest in self._flights:
            self._land(message.digest, from_message(message.error) if message.error else None)

    def _lost(self) -> None:
        for digest, flight in list(self._flights.items()):
            flight.deaths += 1
            if flight.deaths == DEATHS:
                told = f"the process that fetched it died, {DEATHS} times"
                self._land(digest, Unavailable(told, retry_after_ms=RETRY_AFTER_MS))

    def _land(self, digest: str, error: OpenLoRAError | None) -> None:
        flight = self._flights.pop(digest)
        flight.end.set_result(error)
        self._on_end(error, time.monotonic() - flight.since)
