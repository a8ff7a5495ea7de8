"""INT8 beside bfloat16: speed, memory, time to start, and what it does to answers.

    python benchmarks/quantization.py --model DIR [--demo var/demo] [--json FILE]

`make_shape.py` makes DIR. One engine of each kind is loaded, each in a process of its own, and stopped (SIGSTOP) while
the others run; a round gives every job to all three, one after the other. A decode rate is that of a batch beyond one
that ends with its first tokens. One JSON line for each kind, then a table; ratios are to `none` in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from held_out import Judgement, held_out_texts, judge
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoConfig

from openlora.bench.machine import Machine, this_machine
from openlora.engine.kernels.build import compile_kernels
from openlora.engine.quantization import MODES

PEERS = Path(__file__).resolve().parent / "peers"
sys.path.append(str(PEERS))  # as its own scripts have it

from protocol import Job, Settings  # noqa: E402
from worker_process import Worker  # noqa: E402

NEW_TOKENS = 32
_MIB = 1 << 20


@dataclass(frozen=True)
class Work:
    """What is timed: `requests` prompts of `prompt_len` tokens at once."""

    requests: int
    prompt_len: int
    new_tokens: int


WORKS = {
    "batch 16": Work(16, 32, NEW_TOKENS),
    "batch 16, first tokens": Work(16, 32, 1),
    "batch 1": Work(1, 32, NEW_TOKENS),
    "batch 1, first token": Work(1, 32, 1),
    "prompt": Work(1, 512, 1),
}


@dataclass(frozen=True)
class Row:
    """One kind of engine. Rates are tokens per second, medians over the rounds."""

    quantization: str
    model: str
    batch_16: float  # new tokens over wall time, prefill included
    decode_16: float
    decode_1: float
    prefill_512: float  # prompt tokens
    memory_bytes: int  # of the process, after the first batches
    first_start_s: float  # of the engine: load, quantize, check
    next_start_s: float  # with what the first one kept
    perplexity: float  # of the demo's held-out answers
    perplexity_with_prompts: float
    greedy_agreement: float  # with `none`, at every position of the held-out text
    kernels_compiled_s: float  # once for all kinds, by the set-up
    rounds: int
    machine: Machine


def start(quantization: str, model: Path, kept: Path, threads: int) -> Worker:
    settings = Settings(
        model=str(model),
        adapters=[],
        batch=16,
        tokens=512 + NEW_TOKENS,
        max_rank=0,
        threads=threads,
        options={"quantization": quantization, "quantized_dir": str(kept)},
    )
    as_served = {"GOMP_SPINCOUNT": "1000"}
    log = kept / f"{quantization}.log"
    return Worker(Path(sys.executable), PEERS / "worker_openlora.py", settings, as_served, log)


def measure(workers: Mapping[str, Worker], model: Path, rounds: int, console: Console) -> dict[str, dict[str, float]]:
    """Median seconds by kind and work; a round before the first does not count."""
    vocabulary = range(AutoConfig.from_pretrained(model).vocab_size)
    seconds: dict[str, dict[str, list[float]]] = {name: {work: [] for work in WORKS} for name in workers}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=(rounds + 1) * len(WORKS))
        for number in range(rounds + 1):
            for name, work in WORKS.items():
                draw = random.Random(f"{name} {number}")
                prompts = [draw.choices(vocabulary, k=work.prompt_len) for _ in range(work.requests)]
                for quantization, worker in workers.items():
                    run = worker.run(Job(prompts, [None] * work.requests, work.new_tokens))
                    if number:
                        seconds[quantization][name].append(run.result.seconds)
                progress.advance(task)
    return {
        quantization: {name: statistics.median(taken) for name, taken in by_work.items()}
        for quantization, by_work in seconds.items()
    }


def table_of(rows: list[Row]) -> Table:
    base = rows[0]
    table = Table(
        title=f"{base.model} ({base.machine.cpu}, {base.machine.cores} cores; medians of {base.rounds})",
        caption=f"kernels compiled once, at set-up: {base.kernels_compiled_s:.0f} s",
    )
    table.add_column("")
    for row in rows:
        table.add_column(row.quantization, justify="right")
    rates = {
        "decode tokens/s, batch 16": "decode_16",
        "decode tokens/s, batch 1": "decode_1",
        "prefill tokens/s, 512 tokens": "prefill_512",
        "tokens/s, batch 16, 32 + 32": "batch_16",
    }
    for title, name in rates.items():
        table.add_row(
            title, *(f"{getattr(row, name):.0f} ({getattr(row, name) / getattr(base, name):.2f}x)" for row in rows)
        )
    table.add_row("memory, MiB", *(f"{row.memory_bytes / _MIB:.0f}" for row in rows))
    table.add_row("first start, s", *(f"{row.first_start_s:.1f}" for row in rows))
    table.add_row("next starts, s", *(f"{row.next_start_s:.1f}" for row in rows))
    for title, name in (("answers", "perplexity"), ("prompts and answers", "perplexity_with_prompts")):
        table.add_row(
            f"perplexity, {title}",
            *(
                f"{getattr(row, name):.4f} ({100 * (getattr(row, name) / getattr(base, name) - 1):+.3f} %)"
                for row in rows
            ),
        )
    table.add_row("greedy agreement", *(f"{100 * row.greedy_agreement:.2f} %" for row in rows))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a model in bfloat16, that of make_shape.py")
    parser.add_argument("--demo", type=Path, default=Path("var/demo"), help="made by build_scripts/make_demo.py")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="append the lines here")
    options = parser.parse_args()
    notes = Console(stderr=True)
    with notes.status("compiling the kernels …"):
        began = time.perf_counter()
        compile_kernels()
        compiled = time.perf_counter() - began
    with notes.status("reading held-out text …"):
        texts = held_out_texts(options.demo)
        judgements: dict[str, Judgement] = {
            mode: judge(str(options.demo / "model"), "bfloat16", mode, texts) for mode in MODES
        }
    with tempfile.TemporaryDirectory() as root:
        workers: dict[str, Worker] = {}
        first: dict[str, float] = {}
        try:
            for mode in MODES:
                kept = Path(root, mode)
                kept.mkdir()
                with notes.status(f"starting {mode} twice …"):
                    worker = start(mode, options.model, kept, options.threads)
                    first[mode] = worker.facts["start_seconds"]
                    worker.close()
                    workers[mode] = start(mode, options.model, kept, options.threads)
            seconds = measure(workers, options.model, options.rounds, notes)
            memory = {mode: worker.memory_bytes() for mode, worker in workers.items()}
        finally:
            for worker in workers.values():
                worker.close()
        rows = [
            Row(
                quantization=mode,
                model=str(options.model),
                batch_16=16 * NEW_TOKENS / taken["batch 16"],
                decode_16=16 * (NEW_TOKENS - 1) / (taken["batch 16"] - taken["batch 16, first tokens"]),
                decode_1=(NEW_TOKENS - 1) / (taken["batch 1"] - taken["batch 1, first token"]),
                prefill_512=512 / taken["prompt"],
                memory_bytes=memory[mode],
                first_start_s=first[mode],
                next_start_s=workers[mode].facts["start_seconds"],
                perplexity=judgements[mode].answers,
                perplexity_with_prompts=judgements[mode].everything,
                greedy_agreement=judgements[mode].agreement(judgements["none"]),
                kernels_compiled_s=compiled,
                rounds=options.rounds,
                machine=this_machine(),
            )
            for mode, taken in seconds.items()
        ]
    console = Console()
    for row in rows:
        line = json.dumps(asdict(row))
        console.print(line, soft_wrap=True, highlight=False)
        if options.json is not None:
            with options.json.open("a") as file:
                file.write(line + "\n")
    console.print(table_of(rows))


if __name__ == "__main__":
    main()
