"""Many adapters, few resident: what that costs in rate, stalls and time to first token; the engine in this process.

    python benchmarks/make_shape.py --out var/demo_shape --hidden 256 --layers 4 --heads 4 --kv-heads 2 --mlp 1152 \
        --vocab 1408 --dtype float32 --adapters
    python benchmarks/residency.py scale --model var/demo_shape/model --work var/residency
    python benchmarks/residency.py stall --model var/shape/model --work var/residency
    python benchmarks/residency.py first-token --model var/shape/model --work var/residency
    python benchmarks/residency.py crowd --model var/shape/model --work var/residency

`scale`: requests for Zipf-distributed adapters, few of them resident, against the same requests with all resident.
`stall`: streams decode while cold adapters are used, one after the other, against the same with those resident.
`first-token`: by where the adapter was; over HTTP it comes from a server on loopback that sends 100 MB/s, through the
fetcher process, before the engine gets the request, as in the server. `crowd`: more distinct adapters at once than
slots. Adapters are made in `--work` once. One JSON line a run, then a table. Files leave the page cache before a cold
adapter is used from disk.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from remote_adapters import remote_adapters
from residency_traffic import Told, Watched, adapters_of, drop_from_page_cache, prompts, running, use_of
from rich.console import Console
from rich.table import Table

from openlora.engine.api import AdapterUse
from openlora.engine.kernels.pages import occupied

RANKS = (8, 16, 24, 32, 48, 64)  # of the adapters of `scale`, in turn
PROMPT, NEW_TOKENS = 16, 32  # tokens of a request of `scale` and `crowd`
STREAMS = 8
COLD_RANK, COLD_PROMPT, COLD_NEW_TOKENS = 16, 16, 4
INTERVAL_SECONDS = 0.3  # between the adapters of `stall`
NETWORK_MB_PER_S = 100.0  # of the source of `first-token`
COUNTED = ("hits_device", "hits_host", "hits_disk", "loads", "evictions_device", "evictions_host", "read_seconds")
STANDING = ("slots_filled", "host_adapters", "host_bytes", "host_limit_bytes")

Lines = list[dict[str, Any]]


def percentile(values: Sequence[float], share: float) -> float:
    """In milliseconds, of seconds."""
    return 1000 * float(np.percentile(values, share))


def median(lines: Lines, name: str, **case: str) -> float:
    """Of the lines of a case."""
    return statistics.median(line[name] for line in lines if line.items() >= case.items())


def note(lines: Lines, line: dict[str, Any]) -> None:
    lines.append(line)
    print(json.dumps(line), flush=True)


def scale(options: argparse.Namespace, console: Console) -> tuple[Lines, Table]:
    paths = adapters_of(options, [RANKS[number % len(RANKS)] for number in range(options.adapters)], console)
    paths = random.Random("popularity").sample(paths, len(paths))  # ranks and popularity have nothing to do with it
    lines: Lines = []
    for repetition in range(options.repetitions):
        for case in ("all resident", "limited")[:: -1 if repetition % 2 else 1]:
            note(lines, {"case": case, "repetition": repetition} | _zipf(options, paths, case == "all resident"))
    table = Table("", "tokens/s", "errors", "hits: device / host / disk", "in slots, on the host", "host MB")
    for line in lines:
        table.add_row(
            line["case"],
            f"{line['tokens_per_s']:.0f}",
            str(line["errors"]),
            f"{line['hits_device']} / {line['hits_host']} / {line['hits_disk']}",
            f"{line['slots_filled']}, {line['host_adapters']}",
            f"{line['host_bytes'] / 1e6:.0f} of {line['host_limit_bytes'] / 1e6:.0f}",
        )
    limited, resident = (median(lines, "tokens_per_s", case=case) for case in ("limited", "all resident"))
    table.add_row("ratio", f"{limited / resident:.3f}", "wanted: 0.7")
    return lines, table


def _zipf(options: argparse.Namespace, paths: list[Path], everything: bool) -> dict[str, Any]:
    """The k-th most popular adapter is asked for with probability ∝ 1/k."""
    drop_from_page_cache(paths)
    uses = [use_of(path) for path in paths]
    mean = sum(occupied((path / "adapter_model.safetensors").stat().st_size) for path in paths) // len(paths)
    settings = {"max_adapters": options.slots, "host_adapter_bytes": mean * options.host}
    if everything:
        settings = {"max_adapters": len(uses), "host_adapter_bytes": 2 * mean * len(uses)}
    weights = [1 / (place + 1) for place in range(len(uses))]
    with running(options, max_batch=options.concurrency, **settings) as watched:
        words = prompts(watched.engine, "scale", PROMPT)
        chosen = random.Random("zipf").choices(uses, weights, k=options.warmup + options.requests)
        traffic = [(next(words), use) for use in chosen]
        if everything:
            for use in uses:
                watched.ask(next(words), use, 1)
        _closed_loop(watched, traffic[: options.warmup], options.concurrency)
        before, began = watched.engine.stats().adapters, time.perf_counter()
        told = _closed_loop(watched, traffic[options.warmup :], options.concurrency)
        elapsed, after = time.perf_counter() - began, watched.engine.stats().adapters
        first = [one.times[0] - one.submitted for one in told if one.times]
        return {
            "tokens_per_s": sum(len(one.ids) for one in told) / elapsed,
            "errors": len(watched.errors),
            "ttft_p50_ms": percentile(first, 50),
            "ttft_p99_ms": percentile(first, 99),
            **{name: getattr(after, name) - getattr(before, name) for name in COUNTED},
            **{name: getattr(after, name) for name in STANDING},
        }


def _closed_loop(watched: Watched, traffic: list[tuple[list[int], AdapterUse]], concurrency: int) -> list[Told]:
    """All of the traffic, `concurrency` requests at any time."""
    waiting, told = iter(traffic), []

    def next_one() -> None:
        for prompt, use in itertools.islice(waiting, 1):
            told.append(watched.submit(prompt, use, NEW_TOKENS))

    watched.on_end = next_one
    for _ in range(concurrency):
        next_one()
    watched.wait(lambda: len(told) == len(traffic) and all(one.ended for one in told))
    watched.on_end = lambda: None
    return told


def stall(options: argparse.Namespace, console: Console) -> tuple[Lines, Table]:
    paths = adapters_of(options, [COLD_RANK] * (STREAMS + options.cold), console)
    own, others = paths[:STREAMS], paths[STREAMS:]
    size = (own[0] / "adapter_model.safetensors").stat().st_size
    lines: Lines = []
    # Room for few more than the resident ones, so that cold adapters push each other out of both tiers.
    with running(options, max_adapters=len(paths) + 4, host_adapter_bytes=(len(paths) + 16) * size * 5 // 4) as watched:
        words = prompts(watched.engine, "stall", COLD_PROMPT)
        resident = [use_of(path, pinned=True) for path in others]
        for use in resident:
            watched.ask(next(words), use, 1)
        for repetition in range(options.repetitions):
            for case in ("resident", "cold")[:: -1 if repetition % 2 else 1]:
                cold = [use_of(path, repetition) for path in others]
                drop_from_page_cache(others)
                found = _streams_beside(watched, own, resident if case == "resident" else cold, words)
                note(lines, {"case": case, "repetition": repetition} | found)
    table = Table("", "between tokens, p50", "p99", "max", "the adapter's first token, p50", "p99")
    names = ("gap_p50_ms", "gap_p99_ms", "gap_max_ms", "ttft_p50_ms", "ttft_p99_ms")
    medians = {case: [median(lines, name, case=case) for name in names] for case in ("resident", "cold")}
    for case, values in medians.items():
        table.add_row(case, *(f"{value:.1f} ms" for value in values))
    ratios = [cold / resident for cold, resident in zip(medians["cold"], medians["resident"], strict=True)]
    table.add_row("ratio", *(f"{ratio:.3f}" for ratio in ratios))
    table.add_row("wanted", "1.05", "1.5")
    return lines, table


def _streams_beside(
    watched: Watched, own: list[Path], others: list[AdapterUse], words: Iterator[list[int]]
) -> dict[str, Any]:
    """Streams that decode for as long as the other adapters are used, one each interval."""
    before = watched.engine.stats().adapters
    streams = [watched.submit(next(words), use_of(path, pinned=True), 960) for path in own]
    watched.wait(lambda: all(len(told.times) >= 16 for told in streams))
    told, began = [], time.perf_counter()
    for number, use in enumerate(others):
        time.sleep(max(0.0, began + number * INTERVAL_SECONDS - time.perf_counter()))
        told.append(watched.submit(next(words), use, COLD_NEW_TOKENS))
    watched.wait(lambda: all(one.ended for one in told))
    ended, after = time.perf_counter(), watched.engine.stats().adapters
    if any(one.ended for one in streams):
        raise RuntimeError("the streams ended before all adapters were used: fewer --cold are right")
    for name, one in watched.requests.items():
        if not one.ended:
            watched.engine.cancel(name)
    watched.wait(lambda: all(one.ended for one in streams))
    gaps = [
        later - earlier for one in streams for earlier, later in itertools.pairwise(one.times) if began < later <= ended
    ]
    first = [one.times[0] - one.submitted for one in told]
    return {
        "gap_p50_ms": percentile(gaps, 50),
        "gap_p99_ms": percentile(gaps, 99),
        "gap_max_ms": percentile(gaps, 100),
        "gaps": len(gaps),
        "ttft_p50_ms": percentile(first, 50),
        "ttft_p99_ms": percentile(first, 99),
        "errors": len(watched.errors),
        **{name: getattr(after, name) - getattr(before, name) for name in COUNTED},
    }


def first_token(options: argparse.Namespace, console: Console) -> tuple[Lines, Table]:
    paths = adapters_of(options, [COLD_RANK] * options.cold, console)
    lines: Lines = []
    with (
        running(options, max_adapters=4, host_adapter_bytes=4 << 30) as watched,
        remote_adapters(options.model, options.work, NETWORK_MB_PER_S) as remote,
    ):
        words = prompts(watched.engine, "first-token", COLD_PROMPT)

        def seconds(use: AdapterUse, fetch: Callable[[AdapterUse], None] = lambda use: None) -> float:
            began = time.perf_counter()
            fetch(use)
            return watched.ask(next(words), use, 1).times[0] - began

        for repetition in range(options.repetitions):
            elsewhere = remote.add([use_of(path, f"{repetition}-http") for path in paths])
            over_http = [seconds(use, remote.fetch) for use in elsewhere]
            uses = [use_of(path, repetition) for path in paths]
            drop_from_page_cache(paths)  # the same files, which were served and hashed just now
            found = {
                "cold (HTTP)": over_http,
                "cold (disk)": [seconds(use) for use in uses],
                "warm (host)": [seconds(use) for use in uses],  # long since pushed out of its slot
                "warm (device slot)": [(seconds(use), seconds(use))[1] for use in uses],
            }
            for place, values in found.items():
                line = {"adapter": place, "repetition": repetition, "requests": len(values)}
                note(lines, line | {"ttft_p50_ms": percentile(values, 50), "ttft_p99_ms": percentile(values, 99)})
        size = watched.engine.stats().adapters
    title = f"rank {COLD_RANK} ({size.host_bytes / size.host_adapters / 1e6:.1f} MB), prompt of {COLD_PROMPT} tokens"
    table = Table("adapter", "first token, p50", "p99", title=title)
    for place in ("warm (device slot)", "warm (host)", "cold (disk)", "cold (HTTP)"):
        values = [median(lines, name, adapter=place) for name in ("ttft_p50_ms", "ttft_p99_ms")]
        table.add_row(place, *(f"{value:.1f} ms" for value in values))
    return lines, table


def crowd(options: argparse.Namespace, console: Console) -> tuple[Lines, Table]:
    paths = adapters_of(options, [COLD_RANK] * 40, console)
    lines: Lines = []
    with running(options, max_adapters=8, dtype="float32") as watched:
        words = prompts(watched.engine, "crowd", PROMPT)
        asked = [(next(words), use_of(path)) for path in paths]
        together = [watched.submit(prompt, use, NEW_TOKENS) for prompt, use in asked]
        watched.wait(lambda: all(told.ended for told in together))
        alone = [watched.ask(prompt, use, NEW_TOKENS) for prompt, use in asked]
        line = {
            "adapters": len(paths),
            "slots": 8,
            "errors": len(watched.errors),
            "equal_to_alone": sum(one.ids == other.ids for one, other in zip(together, alone, strict=True)),
            "longest_first_token_s": max(told.times[0] - told.submitted for told in together),
            "all_done_s": max(told.times[-1] for told in together) - together[0].submitted,
        }
        note(lines, line)
    table = Table("adapters at once", "slots", "errors", "equal to alone", "longest first token", "all done")
    table.add_row(
        str(line["adapters"]),
        str(line["slots"]),
        str(line["errors"]),
        str(line["equal_to_alone"]),
        f"{line['longest_first_token_s']:.2f} s",
        f"{line['all_done_s']:.2f} s",
    )
    return lines, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measures = {"scale": scale, "stall": stall, "first-token": first_token, "crowd": crowd}
    parser.add_argument("measure", choices=measures)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where adapters are made, and found the next time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--adapters", type=int, default=1000, help="of `scale`")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--host", type=int, default=200, help="adapters of mean size that the host limit is for")
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--warmup", type=int, default=500)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--cold", type=int, default=50, help="adapters of `stall` and `first-token`")
    parser.add_argument("--json", type=Path, help="append the lines to this file, too")
    options = parser.parse_args()
    console = Console(stderr=True)
    lines, table = measures[options.measure](options, console)
    if options.json is not None:
        with options.json.open("a") as file:
            file.writelines(json.dumps({"measure": options.measure} | line) + "\n" for line in lines)
    Console().print(table)


if __name__ == "__main__":
    main()
