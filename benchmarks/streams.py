"""What serving costs: the token rate of 64 concurrent streams through Triton, against the engine alone.

    python benchmarks/streams.py --model DIR --adapters DIR [--minutes 10] [--json FILE]

The same row of questions (base and up to 16 adapters in turn) goes to an engine in a process of its own and, over gRPC
streams, to a server: 64 at a time, in turns A B A B. Rates are taken between two moments of a running load. One JSON
line a turn, with the CPU seconds and the memory of every process, the client's own among them since it shares the
cores; then a table. An error of any stream ends it with status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy
import psutil
import yaml
from rich.console import Console
from rich.table import Table
from stream_work import Question, Work
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient

READY_SECONDS = 300
PORTS = ("http_port", "grpc_port", "metrics_port", "health_port", "gateway_port")
STUB = "triton_python_backend_stub"


@dataclass(frozen=True)
class Turn:
    """One turn of one side, as it is written to the JSON file."""

    side: str  # engine | triton
    streams: int
    seconds: float
    tokens_per_s: float
    responses_per_s: float
    requests: int
    errors: list[str]
    cpu_seconds: dict[str, float]  # by process, within `seconds`
    pss_mb: dict[str, tuple[float, float]]  # by process, at the beginning and at the end
    machine: str
    cores: int


class Alone:
    """The engine's own process."""

    def __init__(self, settings: dict[str, Any]) -> None:
        script = Path(__file__).with_name("engine_alone.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def run(self, streams: int, ramp: float, seconds: float, first: int) -> Turn:
        command = {"streams": streams, "ramp": ramp, "seconds": seconds, "first": first}
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        result = self._answer()
        took = result["seconds"]
        cpu = {"engine": round(result["cpu"], 2)}
        rate = round(result["tokens"] / took, 1)
        return _turn("engine", streams, took, rate, 0.0, result["requests"], result["errors"], cpu, {})

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine's process ended with status {self._process.wait()}")
        return json.loads(line)


class Served:
    """`openlora serve` over a state directory of its own, and a client with one gRPC stream a question."""

    def __init__(self, model: Path, adapters: Path, state_dir: Path, engine: dict[str, Any], work: Work) -> None:
        self._work = work
        self.tokens = self.responses = self.requests = 0
        self.errors: list[str] = []
        ports = dict(zip(PORTS, _free_ports(len(PORTS)), strict=True))
        self._url = f"127.0.0.1:{ports['grpc_port']}"
        config = state_dir / "streams.yaml"
        tree = {"model": str(model), "adapters": str(adapters), "state_dir": str(state_dir), "engine": engine, **ports}
        config.write_text(yaml.safe_dump(tree))
        self._launcher = subprocess.Popen([sys.executable, "-m", "openlora.cli", "serve", "--config", str(config)])
        until = time.monotonic() + READY_SECONDS
        while not _answers(f"http://127.0.0.1:{ports['health_port']}/readyz"):
            if self._launcher.poll() is not None or time.monotonic() > until:
                raise RuntimeError("the server did not start")
            time.sleep(0.2)

    async def run(self, streams: int, ramp: float, seconds: float, first: int) -> Turn:
        numbers = itertools.count(first)
        async with InferenceServerClient(self._url) as client:
            workers = [asyncio.create_task(self._work_off(client, numbers)) for _ in range(streams)]
            await asyncio.sleep(ramp)
            tokens, responses, requests = self.tokens, self.responses, self.requests
            processes = self._processes()
            begun, cpu, pss = time.monotonic(), _cpu(processes), _pss(processes)
            await asyncio.wait(workers, timeout=seconds)
            took = time.monotonic() - begun
            used = {name: round(after - cpu[name], 2) for name, after in _cpu(processes).items()}
            memory = {name: (pss[name], after) for name, after in _pss(processes).items()}
            rates = [
                round((now - then) / took, 1) for now, then in ((self.tokens, tokens), (self.responses, responses))
            ]
            requests = self.requests - requests
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return _turn("triton", streams, took, *rates, requests, self.errors, used, memory)

    def close(self) -> None:
        self._launcher.terminate()
        self._launcher.wait()

    async def _work_off(self, client: InferenceServerClient, numbers: itertools.count[int]) -> None:
        """One question after another, until cancelled or told an error."""
        while True:
            stream = client.stream_infer(_only(self._work.question(next(numbers))))
            try:
                async for result, error in stream:
                    if error is not None:
                        self.errors.append(str(error.message()))
                        return
                    token_ids = result.as_numpy("token_ids")
                    if token_ids is not None:
                        self.tokens += token_ids.size
                        self.responses += 1
            except grpc.RpcError as failure:
                self.errors.append(f"{failure.code().name}: {failure.details()}")
                return
            finally:
                stream.cancel()
            self.requests += 1

    def _processes(self) -> dict[str, psutil.Process]:
        launcher = psutil.Process(self._launcher.pid)
        found = {"client": psutil.Process(), "launcher": launcher}
        for process in launcher.children(recursive=True):
            found[_part(process.cmdline())] = process
        return found


def _only_input(name: str, value: str | bool) -> InferInput:
    text = isinstance(value, str)
    tensor = InferInput(name, [1], "BYTES" if text else "BOOL")
    tensor.set_data_from_numpy(numpy.array([value.encode() if text else value], numpy.object_ if text else bool))
    return tensor


async def _only(question: Question) -> AsyncIterator[dict[str, Any]]:
    sampling = {"max_tokens": question.new_tokens, "temperature": 0, "ignore_eos": True, "timeout_ms": 600_000}
    values = {"text_input": question.prompt, "stream": True, "sampling_parameters": json.dumps(sampling)}
    if question.adapter is not None:
        values["adapters"] = question.adapter
    yield {"model_name": "openlora", "inputs": [_only_input(*item) for item in values.items()]}


def _part(command: list[str]) -> str:
    """The name of a process of the server."""
    if command and command[0].endswith(STUB):
        return Path(command[1]).parents[1].name  # …/model_repository/<model>/1/model.py
    known = {
        "tritonserver": "tritonserver",
        "openlora.engine.host": "engine",
        "openlora.serving.fetcher": "fetcher",
        "openlora_gateway": "gateway",
    }
    for word in command:
        if name := known.get(Path(word).name):
            return name
    return " ".join(command)


def _cpu(processes: dict[str, psutil.Process]) -> dict[str, float]:
    return {name: sum(process.cpu_times()[:2]) for name, process in processes.items()}


def _pss(processes: dict[str, psutil.Process]) -> dict[str, float]:
    return {name: round(process.memory_full_info().pss / (1 << 20), 1) for name, process in processes.items()}


def _turn(side: str, streams: int, seconds: float, *figures: Any) -> Turn:
    return Turn(side, streams, round(seconds, 2), *figures, platform.machine(), os.cpu_count() or 0)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _show(console: Console, turns: list[Turn]) -> None:
    rates = {side: [turn.tokens_per_s for turn in turns if turn.side == side] for side in ("engine", "triton")}
    table = Table("turn", "tokens/s", "responses/s", "requests", "errors", "CPU seconds a second")
    for turn in turns:
        busy = ", ".join(
            f"{name} {seconds / turn.seconds:.3f}"
            for name, seconds in sorted(turn.cpu_seconds.items(), key=lambda item: -item[1])
            if seconds / turn.seconds >= 0.001
        )
        figures = (f"{turn.tokens_per_s:.0f}", f"{turn.responses_per_s:.0f}", str(turn.requests), str(len(turn.errors)))
        table.add_row(turn.side, *figures, busy)
    console.print(table)
    served = [turn for turn in turns if turn.side == "triton"]
    for name in served[0].pss_mb if served else ():
        console.print(f"PSS of {name}: {served[0].pss_mb[name][0]:.0f} -> {served[-1].pss_mb[name][1]:.0f} MB")
    if all(rates.values()):
        alone, through = (statistics.median(rates[side]) for side in ("engine", "triton"))
        console.print(f"medians: {alone:.0f} tokens/s alone, {through:.0f} through Triton: {through / alone:.3f}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--most-adapters", type=int, default=16)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128, help="in the mean; half to one and a half times it")
    parser.add_argument("--minutes", type=float, default=1.0, help="measured through Triton, in all turns together")
    parser.add_argument("--turns", type=int, default=2, help="of each side")
    parser.add_argument("--engine-seconds", type=float, default=20.0, help="of one turn of the engine alone; 0 = none")
    parser.add_argument("--ramp-seconds", type=float, default=8.0, help="of load before each measurement")
    parser.add_argument("--json", type=Path, help="append the lines here")
    return parser.parse_args()


def main() -> None:
    options = _options()
    settings = {
        "max_batch": options.streams,
        "kv_cache_tokens": options.streams * (options.prompt_tokens + 2 * options.new_tokens),
    }
    work = Work(options.model, options.adapters, options.most_adapters, options.prompt_tokens, options.new_tokens)
    shared = {"model": str(options.model), "adapters": str(options.adapters), "engine": settings}
    lengths = {name: getattr(options, name) for name in ("most_adapters", "prompt_tokens", "new_tokens")}
    console, turns = Console(), []

    def add(turn: Turn) -> None:
        turns.append(turn)
        console.print(line := json.dumps(asdict(turn)), soft_wrap=True, highlight=False)
        if options.json is not None:
            with options.json.open("a") as file:
                file.write(line + "\n")

    with tempfile.TemporaryDirectory() as state_dir:
        served = Served(options.model, options.adapters, Path(state_dir), settings, work)
        alone = Alone(shared | lengths) if options.engine_seconds else None
        try:
            first = 0
            for _ in range(options.turns):
                if alone is not None:
                    add(alone.run(options.streams, options.ramp_seconds, options.engine_seconds, first))
                seconds = options.minutes * 60 / options.turns
                add(asyncio.run(served.run(options.streams, options.ramp_seconds, seconds, first)))
                first += 1_000_000
        finally:
            served.close()
            if alone is not None:
                alone.close()
    _show(console, turns)
    if any(turn.errors for turn in turns):
        sys.exit(1)


if __name__ == "__main__":
    main()
