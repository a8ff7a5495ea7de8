"""When what was made is sent: at once while few streams are live, several tokens together while many are.

A response costs the server far more than a token does, and on a CPU it costs the engine's own cores. So a stream's
tokens wait for each other, but never the first one, and never longer than the window: a stream is sent with the last
step before its oldest token's time is up. A timer sends what a late step would have let wait too long.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import Protocol

from ..attribution.frames import ProgressFrame
from ..attribution.journal import Journal
from ..errors import OpenLoRAError

PROBE_SECONDS = 0.25  # how soon a gRPC cancel is seen while no response flows
EMPTY_DELTA_SECONDS = 1.0  # over HTTP a disconnect shows only when bytes are written
ROUND_SECONDS = 0.025  # how exactly these two and the deadlines are kept


class Stream(Protocol):
    """A running request, as the pacer sees it. Times are on the monotonic clock."""

    streaming: bool  # false: the client wants one response, at the end
    deadline: float
    last_response: float  # of any kind
    last_delta: float  # with text or without

    def due(self, window: float) -> float:
        """When what it holds must leave, if a token may wait for `window` seconds; infinite if it holds no text."""

    def progress(self) -> ProgressFrame: ...

    def send_delta(self) -> None: ...

    def send_probe(self) -> None: ...

    def expire(self) -> None: ...

    def abort(self, error: OpenLoRAError) -> None: ...


class Pacer:
    """Sends for all running requests; on the loop's thread. One write of progress frames goes before each batch."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, journal: Journal, coalesce_above: int, coalesce_seconds: float
    ) -> None:
        self._loop = loop
        self._journal = journal
        self._coalesce_above = coalesce_above
        self._coalesce_seconds = coalesce_seconds
        self._running: set[Stream] = set()
        self._live_streams = 0
        self._holding: dict[Stream, None] = {}  # those with something to send, in the order in which they got it
        self._last_step = -math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._some_run = asyncio.Event()

    @property
    def coalescing(self) -> bool:
        """Whether tokens wait for each other now."""
        return self._coalesce_seconds > 0 and self._live_streams > self._coalesce_above

    async def run(self) -> None:
        """Probes, empty deltas and deadlines, for ever."""
        while True:
            await self._some_run.wait()
            self._go_round(time.monotonic())
            await asyncio.sleep(ROUND_SECONDS)

    def add(self, stream: Stream) -> None:
        self._running.add(stream)
        self._live_streams += stream.streaming
        self._some_run.set()

    def remove(self, stream: Stream) -> None:
        """It is over: what it still holds goes with its last response. One that is unknown is ignored."""
        if stream not in self._running:
            return
        self._running.remove(stream)
        self._live_streams -= stream.streaming
        self._holding.pop(stream, None)
        if not self._running:
            self._some_run.clear()

    def hold(self, stream: Stream) -> None:
        """A running stream has something to send."""
        self._holding[stream] = None

    def end_of_step(self) -> None:
        """Everything that a step made was handed out: send what can't wait for the next one."""
        now = time.monotonic()
        step, self._last_step = now - self._last_step, now
        self._send_due(now + step if step < self._coalesce_seconds else now)

    def _send_due(self, until: float) -> None:
        window, due, earliest = self._coalesce_seconds if self.coalescing else 0.0, [], math.inf
        for stream in self._holding:
            when = stream.due(window)
            if when <= until:
                due.append(stream)
            else:
                earliest = min(earliest, when)
        self._send(due)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if earliest == math.inf else self._loop.call_at(earliest, self._time_is_up)

    def _time_is_up(self) -> None:
        self._timer = None
        self._send_due(time.monotonic())

    def _send(self, streams: list[Stream]) -> None:
        """Say in the journal what is about to be sent, then send it: a killed answer's receipt still counts it."""
        if not streams:
            return
        for stream in streams:
            self._holding.pop(stream, None)
        try:
            self._journal.append_progress([stream.progress() for stream in streams])
        except OpenLoRAError as error:
            for stream in streams:
                stream.abort(error)
            return
        for stream in streams:
            stream.send_delta()

    def _go_round(self, now: float) -> None:
        self._send([one for one in self._running if one.streaming and now - one.last_delta >= EMPTY_DELTA_SECONDS])
        for stream in list(self._running):
            if now >= stream.deadline:
                stream.expire()
            elif now - stream.last_response >= PROBE_SECONDS:
                stream.send_probe()
