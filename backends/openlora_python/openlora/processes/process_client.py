"""A client of a process that may die and come back: greets whichever there is, and knows of its death at once."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from ..engine.wire import Hello

HELLO_SECONDS = 0.2


class ProcessClient:
    """Lives on one asyncio loop. A subclass says what to do with the news, by `_welcomed`, `_hear` and `_lost`.

    Args:
        address: of the process's ROUTER socket.
        messages: the type, or union of types, of what it sends.
        welcome: the one of those that answers a `Hello`; it has the `pid` of the process.
    """

    def __init__(self, address: str, messages: Any, welcome: type[msgspec.Struct]) -> None:
        self._address = address
        self._welcome = welcome
        self._context = zmq.asyncio.Context()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(messages)
        self._socket: zmq.asyncio.Socket | None = None

    async def run(self) -> None:
        """Keep a connection to the process of the moment, for ever."""
        while True:
            with self._context.socket(zmq.DEALER) as socket:  # a new one each time: no word of ours to the dead
                socket.setsockopt(zmq.LINGER, 0)
                socket.setsockopt(zmq.SNDHWM, 0)
                socket.setsockopt(zmq.RCVHWM, 0)
                socket.connect(self._address)
                welcome = await self._greet(socket)
                await self._serve(socket, welcome)

    async def _greet(self, socket: zmq.asyncio.Socket) -> Any:
        while True:
            await socket.send(self._encoder.encode(Hello(os.getpid())))
            if await socket.poll(HELLO_SECONDS * 1000):
                message = self._decoder.decode(await socket.recv())
                if isinstance(message, self._welcome):
                    return message

    async def _serve(self, socket: zmq.asyncio.Socket, welcome: Any) -> None:
        try:
            descriptor = os.pidfd_open(welcome.pid)
        except ProcessLookupError:
            return  # died between its word and ours
        loop = asyncio.get_running_loop()
        died = asyncio.Event()
        loop.add_reader(descriptor, died.set)
        self._socket = socket
        reading = asyncio.create_task(self._read(socket, welcome))
        ended = asyncio.create_task(died.wait())
        try:
            await asyncio.wait([reading, ended], return_when=asyncio.FIRST_COMPLETED)
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
            self._socket = None
            self._lost()
            for task in (reading, ended):
                task.cancel()
            if reading.done() and not reading.cancelled() and reading.exception():
                raise reading.exception()

    async def _read(self, socket: zmq.asyncio.Socket, welcome: Any) -> None:
        await self._welcomed(welcome)
        while True:
            self._hear(self._decoder.decode(await socket.recv()))

    async def _send(self, message: msgspec.Struct) -> None:
        """To the process of the moment; without one it is dropped."""
        if self._socket is not None:
            await self._socket.send(self._encoder.encode(message))

    async def _welcomed(self, welcome: Any) -> None:
        """A process answers."""

    def _hear(self, message: Any) -> None:
        """It said something."""

    def _lost(self) -> None:
        """It died."""
