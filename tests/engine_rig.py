"""Any engine behind one face for tests: in this process, or in a host process under another interpreter."""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import zmq

from openlora.engine.api import (
    AdapterUse,
    Engine,
    EngineInfo,
    EngineOutput,
    EngineRequest,
    EngineStats,
    Sampling,
    TokenLogprob,
)
from openlora.engine.wire import Cancel, EngineConfig, Figures, Hello, Outputs, Submit, ToClient, Welcome

PACKAGE = Path(__file__).resolve().parents[1] / "backends" / "openlora_python"
TIMEOUT_SECONDS = 120  # of a request; reached only when something hangs
START_SECONDS = 400  # vLLM imports half of PyPI


class Answer:
    """Everything an engine said about one request."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason = ""
        self.error = ""
        self.cached_tokens = 0
        self.outputs = 0


class Rig:
    """Collects what an engine says. Subclasses bring requests to it."""

    info: EngineInfo

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self._changed = threading.Condition()
        self._asked = 0

    def take(self, outputs: Sequence[EngineOutput]) -> None:
        with self._changed:
            for output in outputs:
                answer = self.answers.setdefault(output.request_id, Answer())
                assert not answer.finish_reason, f"an output of {output.request_id} after its last one"
                answer.ids += output.token_ids
                answer.logprobs += output.logprobs or []
                answer.cached_tokens += output.cached_tokens
                answer.finish_reason, answer.error = output.finish_reason, output.error
                answer.outputs += 1
            self._changed.notify_all()

    def send(self, request: EngineRequest) -> None:
        raise NotImplementedError

    def cancel(self, request_id: str) -> None:
        raise NotImplementedError

    def stats(self) -> EngineStats:
        raise NotImplementedError

    def submit(
        self,
        request_id: str,
        prompt: Sequence[int],
        adapters: Sequence[AdapterUse] = (),
        priority: int = 0,
        salt: str = "",
        timeout: float | None = None,
        **sampling: Any,
    ) -> None:
        """Greedy unless `sampling` says otherwise."""
        settings = Sampling(**{"temperature": 0.0, "max_tokens": 12, **sampling})
        self.send(EngineRequest(request_id, tuple(prompt), tuple(adapters), settings, priority, timeout, salt))

    def until(self, happened: Callable[[dict[str, Answer]], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        with self._changed:
            while not self._changed.wait_for(lambda: happened(self.answers), 1.0):
                self.assert_alive()
                assert time.monotonic() < deadline, "the engine hangs"

    def assert_alive(self) -> None:
        raise NotImplementedError

    def wait(self, request_id: str) -> Answer:
        self.until(lambda answers: request_id in answers and bool(answers[request_id].finish_reason))
        return self.answers[request_id]

    def ask(self, prompt: Sequence[int], adapters: Sequence[AdapterUse] = (), **sampling: Any) -> Answer:
        self._asked += 1
        request_id = f"ask-{self._asked}"
        self.submit(request_id, prompt, adapters, **sampling)
        return self.wait(request_id)


class InProcessRig(Rig):
    """Of an engine in this process, for a `with` block."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine, self.info = engine, engine.info

    def __enter__(self) -> InProcessRig:
        self.engine.start(self.take)
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.shutdown()
        assert self.engine.failed is None

    def assert_alive(self) -> None:
        assert self.engine.failed is None

    def send(self, request: EngineRequest) -> None:
        self.engine.submit(request)

    def cancel(self, request_id: str) -> None:
        self.engine.cancel(request_id)

    def stats(self) -> EngineStats:
        return self.engine.stats()


class HostedRig(Rig):
    """Of an engine in a host process of its own under the interpreter `python`, for a `with` block."""

    def __init__(self, python: Path, kind: str, model_dir: str, options: dict[str, Any]) -> None:
        super().__init__()
        self._python, self._kind, self._model_dir, self._options = python, kind, model_dir, options
        self._stats: EngineStats | None = None
        self._closing = threading.Event()
        self._todo: queue.SimpleQueue[msgspec.Struct] = queue.SimpleQueue()

    def __enter__(self) -> HostedRig:
        self._directory = Path(tempfile.mkdtemp(prefix="rig-"))
        config = EngineConfig(
            kind=self._kind,
            model_dir=self._model_dir,
            base_digest="0" * 64,
            socket=f"ipc://{self._directory}/engine",
            status_socket=f"ipc://{self._directory}/status",
            launcher_pid=os.getpid(),
            threads=1,
            options=self._options,
        )
        (self._directory / "engine.json").write_bytes(msgspec.json.encode(config))
        self.log = self._directory / "engine.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(self._python), "-m", "openlora.engine.host", str(self._directory / "engine.json")],
                env={**os.environ, "PYTHONPATH": str(PACKAGE)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        welcomed = threading.Event()
        self._thread = threading.Thread(target=self._talk, args=(config.socket, welcomed), daemon=True)
        self._thread.start()
        for _ in range(START_SECONDS):
            if welcomed.wait(1):
                return self
            if self.process.poll() is not None:
                break
        words = self.log.read_text()[-4000:]
        self.__exit__()
        raise RuntimeError(f"no engine: {words}")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)
        self._closing.set()
        self._thread.join()
        shutil.rmtree(self._directory)

    def assert_alive(self) -> None:
        assert self.process.poll() is None, f"the engine died: {self.log.read_text()[-4000:]}"

    def send(self, request: EngineRequest) -> None:
        self._todo.put(Submit((request,)))

    def cancel(self, request_id: str) -> None:
        self._todo.put(Cancel((request_id,)))

    def stats(self) -> EngineStats:
        """Those of after this call."""
        self._stats = None
        self.until(lambda answers: self._stats is not None)
        return self._stats

    def _talk(self, address: str, welcomed: threading.Event) -> None:
        encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(ToClient)
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(address)
            socket.send(encoder.encode(Hello(os.getpid())))
            while not self._closing.is_set():
                while not self._todo.empty():
                    socket.send(encoder.encode(self._todo.get()))
                if not socket.poll(5):
                    continue
                match decoder.decode(socket.recv()):
                    case Welcome(_, info):
                        self.info = info
                        welcomed.set()
                    case Outputs(outputs):
                        self.take(outputs)
                    case Figures(stats):
                        with self._changed:
                            self._stats = stats
                            self._changed.notify_all()
