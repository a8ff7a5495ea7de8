"""The same work through our engine and its peers, in turns: tokens per second, and the ratios between them.

    python benchmarks/peers/run.py [--json FILE] [--systems NAME …] [--workloads NAME …]

Every system is loaded once, as a process of its own, and stopped (SIGSTOP) while others run. A round gives every
workload to every system that does it, one after the other, with prompts that nobody has seen before. What can't be
installed or started here is named and left out. One JSON line a run; two tables for each group of systems.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import environments
import psutil
from comparison import Row, rates_table, ratios_of, ratios_table, series_of
from protocol import Job, Settings
from rich.console import Console
from rich.progress import Progress
from systems import CLAIMS, DECODE, GROUPS, OURS, WORKLOADS, Shape, System, Workload
from transformers import AutoConfig
from worker_process import Run, Worker, WorkerFailed

from openlora.bench.machine import this_machine

HERE = Path(__file__).resolve().parent
ATTEMPTS = 4  # at a run that others on the machine disturbed


@dataclass(frozen=True)
class Plan:
    """The work of every round."""

    shape: Shape
    batch: int
    prompt_len: int
    new_tokens: int
    repeat: int
    warmup: int
    seed: int
    threads: int
    quiet_share: float  # more than this taken by others, and a run is made again

    def job(self, workload: Workload, number: int) -> Job:
        """The same for every system: prompts follow from the seed, the workload and the round."""
        draw = random.Random(f"{self.seed} {workload.name} {number}")
        vocabulary = range(AutoConfig.from_pretrained(self.shape.model).vocab_size)
        prompts = [draw.choices(vocabulary, k=self.prompt_len) for _ in range(self.batch)]
        return Job(prompts, workload.adapters(self.shape, self.batch), 1 if workload.prefill else self.new_tokens)


def start(system: System, plan: Plan, root: Path, console: Console) -> Worker:
    """Load a system.

    Raises:
        EnvironmentMissing, WorkerFailed: why that isn't possible here.
    """
    python, variables = environments.project(), dict(system.variables)
    if system.environment == "vllm":
        directory = root / "vllm"
        python = environments.vllm(directory, console)
        variables |= environments.vllm_variables(directory)
    settings = Settings(
        model=plan.shape.model,
        adapters=[path for rank in system.ranks for path in plan.shape.adapters(rank)],
        batch=plan.batch,
        tokens=plan.prompt_len + plan.new_tokens,
        max_rank=max(system.ranks, default=0),
        threads=plan.threads,
        options=system.options,
    )
    log = root / "logs" / f"{system.name.replace(' ', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with console.status(f"starting {system.name} …"):
        worker = Worker(python, HERE / f"worker_{system.worker}.py", settings, variables, log)
    console.print(f"{system.name}: {worker.facts}", highlight=False, soft_wrap=True)
    return worker


def measure(
    workers: Mapping[str, Worker],
    systems: Sequence[System],
    workloads: Sequence[Workload],
    plan: Plan,
    console: Console,
) -> list[Row]:
    """`warmup` rounds that don't count, then `repeat` that do."""
    turns = [(workload, system) for workload in workloads for system in systems if workload in system.workloads]
    rows = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(turns) * (plan.warmup + plan.repeat))
        for number in range(-plan.warmup, plan.repeat):
            ours: dict[str, list[int]] = {}  # workload -> first tokens
            for workload, system in turns:
                progress.update(task, advance=1, description=f"{system.name}: {workload.name}")
                job = plan.job(workload, number)
                run = _undisturbed(workers[system.name], job, plan.quiet_share if number >= 0 else 1.0)
                firsts = [tokens[0] for tokens in run.result.tokens]
                if system.worker == "openlora":
                    ours.setdefault(workload.name, firsts)
                if number >= 0:
                    rows.append(_row(system, workload, number, job, run, ours.get(workload.name)))
    return rows


def _undisturbed(worker: Worker, job: Job, quiet_share: float) -> Run:
    """A run during which others took little of the machine, or the least disturbed one of a few."""
    runs: list[Run] = []
    while len(runs) < ATTEMPTS:
        runs.append(worker.run(job))
        if runs[-1].foreign_share <= quiet_share:
            break
    return min(runs, key=lambda run: run.foreign_share)


def _row(system: System, workload: Workload, number: int, job: Job, run: Run, ours: list[int] | None) -> Row:
    prompt_tokens = sum(map(len, job.prompts))
    new_tokens = sum(map(len, run.result.tokens))
    agreement = None
    if ours is not None:
        agreement = sum(a == b[0] for a, b in zip(ours, run.result.tokens, strict=True)) / len(ours)
    return Row(
        system=system.name,
        workload=workload.name,
        round=number,
        requests=len(job.prompts),
        tokens=prompt_tokens if workload.prefill else new_tokens,
        seconds=round(run.result.seconds, 5),
        foreign_share=round(run.foreign_share, 4),
        first_token_agreement=agreement,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("var/peers"), help="environments, logs, and the shape")
    parser.add_argument("--shape", type=Path, help="what make_shape.py made; default: ROOT/shape, made when missing")
    systems = [system.name for group in GROUPS for system in group]
    for kind, known in (("systems", systems), ("workloads", [workload.name for workload in WORKLOADS])):
        names = list(dict.fromkeys(known))
        parser.add_argument(
            f"--{kind}", nargs="+", choices=names, default=names, metavar="NAME", help="of: " + ", ".join(names)
        )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt-len", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False))
    parser.add_argument("--quiet-share", type=float, default=0.05,
                        help="run again when other processes took more than this share of the cores")  # fmt: skip
    parser.add_argument("--json", type=Path, help="append the lines here")
    return parser.parse_args()


def main() -> int:
    options, console = parse(), Console(stderr=True)
    shape = Shape(options.shape or options.root / "shape")
    if not (shape.root / "model" / "config.json").is_file():
        subprocess.run([sys.executable, HERE.parent / "make_shape.py", "--out", shape.root], check=True)
    plan = Plan(shape, options.batch, options.prompt_len, options.new_tokens, options.repeat, options.warmup,
                options.seed, options.threads, options.quiet_share)  # fmt: skip
    workloads = [workload for workload in WORKLOADS if workload.name in options.workloads]
    chosen = [
        [one for one in group if one.name in options.systems and {*one.workloads} & {*workloads}] for group in GROUPS
    ]
    missing: dict[str, str] = {}
    # Ours alone is worth no turns of its own, unless it is all that was asked for.
    for systems in [group for group in chosen if any(one.name != OURS for one in group)] or chosen[:1]:
        run_group(systems, workloads, plan, options, missing, console)
    for name, reason in missing.items():
        console.print(f"missing: {name}: {reason}", style="red", highlight=False, markup=False, soft_wrap=True)
    return 1 if OURS in missing else 0


def run_group(
    systems: Sequence[System], workloads: Sequence[Workload], plan: Plan, options: argparse.Namespace,
    missing: dict[str, str], console: Console,
) -> None:  # fmt: skip
    """Load the systems, run them in turns, report; those that can't be loaded go to `missing` with the reason."""
    workers: dict[str, Worker] = {}
    try:
        for system in systems:
            try:
                workers[system.name] = start(system, plan, options.root, console)
            except (environments.EnvironmentMissing, WorkerFailed) as error:
                missing[system.name] = str(error)
        running = [system for system in systems if system.name in workers]
        rows = measure(workers, running, workloads, plan, console)
        memory = {name: worker.memory_bytes() for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    report(rows, memory, workloads, plan, options.json, console)


def report(
    rows: Sequence[Row], memory: Mapping[str, int], workloads: Sequence[Workload], plan: Plan, json_file: Path | None,
    console: Console,
) -> None:  # fmt: skip
    about = {**asdict(plan), "shape": str(plan.shape.root), "machine": asdict(this_machine())}
    lines = [
        json.dumps(
            {**asdict(row), "tokens_per_s": round(row.tokens_per_s, 2), "memory_bytes": memory[row.system], **about}
        )
        for row in rows
    ]
    for line in lines:
        print(line)
    if json_file is not None:
        with json_file.open("a") as file:
            file.writelines(line + "\n" for line in lines)
    series = series_of(rows)
    console.print(rates_table(series, [*(workload.name for workload in workloads), DECODE.name], memory))
    console.print(ratios_table(ratios_of(series, CLAIMS)))
    disturbed = sum(row.foreign_share > plan.quiet_share for row in rows)
    if disturbed:
        console.print(f"{disturbed} of {len(rows)} runs had less than {1 - plan.quiet_share:.0%} of the machine")


if __name__ == "__main__":
    sys.exit(main())
