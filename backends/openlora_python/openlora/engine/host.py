"""The engine process: `python -m openlora.engine.host ENGINE_JSON`.

Owns one engine, takes requests over an ipc socket, sends back what each step made in one message. Imports nothing of
the server (another interpreter may run it): the standard library, msgspec, pyzmq and its engine.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from ..errors import OpenLoRAError
from ..processes.parent_watch import exit_with
from .api import Engine, EngineOutput, EngineRequest
from .wire import Cancel, EngineConfig, Figures, Hello, Outputs, Report, Submit, ToEngine, Welcome

REPORT_SECONDS = 1.0
LINGER_MS = 2000  # for the last outputs
# Where the engine computes on the CPU, tritonserver and its stubs share its cores: they have little to do, at once.
NICENESS = 5


class EngineHost:
    """Routes requests of one client at a time (the generation step, or its successor) to an engine."""

    def __init__(self, engine: Engine, config: EngineConfig) -> None:
        self._engine = engine
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToEngine)
        context = zmq.Context.instance()
        self._clients = context.socket(zmq.ROUTER)
        self._clients.setsockopt(zmq.SNDHWM, 0)  # a slow client must not stall the step loop
        self._clients.bind(config.socket)
        self._status = context.socket(zmq.PUSH)
        self._status.setsockopt(zmq.LINGER, 0)
        self._status.connect(config.status_socket)
        self._made: queue.SimpleQueue[list[EngineOutput]] = queue.SimpleQueue()  # by the engine's own thread
        self._news = context.socket(zmq.PULL)  # a word for each entry of that queue
        self._news.setsockopt(zmq.RCVHWM, 0)
        self._news.bind("inproc://made")
        self._context = context
        self._owners: dict[str, bytes] = {}  # request id -> client
        self._client_pids: dict[int, tuple[int, bytes]] = {}  # pidfd -> (pid, client)

    def run(self) -> None:
        """Serve until the process ends, or the engine has."""
        self._engine.start(self._emitter())
        poller = zmq.Poller()
        poller.register(self._clients, zmq.POLLIN)
        poller.register(self._news, zmq.POLLIN)
        next_report = 0.0
        while not self._engine.ended or not self._made.empty():
            if time.monotonic() >= next_report:
                self._report()
                next_report = time.monotonic() + REPORT_SECONDS
            for source, _ in poller.poll(timeout=max(0.0, (next_report - time.monotonic()) * 1000)):
                if source is self._clients:
                    client, message = self._clients.recv_multipart()
                    self._take(client, self._decoder.decode(message), poller)
                elif source is self._news:
                    self._news.recv()
                    self._deliver(self._made.get())
                else:
                    self._forget(source, poller)
        self._report()  # not ready any more

    def _emitter(self) -> Callable[[list[EngineOutput]], None]:
        """What the engine calls once a step, on its own thread: sockets are not shared, so it has one of its own."""
        sockets: list[zmq.Socket] = []

        def emit(outputs: list[EngineOutput]) -> None:
            if not sockets:
                socket = self._context.socket(zmq.PUSH)
                socket.setsockopt(zmq.SNDHWM, 0)
                socket.connect("inproc://made")
                sockets.append(socket)
            self._made.put(outputs)
            sockets[0].send(b"")

        return emit

    def _take(self, client: bytes, message: ToEngine, poller: zmq.Poller) -> None:
        match message:
            case Hello(pid):
                self._greet(client, pid, poller)
            case Submit(requests):
                for request in requests:
                    self._submit(client, request)
            case Cancel(request_ids):
                for request_id in request_ids:
                    self._engine.cancel(request_id)

    def _submit(self, client: bytes, request: EngineRequest) -> None:
        try:
            self._engine.submit(request)
        except OpenLoRAError as error:
            self._send(client, Outputs((EngineOutput(request.request_id, [], "error", str(error)),)))
        else:
            self._owners[request.request_id] = client

    def _greet(self, client: bytes, pid: int, poller: zmq.Poller) -> None:
        if all(client != known for _, known in self._client_pids.values()):
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                return  # it died before we looked
            self._client_pids[descriptor] = (pid, client)
            poller.register(descriptor, zmq.POLLIN)
        self._send(client, Welcome(os.getpid(), self._engine.info))

    def _forget(self, descriptor: int, poller: zmq.Poller) -> None:
        """A client's process ended: nobody will read its answers."""
        poller.unregister(descriptor)
        _, client = self._client_pids.pop(descriptor)
        os.close(descriptor)
        for request_id in [request_id for request_id, owner in self._owners.items() if owner == client]:
            del self._owners[request_id]
            self._engine.cancel(request_id)

    def _deliver(self, outputs: list[EngineOutput]) -> None:
        by_client: dict[bytes, list[EngineOutput]] = {}
        for output in outputs:
            client = self._owners.get(output.request_id)
            if client is None:
                continue  # its client is gone
            by_client.setdefault(client, []).append(output)
            if output.finish_reason:
                del self._owners[output.request_id]
        for client, made in by_client.items():
            self._send(client, Outputs(tuple(made)))

    def _send(self, client: bytes, message: Welcome | Outputs | Figures) -> None:
        self._clients.send_multipart([client, self._encoder.encode(message)])

    def _report(self) -> None:
        stats = self._engine.stats()
        if self._engine.failed is not None:
            raise RuntimeError(f"the engine stopped: {self._engine.failed}")  # the launcher starts a new one
        self._status.send(self._encoder.encode(Report("engine", os.getpid(), not self._engine.ending, stats=stats)))
        for _, client in self._client_pids.values():
            self._send(client, Figures(stats))


def load_engine(config: EngineConfig) -> Engine:
    if config.kind == "torch":
        import torch

        logging.getLogger("torchao").setLevel(logging.ERROR)  # it warns of its CUDA libraries where there is no CUDA
        from .torch_engine import TorchEngine

        if config.threads:
            torch.set_num_threads(config.threads)
        return TorchEngine(config.model_dir, config.base_digest, **config.options)
    if config.kind == "vllm":
        from .vllm_engine import VllmEngine

        return VllmEngine(config.model_dir, config.base_digest, **config.options)
    if config.kind == "tensorrt_llm":
        from .tensorrt_llm_engine import TensorrtLlmEngine

        return TensorrtLlmEngine(config.model_dir, config.base_digest, **config.options)
    raise ValueError(f"no engine {config.kind!r}")


def main() -> None:
    config = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=EngineConfig)
    exit_with(config.launcher_pid, whole_session=True)
    os.nice(NICENESS)  # before any thread is made
    engine = load_engine(config)
    host = EngineHost(engine, config)
    if config.kind == "torch":  # has neither processes nor files to clear away
        host.run()
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    try:
        host.run()
        zmq.Context.instance().destroy(linger=LINGER_MS)
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main()
