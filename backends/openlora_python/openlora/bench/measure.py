"""Named workloads in turns over one engine."""

from __future__ import annotations

import os
import random
import resource
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors import safe_open

from ..engine.torch_engine import TorchEngine
from ..errors import InvalidArgument
from .machine import resident_bytes, this_machine
from .popularity import POPULARITIES
from .report import BenchSettings, Report, rates_of
from .runner import Batch, Runner

BLOCK_SIZE = 16  # tokens
SHORTEST_CONTEXT = 64  # the engine checks itself with some tokens, however few are asked of it
_SERVER_BATCH, _SERVER_STEP_TOKENS, _SERVER_ADAPTERS, _SERVER_WAITING = 64, 512, 64, 1024  # with nothing set


@dataclass(frozen=True)
class Workload:
    """What is asked of `measure`. `adapters` are directories, the first one the most popular."""

    model: Path
    adapters: list[Path]
    popularities: list[str]
    batch: int
    prompt_len: int
    new_tokens: int
    repeat: int
    warmup: int
    seed: int
    load_adapters: bool
    dtype: str
    quantization: str
    threads: int | None


@dataclass(frozen=True)
class _Turn:
    """One batch to be run: the seed of its prompts, and an adapter (or None) for each of them."""

    seed: str
    adapters: list[Path | None]


def measure(workload: Workload, notes: Console) -> list[Report]:
    """Run every popularity `warmup` + `repeat` times, in turns; one report each, in the order given.

    All adapters that any of the batches asks for are resident before the first one is timed, so "base" alone runs in
    an engine without adapters, and beside others in one that has theirs.

    Raises:
        InvalidArgument: a workload needs adapters and there are none, or the engine refused a setting.
    """
    if not workload.adapters:
        needs = [f"popularity {name}" for name in workload.popularities if name != "base"]
        needs += ["--load-adapters"] if workload.load_adapters else []
        if needs:
            raise InvalidArgument(f"{needs[0]} needs some, a directory of adapters is right", field="adapters")
    if workload.threads is not None:
        torch.set_num_threads(workload.threads)
    turns = {name: _turns(workload, name) for name in workload.popularities}
    asked = {adapter for series in turns.values() for turn in series for adapter in turn.adapters if adapter}
    resident = workload.adapters if workload.load_adapters else sorted(asked)
    with notes.status("loading the model …"):
        runner = Runner(_engine(workload, len(resident)), BLOCK_SIZE)
    try:
        with notes.status(f"loading {len(resident)} adapters …"):
            growth = _load(workload, runner, resident)
        batches: dict[str, list[Batch]] = {name: [] for name in turns}
        with Progress(console=notes, transient=True) as progress:
            task = progress.add_task("measuring", total=(workload.warmup + workload.repeat) * len(turns))
            for number in range(workload.warmup + workload.repeat):
                for name, series in turns.items():
                    batch = _run(workload, runner, series[number])
                    if number >= workload.warmup:
                        batches[name].append(batch)
                    progress.advance(task)
        return [_report(workload, runner, name, turns[name], batches[name], growth) for name in turns]
    finally:
        runner.close()


def _turns(workload: Workload, popularity: str) -> list[_Turn]:
    turns = []
    for number in range(workload.warmup + workload.repeat):
        seed = f"{workload.seed} {popularity} {number}"
        chosen = POPULARITIES[popularity](workload.batch, len(workload.adapters), random.Random(seed))
        turns.append(_Turn(seed, [None if index is None else workload.adapters[index] for index in chosen]))
    return turns


def _engine(workload: Workload, adapters: int) -> TorchEngine:
    return TorchEngine(
        str(workload.model),
        "0" * 64,  # names the base model in receipts; there are none here
        dtype=workload.dtype,
        quantization=workload.quantization,
        max_model_len=max(workload.prompt_len + workload.new_tokens, SHORTEST_CONTEXT),
        max_batch=max(workload.batch, _SERVER_BATCH),
        max_step_tokens=max(workload.batch, _SERVER_STEP_TOKENS),
        block_size=BLOCK_SIZE,
        max_adapters=max(adapters, _SERVER_ADAPTERS),
        max_waiting=max(workload.batch, adapters, _SERVER_WAITING),
    )


def _load(workload: Workload, runner: Runner, adapters: list[Path]) -> int | None:
    """Make adapters resident; what one costs in resident memory, in bytes."""
    # First a batch without them, so that what the engine allocates on first use is not counted as theirs.
    _run(workload, runner, _Turn(f"{workload.seed} load", [None] * workload.batch))
    before = resident_bytes()
    runner.load(adapters)
    return (resident_bytes() - before) // len(adapters) if adapters else None


def _run(workload: Workload, runner: Runner, turn: _Turn) -> Batch:
    """One batch with prompts that no batch before it had: nothing of them is in the prefix cache."""
    draw, vocabulary = random.Random(turn.seed), range(runner.engine.info.vocab_size)
    prompts = [draw.choices(vocabulary, k=workload.prompt_len) for _ in turn.adapters]
    return runner.run(prompts, turn.adapters, workload.new_tokens)


def _report(
    workload: Workload, runner: Runner, name: str, turns: list[_Turn], batches: list[Batch], growth: int | None
) -> Report:
    info = runner.engine.info
    asked = [{adapter for adapter in turn.adapters if adapter is not None} for turn in turns]
    weights = [weight_bytes(adapter, info.dtype) for adapter in sorted(set().union(*asked))]
    settings = BenchSettings(
        model=str(workload.model),
        popularity=name,
        batch=workload.batch,
        prompt_len=workload.prompt_len,
        new_tokens=workload.new_tokens,
        repeat=workload.repeat,
        warmup=workload.warmup,
        seed=workload.seed,
        load_adapters=workload.load_adapters,
        dtype=info.dtype,
        quantization=info.quantization,
        device=info.device,
        threads=torch.get_num_threads(),
        omp_wait_policy=os.environ.get("OMP_WAIT_POLICY"),
    )
    return Report(
        **vars(rates_of(batches)),
        settings=settings,
        machine=this_machine(),
        distinct_adapters=max(map(len, asked[workload.warmup :])),
        adapters_loaded=runner.engine.stats().adapters_loaded,
        adapter_weight_bytes=sum(weights) // len(weights) if weights else None,
        adapter_resident_bytes=growth,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def weight_bytes(adapter: Path, dtype: str) -> int:
    """The A and B matrices of a PEFT adapter, held in `dtype`."""
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        numbers = sum(torch.Size(file.get_slice(key).get_shape()).numel() for key in file.keys())  # noqa: SIM118
    return numbers * getattr(torch, dtype).itemsize
