"""What a client sees of a running server: tokens per second, time to first token, time between tokens.

    python benchmarks/serving.py [--url localhost:8001] [--json FILE]

One JSON line a run (base, one adapter, all adapters mixed, two-adapter ensembles), then a table. Streams over gRPC,
greedy, EOS ignored, so that every answer has the same length.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from openlora_client import Adapters, AsyncOpenLoRAClient

PROMPT = "Tell me about the cat."


@dataclass(frozen=True)
class Timing:
    """One answer, in seconds since it was asked for."""

    first: float
    gaps: list[float]
    tokens: int


@dataclass(frozen=True)
class Row:
    """One run, as it is written to the JSON file."""

    popularity: str
    concurrency: int
    requests: int
    new_tokens: int
    tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    inter_token_p50_ms: float
    inter_token_p99_ms: float
    machine: str
    cores: int


async def ask(client: AsyncOpenLoRAClient, adapters: Adapters, new_tokens: int) -> Timing:
    began = time.perf_counter()
    times, tokens = [], 0
    async for chunk in client.stream(PROMPT, adapters, max_tokens=new_tokens, temperature=0, ignore_eos=True):
        times.append(time.perf_counter() - began)
        tokens += len(chunk.token_ids)
    return Timing(times[0], [later - earlier for earlier, later in itertools.pairwise(times)], tokens)


async def run(url: str, popularity: str, mix: Sequence[Adapters], concurrency: int, requests: int, tokens: int) -> Row:
    """Keep `concurrency` requests going until `requests` are answered."""
    limit = asyncio.Semaphore(concurrency)
    async with AsyncOpenLoRAClient(url) as client:

        async def one(number: int) -> Timing:
            async with limit:
                return await ask(client, mix[number % len(mix)], tokens)

        await asyncio.gather(*(one(number) for number in range(concurrency)))  # adapters loaded, pages touched
        began = time.perf_counter()
        timings = await asyncio.gather(*(one(number) for number in range(requests)))
        seconds = time.perf_counter() - began
    firsts = [1000 * timing.first for timing in timings]
    gaps = [1000 * gap for timing in timings for gap in timing.gaps]
    return Row(
        popularity,
        concurrency,
        requests,
        tokens,
        round(sum(timing.tokens for timing in timings) / seconds, 1),
        round(statistics.median(firsts), 1),
        round(statistics.quantiles(firsts, n=100)[98], 1),
        round(statistics.median(gaps), 1),
        round(statistics.quantiles(gaps, n=100)[98], 1),
        platform.machine(),
        os.cpu_count() or 0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="localhost:8001")
    parser.add_argument("--adapters", type=Path, default=Path("var/demo/adapters"), help="names to ask for")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--json", type=Path, help="append the lines here")
    options = parser.parse_args()
    names = sorted(folder.name for folder in options.adapters.iterdir())
    pairs = [[(one, 0.6), (other, 0.6)] for one, other in itertools.pairwise(names)]
    mixes: dict[str, list[Adapters]] = {"base": [None], "identical": [names[0]], "distinct": list(names)}
    mixes |= {"ensembles of two": pairs}
    console = Console()
    rows = []
    plan = [(concurrency, name) for concurrency in options.concurrency for name in mixes]
    for concurrency, name in track(plan, "measuring", console=Console(stderr=True)):
        requests = options.requests if concurrency > 1 else max(8, options.requests // 8)
        rows.append(asyncio.run(run(options.url, name, mixes[name], concurrency, requests, options.new_tokens)))
        line = json.dumps(asdict(rows[-1]))
        console.print(line, soft_wrap=True, highlight=False)
        if options.json is not None:
            with options.json.open("a") as file:
                file.write(line + "\n")
    table = Table("adapters", "concurrency", "tokens/s", "TTFT p50 / p99 ms", "between tokens p50 / p99 ms")
    for row in rows:
        table.add_row(
            row.popularity,
            str(row.concurrency),
            f"{row.tokens_per_s:.0f}",
            f"{row.ttft_p50_ms:.0f} / {row.ttft_p99_ms:.0f}",
            f"{row.inter_token_p50_ms:.0f} / {row.inter_token_p99_ms:.0f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
