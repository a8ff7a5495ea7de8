"""What a receipt costs: journal, group commit, projection into the signed log; in this process, on the disk of
`--work`.

    python benchmarks/receipt_log.py --work var/receipts

`sustained`: requests as fast as they go, a bounded number at once; receipts a second, and CPU time for each of the
whole process (encode intent and completion, append, sync, read again, encode, hash, sign, SQLite). `open-loop`:
completions at a fixed rate, whoever is slow; the time from handing a completion over until it is durable in the
journal, and until its receipt is durable in the log: the latter is what an answer's last response waits for, and the
gate. Beside both the time of a raw `fdatasync` on the same disk just before. `document`: the CPU time to make the JSON
that the client gets. `tree`: a million receipts' tree from their hashes (the frontier for checkpoints, all of it for
proofs), and the time to verify a proof file under it. One JSON line a run, then a table of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from receipt_requests import Requests
from rich.console import Console
from rich.table import Table
from tree_and_proof import tree

from openlora.attribution.journal import STATUS_COMPLETE, IntentFrame, Journal
from openlora.attribution.log import ReceiptLog
from openlora.attribution.projection import Projector

AT_ONCE = 512  # requests under way in `sustained`
AHEAD = 200  # intents that are durable before their completion is due, in `open-loop`
RAW_SYNCS = 300
RAW_BYTES = 1100  # of a raw append, as a receipt's
GATES = {
    "receipts_per_s": (">=", 5000),
    "cpu_us": ("<=", 150),
    "logged_ms_p50": ("<=", 1),
    "logged_ms_p99": ("<=", 10),
    "frontier_s": ("<=", 3),
    "tree_s": ("<=", 3),
    "proof_ms": ("<=", 2),
}


def percentiles(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """In milliseconds."""
    p50, p99 = np.percentile(seconds, (50, 99)) * 1000
    return {f"{name}_ms_p50": round(float(p50), 3), f"{name}_ms_p99": round(float(p99), 3)}


def raw_sync(directory: Path) -> dict[str, float]:
    """Appends of a receipt's size, each with an `fdatasync`, in a file of their own."""
    taken = []
    with open(directory / "raw", "ab", buffering=0) as file:
        for _ in range(RAW_SYNCS):
            begun = time.perf_counter()
            file.write(bytes(RAW_BYTES))
            os.fdatasync(file.fileno())
            taken.append(time.perf_counter() - begun)
    (directory / "raw").unlink()
    return percentiles("fdatasync", taken)


@dataclass
class Site:
    """A journal and a log, and a thread that projects as the attribution step does: woken, in batches."""

    state: Path
    on_logged: Callable[[range], None] = lambda new: None
    errors: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.journal = Journal.open(self.state / "journal")
        self.log = ReceiptLog.open(self.state)
        self._projector = Projector(self.state / "journal", self.log)
        self._durable: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._project, name="receipts")
        self._thread.start()

    def start(self, intent: IntentFrame, on_durable: Callable[[], None]) -> None:
        self.journal.append([intent], on_durable, self.errors.append)

    def complete(self, intent: IntentFrame, on_durable: Callable[[int], None]) -> None:
        def durable(seq: int) -> None:
            on_durable(seq)
            self._durable.put(seq)

        commit, now = intent.prompt_commit, int(time.time())
        self.journal.append_completion(intent.request_id, STATUS_COMPLETE, 50, commit, now, durable, self.errors.append)

    def close(self) -> None:
        self.journal.close()
        self._durable.put(None)
        self._thread.join()
        self.log.close()
        if self.errors:
            raise self.errors[0]

    def _project(self) -> None:
        going = True
        while going:
            entry = self._durable.get()
            while True:
                going = going and entry is not None
                try:
                    entry = self._durable.get_nowait()
                except queue.Empty:
                    break
            while new := self._projector.project():
                self.on_logged(new)


@contextmanager
def scratch(work: Path) -> Iterator[Path]:
    work.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(dir=work))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def sustained(work: Path, seconds: float, rate_at_most: int = 15_000) -> dict[str, Any]:
    """As fast as it goes, for about that long."""
    intents = Requests().intents(round(seconds * rate_at_most))
    with scratch(work) as directory:
        raw = raw_sync(directory)
        places = threading.Semaphore(AT_ONCE)
        site = Site(directory / "state", lambda new: places.release(len(new)))
        begun, cpu = time.perf_counter(), time.process_time()
        done = 0
        for intent in intents:
            places.acquire()
            site.start(intent, lambda intent=intent: site.complete(intent, lambda seq: None))
            done += 1
            if time.perf_counter() - begun >= seconds:
                break
        for _ in range(AT_ONCE):
            places.acquire()
        took, cpu = time.perf_counter() - begun, time.process_time() - cpu
        site.close()
    return {"receipts": done, "receipts_per_s": round(done / took), "cpu_us": round(1e6 * cpu / done, 1), **raw}


def open_loop(work: Path, seconds: float, rate: int) -> dict[str, Any]:
    """Completions at `rate`; each tick also starts the request whose completion is due `AHEAD` ticks later."""
    count = round(seconds * rate)
    intents = Requests().intents(count + AHEAD)
    handed, durable, logged = ([0.0] * count for _ in range(3))
    number_of: dict[int, int] = {}  # by number of the receipt
    with scratch(work) as directory:
        raw = raw_sync(directory)

        def note_logged(new: range) -> None:
            now = time.perf_counter()
            for seq in new:
                logged[number_of[seq]] = now

        site = Site(directory / "state", note_logged)
        ready = threading.Semaphore(0)
        for intent in intents[:AHEAD]:
            site.start(intent, ready.release)
        for _ in range(AHEAD):
            ready.acquire()
        cpu = time.process_time()
        due = time.perf_counter()
        for number in range(count):
            due += 1 / rate
            if (early := due - time.perf_counter()) > 0:
                time.sleep(early)

            def note_durable(seq: int, number: int = number) -> None:
                durable[number] = time.perf_counter()
                number_of[seq] = number

            site.start(intents[number + AHEAD], lambda: None)
            handed[number] = time.perf_counter()
            site.complete(intents[number], note_durable)
        site.close()
        cpu = time.process_time() - cpu
    return {
        "rate": rate,
        "receipts": count,
        **percentiles("durable", np.subtract(durable, handed)),
        **percentiles("logged", np.subtract(logged, handed)),
        "cpu_us": round(1e6 * cpu / count, 1),
        **raw,
    }


def document(work: Path, count: int = 3000) -> dict[str, Any]:
    """The JSON of receipts that are in the log, with their salts."""
    intents = Requests().intents(count)
    with scratch(work) as directory:
        site = Site(directory / "state")
        ended = threading.Semaphore(0)
        for intent in intents:
            site.start(intent, lambda intent=intent: site.complete(intent, lambda seq: ended.release()))
            ended.acquire()
        site.close()
        with ReceiptLog.open(directory / "state", read_only=True) as log:
            begun = time.process_time()
            for seq in range(count):
                json.dumps(log.receipt_json(seq, with_salts=True), separators=(",", ":"))
            cpu = time.process_time() - begun
    return {"receipts": count, "document_us": round(1e6 * cpu / count, 1)}


def verdict(name: str, value: float) -> str:
    if name not in GATES:
        return ""
    sign, bound = GATES[name]
    met = value >= bound if sign == ">=" else value <= bound
    return f"{sign} {bound} {'met' if met else 'MISSED'}"


def show(lines: list[dict[str, Any]]) -> None:
    table = Table(title="receipt log: medians of the runs")
    for column in ("case", "measure", "median", "lowest", "highest", "gate"):
        table.add_column(column)
    for case in dict.fromkeys(line["case"] for line in lines):
        of_case = [line for line in lines if line["case"] == case]
        for name in of_case[0]:
            if name in ("case", "run", "rate", "receipts"):
                continue
            values = [line[name] for line in of_case]
            middle = statistics.median(values)
            gate = "" if case == "open-loop" and name == "cpu_us" else verdict(name, middle)
            table.add_row(case, name, f"{middle:g}", f"{min(values):g}", f"{max(values):g}", gate)
    Console(stderr=True).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="scratch directory on the disk to measure")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each run")
    parser.add_argument("--rate", type=int, default=1000, help="of the open loop, receipts a second")
    parser.add_argument("--case", choices=("sustained", "open-loop", "document", "tree"), action="append")
    parser.add_argument("--json", type=Path, help="append the lines to this file too")
    given = parser.parse_args()
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "sustained": lambda: sustained(given.work, given.seconds),
        "open-loop": lambda: open_loop(given.work, given.seconds, given.rate),
        "document": lambda: document(given.work),
        "tree": tree,
    }
    lines: list[dict[str, Any]] = []
    for case in given.case or cases:
        for run in range(given.runs):
            lines.append({"case": case, "run": run, **cases[case]()})
            text = json.dumps(lines[-1])
            print(text, flush=True)
            if given.json:
                with given.json.open("a") as file:
                    file.write(text + "\n")
    show(lines)


if __name__ == "__main__":
    sys.exit(main())
