"""What ten thousand adapters cost: look-ups, a server's start over a directory it knows, the list, memory.

    python benchmarks/catalog.py [--adapters 10000] [--seconds 10] [--serve] [--work DIR] [--json FILE]

A tiny base model and real adapter folders are made, once ten and once all of them, with the state that a server leaves
which has read them (a sync that has to read one again ends this with an error). Look-ups and whole resolve steps are
asked at a fixed rate, first in quiet, then while another process adds versions at 20 a second; those that come first
after a change are also counted apart. CPU time is given beside wall time, which a busy machine spoils. `--serve` starts
real servers as well. One JSON line, then a table.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.numpy import save_file

from openlora.adapters.catalog import Catalog
from openlora.adapters.catalog_file import CATALOG_FILE
from openlora.adapters.catalog_reader import CatalogReader
from openlora.adapters.catalog_rows import AdapterRecord, BaseFacts
from openlora.adapters.ingest import sync_directory
from openlora.adapters.ingest_worker import CACHE_DIRECTORY
from openlora.adapters.manifest import CARD_FILE, SETTLED_NS, adapter_manifest, model_manifest
from openlora.adapters.store import AdapterStore, SourceDirectory, settled_state

FEW = 10
RATE = 500  # look-ups a second, a quarter of what is promised: 2 ms each
CHANGES = 20  # a second
REPEATS = 3
MAX_RANK = 128  # the server's default
HIDDEN, LAYERS = 64, 2
PORTS = ("http", "grpc", "metrics", "health", "gateway")
OWNER = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"
CARD = {
    "schema": 1,
    "owner": OWNER,
    "licence": "MIT",
    "description": "made to be counted",
    "prices": {"version": 1, "input": 100, "output": 200},
    "datasets": [
        {
            "id": f"set-{number}",
            "digest": f"{number:064x}",
            "licence": "CC-BY-4.0",
            "share_ppm": 500_000,
            "contributors": [{"name": "somebody", "address": OWNER, "share_ppm": 1_000_000}],
        }
        for number in range(2)
    ],
}
READER = """
import sys
from pathlib import Path
from openlora.adapters.catalog_reader import CatalogReader

def private():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024

before = private()
reader = CatalogReader(Path(sys.argv[1]))
for number in range(int(sys.argv[2])):
    reader.lookup(f"adapter-{number:05}")
print(private() - before)
"""


@dataclass(frozen=True)
class Call:
    seconds: float
    cpu_seconds: float  # of the calling thread


@dataclass(frozen=True)
class Times:
    """In milliseconds, over `count` calls."""

    count: int
    p50: float
    p99: float
    worst: float
    cpu_p99: float

    @classmethod
    def of(cls, calls: list[Call]) -> Times:
        seconds = sorted(call.seconds for call in calls)
        cpu = sorted(call.cpu_seconds for call in calls)
        p50, p99 = (-(-len(calls) * share // 100) - 1 for share in (50, 99))  # by nearest rank
        values = (seconds[p50], seconds[p99], seconds[-1], cpu[p99])
        return cls(len(calls), *(round(1000 * value, 3) for value in values))


@dataclass(frozen=True)
class Asked:
    """One kind of call, in quiet and beside a writer."""

    quiet: Times
    busy: Times
    after_a_change: Times  # those of `busy` that were the first to meet one


@dataclass(frozen=True)
class Size:
    """A server's state with so many adapters. Seconds are medians of `REPEATS`."""

    adapters: int
    sync_s: float  # when nothing has changed
    list_page_s: float  # `adapters list --limit 100`, process start included
    list_all_s: float  # `adapters list --json`
    reader_bytes: int  # what a reader adds to a process that looks up every name
    ready_s: float | None  # `openlora serve` to /readyz, nothing changed


@dataclass(frozen=True)
class Report:
    few: Size
    many: Size
    lookup: Asked  # CatalogReader.lookup
    resolve: Asked  # ResolverStep.resolve: parse, look up, terms, ticket
    cpu: str
    cores: int


class Node:
    """A state directory and its adapter folders."""

    def __init__(self, root: Path, base: BaseFacts, count: int) -> None:
        self.state, self.folder, self.base, self.count = root / "state", root / "adapters", base, count
        for number in track(range(count), f"making {count} folders", console=Console(stderr=True)):
            make_adapter(self.folder / f"adapter-{number:05}", number)
        time.sleep(SETTLED_NS / 1e9 + 0.1)  # a younger file's timestamps are not believed
        self._bring_in()

    def name(self) -> str:
        return f"adapter-{random.randrange(self.count):05}"

    def sync(self) -> float:
        begun = time.perf_counter()
        results = sync_directory(self.folder, self.state, self.base)
        seconds = time.perf_counter() - begun
        changed = [result for result in results if (result.status, result.change) != ("ready", "unchanged")]
        if changed or len(results) != self.count:
            raise SystemExit(f"{len(results)} of {self.count} adapters, {len(changed)} changed: {changed[:3]}")
        return seconds

    def _bring_in(self) -> None:
        """What the ingest process leaves, without its checks and its waits for the disk."""
        store = AdapterStore(self.state / CACHE_DIRECTORY)
        with Catalog(self.state / CATALOG_FILE) as catalog:
            catalog.set_base(self.base)
            catalog._connection.execute("PRAGMA synchronous = OFF")
            for folder in track(sorted(self.folder.iterdir()), "bringing them in", console=Console(stderr=True)):
                with SourceDirectory(folder) as source:
                    state = settled_state(source.state())
                digest = adapter_manifest(folder).digest
                shutil.copytree(folder, store.path(digest), ignore=shutil.ignore_patterns(CARD_FILE))
                found = AdapterRecord(folder.name, 0, digest, 1, "ready", "", CARD, ("q_proj",), self.base.digest)
                catalog.put(replace(found, source=str(folder), origin=str(self.folder.resolve()), source_state=state))

    def measure(self, serve: bool) -> Size:
        reader = [sys.executable, "-c", READER, str(self.state / CATALOG_FILE), str(self.count)]
        return Size(
            adapters=self.count,
            sync_s=round(statistics.median(self.sync() for _ in range(REPEATS)), 3),
            list_page_s=self._list("--limit", "100"),
            list_all_s=self._list("--json"),
            reader_bytes=int(subprocess.run(reader, check=True, capture_output=True).stdout),
            ready_s=round(statistics.median(self._ready() for _ in range(REPEATS)), 2) if serve else None,
        )

    def _list(self, *arguments: str) -> float:
        command = [sys.executable, "-m", "openlora.cli", "adapters", "list", *arguments]
        seconds = []
        for _ in range(REPEATS):
            begun = time.perf_counter()
            subprocess.run([*command, "--state-dir", str(self.state)], check=True, capture_output=True)
            seconds.append(time.perf_counter() - begun)
        return round(statistics.median(seconds), 3)

    def _ready(self) -> float:
        """`--detach` returns when the server is ready."""
        command = [sys.executable, "-m", "openlora.cli"]
        where = ["--state-dir", str(self.state)]
        given = ["--model", self.base.path, "--adapters", str(self.folder), "--detach", "--dtype", "float32"]
        ports = [f"--{name}-port={port}" for name, port in zip(PORTS, free_ports(len(PORTS)), strict=True)]
        begun = time.perf_counter()
        subprocess.run([*command, "serve", *given, *ports, *where], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - begun
        subprocess.run([*command, "stop", *where], check=True, stdout=subprocess.DEVNULL)
        return seconds


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, all different."""
    with ExitStack() as open_ones:
        sockets = [open_ones.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def make_adapter(folder: Path, seed: int) -> None:
    """Rank 1 on one projection, with a card: a real one, quickly made."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        module = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{module}.lora_A.weight"] = generator.standard_normal((1, HIDDEN), np.float32)
        tensors[f"{module}.lora_B.weight"] = generator.standard_normal((HIDDEN, 1), np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "openlora.json").write_text(json.dumps(CARD))


def make_base(directory: Path) -> BaseFacts:
    from make_shape import make_model  # torch, which nothing else here needs
    from torch import float32
    from transformers import LlamaConfig

    shape = {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256}
    make_model(directory, LlamaConfig(vocab_size=1024, **shape, **heads), float32, 0)
    return BaseFacts(str(directory), model_manifest(directory).digest, MAX_RANK)


def resolver(node: Node) -> Callable[[], object]:
    """A whole resolve step of a request for one adapter."""
    from openlora.config import RunConfig, load_settings
    from openlora.serving.base_model import read_base_model
    from openlora.serving.resolve import ResolverStep
    from openlora.serving.seal import write_run_key

    model = Path(node.base.path)
    run = RunConfig(
        settings=load_settings(model=model, state_dir=node.state),
        base=read_base_model(model, node.state / "digests.json", None),
        state_dir=node.state,
        socket_dir=node.state,
        shm_prefix="openlora_",
        launcher_pid=os.getpid(),
    )
    run.run_dir.mkdir(parents=True, exist_ok=True)
    write_run_key(run.run_key_path)
    step = ResolverStep(run)
    inputs = {"text_input": b"Tell me about the cat.", "max_tokens": 16}
    return lambda: step.resolve({**inputs, "adapters": node.name().encode()}, {}, "")


def asked(node: Node, call: Callable[[], object], seconds: float) -> Asked:
    for _ in range(100):
        call()
    quiet, _ = paced(node, call, seconds)
    this = [sys.executable, __file__, "--write", str(node.state), "--adapters", str(node.count)]
    with subprocess.Popen(this, stdout=subprocess.PIPE, text=True) as writer:
        writer.stdout.readline()  # the first change is made
        busy, after = paced(node, call, seconds)
        if writer.poll() is not None:
            raise SystemExit("the writer ended")
        writer.kill()
    return Asked(Times.of(quiet), Times.of(busy), Times.of(after))


def paced(node: Node, call: Callable[[], object], seconds: float) -> tuple[list[Call], list[Call]]:
    """What each call took, and the first call after each change."""
    every, after = [], []
    with closing(sqlite3.connect(node.state / CATALOG_FILE, isolation_level=None)) as watch:
        seen = watch.execute("PRAGMA data_version").fetchone()
        begun = time.perf_counter()
        for number in range(round(seconds * RATE)):
            time.sleep(max(0.0, begun + number / RATE - time.perf_counter()))
            before, seen = seen, watch.execute("PRAGMA data_version").fetchone()
            started, cpu_started = time.perf_counter(), time.thread_time()
            call()
            every.append(Call(time.perf_counter() - started, time.thread_time() - cpu_started))
            if seen != before:
                after.append(every[-1])
    return every, after


def write(state: Path, adapters: int) -> None:
    """Add versions of random names until killed."""
    with Catalog(state / CATALOG_FILE) as catalog:
        begun = time.perf_counter()
        for number in range(sys.maxsize):
            name = f"adapter-{random.randrange(adapters):05}"
            digest = f"{random.getrandbits(256):064x}"
            (state / CACHE_DIRECTORY / digest).mkdir()  # the resolver looks for its bytes
            catalog.put(AdapterRecord(name, 0, digest, 1, "ready", "", CARD, ("q_proj",), base=catalog.base().digest))
            if number == 0:
                print("writing", flush=True)
            time.sleep(max(0.0, begun + number / CHANGES - time.perf_counter()))


def report(adapters: int, seconds: float, serve: bool, work: Path) -> Report:
    from openlora.bench.machine import this_machine

    base = make_base(work / "model")
    few, many = (Node(work / str(count), base, count) for count in (FEW, adapters))
    sizes = [node.measure(serve) for node in (few, many)]
    with CatalogReader(many.state / CATALOG_FILE) as reader:
        lookup = asked(many, lambda: reader.lookup(many.name()), seconds)
    machine = this_machine()
    return Report(*sizes, lookup, asked(many, resolver(many), seconds), machine.cpu, machine.cores)


def table_of(found: Report) -> Table:
    table = Table("", title=f"Catalog; {found.cpu}, {found.cores} cores", box=None)
    sizes = (found.few, found.many)
    for size in sizes:
        table.add_column(f"{size.adapters} adapters", justify="right")
    for name, cell in {
        "sync, nothing changed, s": lambda size: f"{size.sync_s:.3f}",
        "server ready, s": lambda size: "" if size.ready_s is None else f"{size.ready_s:.2f}",
        "list --limit 100, s": lambda size: f"{size.list_page_s:.2f}",
        "list --json, s": lambda size: f"{size.list_all_s:.2f}",
        "a reader's memory, KiB": lambda size: f"{size.reader_bytes >> 10}",
    }.items():
        table.add_row(name, *map(cell, sizes))
    for name, kind in (("lookup", found.lookup), ("resolve", found.resolve)):
        for how, times in (("quiet", kind.quiet), ("busy", kind.busy), ("after a change", kind.after_a_change)):
            table.add_row(f"{name}, {how}: p50, p99 (CPU) ms", "", f"{times.p50}, {times.p99} ({times.cpu_p99})")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each of the four runs of look-ups")
    parser.add_argument("--serve", action="store_true", help="start real servers, too")
    parser.add_argument("--work", type=Path, help="an empty directory to work in; default: one that goes afterwards")
    parser.add_argument("--json", type=Path, help="append the line to this file")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)  # the other process
    given = parser.parse_args()
    if given.write is not None:
        write(given.write, given.adapters)
        return
    with tempfile.TemporaryDirectory(prefix="openlora-catalog-") as scratch:
        found = report(given.adapters, given.seconds, given.serve, given.work or Path(scratch))
    line = json.dumps(asdict(found))
    print(line)
    if given.json is not None:
        with given.json.open("a") as file:
            file.write(line + "\n")
    Console().print(table_of(found))


if __name__ == "__main__":
    main()
