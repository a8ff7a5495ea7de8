"""How a process tells the launcher that it is there, and whether it can do its work."""

from __future__ import annotations

import os

import msgspec
import zmq

from ..engine.wire import Report


class StatusReporter:
    """Use from one thread. A launcher that is gone is no concern of the sender: the parent watch sees to that."""

    def __init__(self, address: str, name: str) -> None:
        self._name = name
        self._socket = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)

    def report(self, *, ready: bool, reason: str = "") -> None:
        message = msgspec.msgpack.encode(Report(self._name, os.getpid(), ready, reason))
        try:
            self._socket.send(message, zmq.NOBLOCK)
        except zmq.Again:
            return  # the launcher has a thousand unread reports: one more tells it nothing
