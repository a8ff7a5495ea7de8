"""The generation step's side of the engine process: submit, cancel, outputs, and the news of its death at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ..errors import EngineRestarted, OpenLoRAError, Unavailable
from ..processes.process_client import ProcessClient
from .api import EngineInfo, EngineOutput, EngineRequest, EngineStats
from .wire import Cancel, Figures, Outputs, Submit, ToClient, Welcome

RETRY_AFTER_MS = 2000


class Receiver(Protocol):
    """Who asked for a request. Both are called on the loop and must neither block nor raise."""

    def take(self, output: EngineOutput) -> None: ...

    def abort(self, error: OpenLoRAError) -> None: ...


class EngineClient(ProcessClient):
    """Lives on one asyncio loop. Outputs go to their receivers as they come; a dead engine aborts all of them.

    `end_of_step` is called when everything that one message brought was handed out, `take_stats` with the engine's
    statistics every second or so. Both on the loop; they must neither block nor raise.
    """

    def __init__(
        self,
        address: str,
        end_of_step: Callable[[], None],
        take_stats: Callable[[EngineStats], None] = lambda stats: None,
    ) -> None:
        super().__init__(address, ToClient, Welcome)
        self._end_of_step = end_of_step
        self._take_stats = take_stats
        self._receivers: dict[str, Receiver] = {}
        self.info: EngineInfo | None = None

    async def _welcomed(self, welcome: Welcome) -> None:
        self.info = welcome.info

    def _hear(self, message: ToClient) -> None:
        if isinstance(message, Outputs):
            for output in message.outputs:
                if receiver := self._receivers.get(output.request_id):
                    receiver.take(output)
            self._end_of_step()
        elif isinstance(message, Figures):
            self._take_stats(message.stats)

    def _lost(self) -> None:
        self.info = None
        for receiver in self._receivers.values():
            receiver.abort(EngineRestarted("the engine died while this request ran", retry_after_ms=RETRY_AFTER_MS))

    def require(self) -> EngineInfo:
        """The facts of the engine that answers now.

        Raises:
            Unavailable: none does.
        """
        if self.info is None:
            raise Unavailable("the engine is starting", retry_after_ms=RETRY_AFTER_MS)
        return self.info

    async def submit(self, request: EngineRequest, receiver: Receiver) -> None:
        """Queue a request. `receiver` gets its outputs up to one with a finish reason, or an error in their place.

        Raises:
            Unavailable: there is no engine; nothing was accepted.
        """
        self.require()
        self._receivers[request.request_id] = receiver
        await self._send(Submit((request,)))

    async def cancel(self, request_id: str) -> None:
        await self._send(Cancel((request_id,)))

    def release(self, request_id: str) -> None:
        """The request is over for us: later outputs of it are dropped."""
        self._receivers.pop(request_id, None)
