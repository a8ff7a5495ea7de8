"""What a long prompt does to those who decode, and what a shared prefix saves: the engine in this process, no server.

    python benchmarks/engine_latency.py --model DIR --adapters DIR [--repetitions N] [--json FILE]

Prints a JSON line for each repetition and one with the medians of all, then a table. Times are those at which the
engine hands out tokens. Adapters are used in turn, one a stream; prompts are random and never repeat.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from openlora.adapters.manifest import adapter_manifest
from openlora.engine.api import WEIGHT_ONE, AdapterUse, EngineOutput, EngineRequest, Sampling
from openlora.engine.torch_engine import TorchEngine

STREAMS = 8
STREAM_PROMPT = 32
SETTLING_TOKENS = 24  # of each stream before anything is measured
QUIET_TOKENS = 48  # of each stream without the long prompt
LONG_PROMPT = 1500
SHARED_PREFIX, OWN_SUFFIX = 512, 16


class Clocked:
    """An engine and the times at which each request got its tokens."""

    def __init__(self, engine: TorchEngine) -> None:
        self.engine = engine
        self.times: dict[str, list[float]] = {}
        self._ended: set[str] = set()
        self._changed = threading.Condition()
        self._names = 0
        self._draw = np.random.default_rng(5)

    def take(self, outputs: list[EngineOutput]) -> None:
        now = time.perf_counter()
        with self._changed:
            for output in outputs:
                if output.error:
                    raise RuntimeError(output.error)
                self.times.setdefault(output.request_id, []).extend([now] * len(output.token_ids))
                if output.finish_reason:
                    self._ended.add(output.request_id)
            self._changed.notify_all()

    def prompt(self, length: int) -> list[int]:
        return self._draw.integers(3, self.engine.info.vocab_size, length).tolist()

    def submit(self, prompt: list[int], adapters: tuple[AdapterUse, ...], max_tokens: int) -> tuple[str, float]:
        """Its id and the time of submission."""
        self._names += 1
        name, now = str(self._names), time.perf_counter()
        self.engine.submit(EngineRequest(name, tuple(prompt), adapters, Sampling(max_tokens, temperature=0.0)))
        return name, now

    def wait(self, happened: Callable[[], bool]) -> None:
        with self._changed:
            if not self._changed.wait_for(happened, timeout=300):
                raise TimeoutError("the engine made nothing for 300 s")

    def made(self, name: str) -> int:
        return len(self.times.get(name, ()))

    def end(self, names: list[str]) -> None:
        for name in names:
            self.engine.cancel(name)
        self.wait(lambda: self._ended.issuperset(names))

    def first_token(self, prompt: list[int], adapters: tuple[AdapterUse, ...]) -> float:
        """Seconds to the first token of a request that ends with it."""
        name, begun = self.submit(prompt, adapters, 1)
        self.wait(lambda: name in self._ended)
        return self.times[name][0] - begun


def long_prompt(clocked: Clocked, uses: list[tuple[AdapterUse, ...]]) -> dict[str, Any]:
    """A long prompt alone, then among streams that decode."""
    alone = clocked.first_token(clocked.prompt(LONG_PROMPT), uses[STREAMS % len(uses)])
    streams = [
        clocked.submit(clocked.prompt(STREAM_PROMPT), uses[index % len(uses)], 100_000)[0] for index in range(STREAMS)
    ]
    clocked.wait(lambda: min(map(clocked.made, streams)) >= SETTLING_TOKENS)
    quiet_from = time.perf_counter()
    enough = {name: clocked.made(name) + QUIET_TOKENS for name in streams}
    clocked.wait(lambda: all(clocked.made(name) >= count for name, count in enough.items()))
    late, submitted = clocked.submit(clocked.prompt(LONG_PROMPT), uses[STREAMS % len(uses)], 4)
    clocked.wait(lambda: clocked.made(late) == 4)
    first = clocked.times[late][0]
    clocked.end(streams)
    quiet = gaps(clocked, streams, quiet_from, submitted)
    disturbed = gaps(clocked, streams, submitted, first)
    return {
        "gap_median_ms": 1000 * float(np.median(quiet)),
        "gap_p99_without_ms": 1000 * float(np.percentile(quiet, 99)),
        "gap_p99_with_ms": 1000 * float(np.percentile(disturbed, 99)),
        "gap_ratio": float(np.percentile(disturbed, 99) / np.median(quiet)),
        "ttft_alone_ms": 1000 * alone,
        "ttft_with_ms": 1000 * (first - submitted),
        "ttft_ratio": (first - submitted) / alone,
    }


def gaps(clocked: Clocked, names: list[str], begin: float, end: float) -> list[float]:
    """Seconds between tokens of one stream, for the tokens that came in the interval."""
    found = []
    for name in names:
        times = clocked.times[name]
        found += [after - before for before, after in zip(times, times[1:], strict=False) if begin < after <= end]
    return found


def shared_prefix(clocked: Clocked, adapters: tuple[AdapterUse, ...]) -> dict[str, Any]:
    """Two requests one after the other that begin alike."""
    prefix = clocked.prompt(SHARED_PREFIX)
    first, second = (clocked.first_token(prefix + clocked.prompt(OWN_SUFFIX), adapters) for _ in range(2))
    return {"ttft_first_ms": 1000 * first, "ttft_second_ms": 1000 * second, "prefix_ratio": second / first}


@contextmanager
def running(arguments: argparse.Namespace) -> Iterator[Clocked]:
    torch.set_num_threads(arguments.threads)
    engine = TorchEngine(
        str(arguments.model),
        "0" * 64,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        max_model_len=2048,
        kv_cache_tokens=32_768,
    )
    clocked = Clocked(engine)
    engine.start(clocked.take)
    try:
        yield clocked
    finally:
        engine.shutdown()


def adapter_uses(directory: Path | None) -> list[tuple[AdapterUse, ...]]:
    if directory is None:
        return [()]
    paths = sorted(path for path in directory.iterdir() if (path / "adapter_config.json").is_file())
    return [(AdapterUse(adapter_manifest(path).digest, str(path), WEIGHT_ONE),) for path in paths]


def show(median: dict[str, float]) -> None:
    table = Table("measure", "value", "wanted", title=f"{STREAMS} streams, a prompt of {LONG_PROMPT} tokens")
    table.add_row("token gap, median, without it", f"{median['gap_median_ms']:.1f} ms", "")
    table.add_row("token gap, p99, with it", f"{median['gap_p99_with_ms']:.1f} ms", "")
    table.add_row("  ratio", f"{median['gap_ratio']:.2f}", "at most 2.5")
    table.add_row("its first token, alone", f"{median['ttft_alone_ms']:.0f} ms", "")
    table.add_row("its first token, among streams", f"{median['ttft_with_ms']:.0f} ms", "")
    table.add_row("  ratio", f"{median['ttft_ratio']:.2f}", "at most 2")
    table.add_row("first token, a new prefix of 512", f"{median['ttft_first_ms']:.0f} ms", "")
    table.add_row("first token, the same prefix again", f"{median['ttft_second_ms']:.0f} ms", "")
    table.add_row("  ratio", f"{median['prefix_ratio']:.2f}", "at most 0.25")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, help="a directory of PEFT adapter directories; none: the base model")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--json", type=Path, help="append the lines to this file, too")
    arguments = parser.parse_args()
    uses = adapter_uses(arguments.adapters)
    results = []
    with running(arguments) as clocked:
        for adapters in uses:  # everything is loaded and warm
            clocked.first_token(clocked.prompt(64), adapters)
        for _ in range(arguments.repetitions):
            results.append(long_prompt(clocked, uses) | shared_prefix(clocked, uses[0]))
            print(json.dumps(results[-1]), flush=True)
    median = {name: statistics.median(result[name] for result in results) for name in results[0]}
    summary = {"median_of": len(results), "threads": arguments.threads, **median}
    print(json.dumps(summary))
    if arguments.json is not None:
        with arguments.json.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in [*results, summary])
    show(median)


if __name__ == "__main__":
    main()
