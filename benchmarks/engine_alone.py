"""The engine without a server, in a process of its own: one side of `streams.py`.

Reads lines `{"streams", "ramp", "seconds", "first"}` from its input and answers each with a line
`{"tokens", "requests", "errors", "seconds", "cpu", "next"}` when the turn is over.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from stream_work import Work

from openlora.adapters.manifest import adapter_manifest
from openlora.engine.api import WEIGHT_ONE, AdapterUse, EngineOutput, EngineRequest, Sampling
from openlora.engine.torch_engine import TorchEngine


class EngineAlone:
    """Keeps a number of requests running: the next one is submitted, on the engine's thread, where one ended."""

    def __init__(self, model: Path, adapters: Path, work: Work, options: dict[str, Any]) -> None:
        self._engine = TorchEngine(str(model), "0" * 64, **options)
        self._adapters = adapters
        self._work = work
        self._uses: dict[str, AdapterUse] = {}
        self._numbers = itertools.count()
        self._running: set[str] = set()
        self._going = False
        self._idle = threading.Event()
        self.tokens = self.requests = 0
        self.errors: list[str] = []
        self._engine.start(self._take)

    def run(self, streams: int, ramp: float, seconds: float, first: int) -> dict[str, Any]:
        self._numbers = itertools.count(first)
        self._going = True
        self._idle.clear()
        for _ in range(streams):
            self._submit()
        time.sleep(ramp)
        tokens, requests, begun, cpu = self.tokens, self.requests, time.monotonic(), time.process_time()
        time.sleep(seconds)
        result = {
            "tokens": self.tokens - tokens,
            "requests": self.requests - requests,
            "seconds": time.monotonic() - begun,
            "cpu": time.process_time() - cpu,
            "errors": self.errors,
        }
        self._going = False
        for name in list(self._running):
            self._engine.cancel(name)
        self._idle.wait()
        return result

    def _take(self, outputs: list[EngineOutput]) -> None:
        for output in outputs:
            self.tokens += len(output.token_ids)
            if not output.finish_reason:
                continue
            self._running.discard(output.request_id)
            if output.finish_reason == "error":
                self.errors.append(output.error)
            self.requests += output.finish_reason != "cancelled"
            if self._going:
                self._submit()
            elif not self._running:
                self._idle.set()

    def _submit(self) -> None:
        number = next(self._numbers)
        question = self._work.question(number)
        adapters = ()
        if question.adapter is not None:
            adapters = (self._use(question.adapter),)
        name = f"{number}"
        self._running.add(name)
        sampling = Sampling(max_tokens=question.new_tokens, temperature=0.0)
        self._engine.submit(EngineRequest(name, question.token_ids, adapters, sampling))

    def _use(self, adapter: str) -> AdapterUse:
        if adapter not in self._uses:
            path = self._adapters / adapter
            self._uses[adapter] = AdapterUse(adapter_manifest(path).digest, str(path), WEIGHT_ONE)
        return self._uses[adapter]


def main() -> None:
    settings = json.loads(sys.argv[1])
    model, adapters = Path(settings["model"]), Path(settings["adapters"])
    work = Work(model, adapters, settings["most_adapters"], settings["prompt_tokens"], settings["new_tokens"])
    side = EngineAlone(model, adapters, work, settings["engine"])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(side.run(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
