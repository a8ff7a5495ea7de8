"""The generation step's side of the engine process: submit, cancel, outputs, and the news of its death at once."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Protocol

import msgspec
import zmq
import zmq.asyncio

from ..errors import EngineRestarted, OpenLoRAError, Unavailable
from .api import EngineInfo, EngineOutput, EngineRequest, EngineStats
from .wire import Cancel, Figures, Hello, Outputs, Submit, ToClient, Welcome

HELLO_SECONDS = 0.2
RETRY_AFTER_MS = 2000


class Receiver(Protocol):
    """Who asked for a request. Both are called on the loop and must neither block nor raise."""

    def take(self, output: EngineOutput) -> None: ...

    def abort(self, error: OpenLoRAError) -> None: ...


class EngineClient:
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
        self._address = address
        self._end_of_step = end_of_step
        self._take_stats = take_stats
        self._context = zmq.asyncio.Context()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToClient)
        self._socket: zmq.asyncio.Socket | None = None
        self._receivers: dict[str, Receiver] = {}
        self.info: EngineInfo | None = None

    async def run(self) -> None:
        """Keep a connection to the engine of the moment, for ever."""
        while True:
            with self._context.socket(zmq.DEALER) as socket:  # a new one each time: no word of ours to the dead
                socket.setsockopt(zmq.LINGER, 0)
                socket.setsockopt(zmq.SNDHWM, 0)
                socket.setsockopt(zmq.RCVHWM, 0)
                socket.connect(self._address)
                welcome = await self._greet(socket)
                await self._serve(socket, welcome)

    async def _greet(self, socket: zmq.asyncio.Socket) -> Welcome:
        while True:
            await socket.send(self._encoder.encode(Hello(os.getpid())))
            if await socket.poll(HELLO_SECONDS * 1000):
                message = self._decoder.decode(await socket.recv())
                if isinstance(message, Welcome):
                    return message

    async def _serve(self, socket: zmq.asyncio.Socket, welcome: Welcome) -> None:
        try:
            descriptor = os.pidfd_open(welcome.pid)
        except ProcessLookupError:
            return  # died between its word and ours
        loop = asyncio.get_running_loop()
        died = asyncio.Event()
        loop.add_reader(descriptor, died.set)
        self._socket, self.info = socket, welcome.info
        reading = asyncio.create_task(self._read(socket))
        ended = asyncio.create_task(died.wait())
        try:
            await asyncio.wait([reading, ended], return_when=asyncio.FIRST_COMPLETED)
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
            self._socket = self.info = None
            for receiver in self._receivers.values():
                receiver.abort(EngineRestarted("the engine died while this request ran", retry_after_ms=RETRY_AFTER_MS))
            for task in (reading, ended):
                task.cancel()
            if reading.done() and not reading.cancelled() and reading.exception():
                raise reading.exception()

    async def _read(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            message = self._decoder.decode(await socket.recv())
            if isinstance(message, Outputs):
                for output in message.outputs:
                    if receiver := self._receivers.get(output.request_id):
                        receiver.take(output)
                self._end_of_step()
            elif isinstance(message, Figures):
                self._take_stats(message.stats)

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
        await self._socket.send(self._encoder.encode(Submit((request,))))

    async def cancel(self, request_id: str) -> None:
        if self._socket is not None:
            await self._socket.send(self._encoder.encode(Cancel((request_id,))))

    def release(self, request_id: str) -> None:
        """The request is over for us: later outputs of it are dropped."""
        self._receivers.pop(request_id, None)
