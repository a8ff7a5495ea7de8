"""A worker process from outside: start it, give it jobs, stop it in its tracks while others run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from protocol import Job, Result, Settings

START_SECONDS = 900  # compiling takes minutes on a small machine
JOB_SECONDS = 300
END_SECONDS = 20


class WorkerFailed(Exception):
    """The worker ended, or said nothing in time."""


@dataclass(frozen=True)
class Run:
    """One job of one worker. `foreign_share` is what other processes took of the machine's cores meanwhile, 0 to 1."""

    result: Result
    foreign_share: float


class Worker:
    """One system, loaded. Between its jobs it is stopped (SIGSTOP), all of its processes: some poll when idle."""

    def __init__(
        self, python: Path, script: Path, settings: Settings, environment: Mapping[str, str], log: Path
    ) -> None:
        """Start it and wait until it is ready.

        Raises:
            WorkerFailed: with the last line of its log.
        """
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [python, script, json.dumps(asdict(settings))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                bufsize=1,
                env={**os.environ, **environment},
            )
        self._tree = psutil.Process(self._process.pid)
        try:
            self.facts: dict[str, Any] = self._read(START_SECONDS)["ready"]
        except BaseException:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def run(self, job: Job) -> Run:
        """Let it go on, give it a job, and stop it again.

        Raises:
            WorkerFailed: it ended, or gave other than `new_tokens` tokens for some request.
        """
        self._signal(signal.SIGCONT)
        busy, own = _busy_seconds(), self._cpu_seconds()
        try:
            self._process.stdin.write(json.dumps(asdict(job)) + "\n")
            result = Result(**self._read(JOB_SECONDS))
        except BrokenPipeError as error:
            raise WorkerFailed(f"ended: {self._last_words()}") from error
        foreign = _busy_seconds() - busy - (self._cpu_seconds() - own)
        self._signal(signal.SIGSTOP)
        counts = {len(tokens) for tokens in result.tokens}
        if len(result.tokens) != len(job.prompts) or counts != {job.new_tokens}:
            raise WorkerFailed(
                f"{len(result.tokens)} answers of {sorted(counts)} tokens for {len(job.prompts)} prompts"
            )
        # Both are counted in ticks of 10 ms: the share of a very short job says little.
        return Run(result, min(1.0, max(0.0, foreign) / (result.seconds * psutil.cpu_count())))

    @property
    def pid(self) -> int:
        return self._process.pid

    def memory_bytes(self) -> int:
        """Of all its processes, what they share counted once (PSS)."""
        return sum(process.memory_full_info().pss for process in self._processes())

    def close(self) -> None:
        """End it and everything it started."""
        processes = self._processes()
        self._signal(signal.SIGCONT)
        self._process.stdin.close()
        _, alive = psutil.wait_procs(processes, END_SECONDS)
        for process in alive:
            process.kill()
        self._process.wait()
        self._process.stdout.close()

    def _read(self, seconds: float) -> dict[str, Any]:
        """The next message."""
        timer = threading.Timer(seconds, self._process.kill)  # ends the read below
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            raise WorkerFailed(f"ended, or silent for {seconds} s: {self._last_words()}")
        return json.loads(line)

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'no word of it'} ({self._log})"

    def _processes(self) -> Sequence[psutil.Process]:
        try:
            return [self._tree, *self._tree.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes():
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                pass  # a short-lived child

    def _cpu_seconds(self) -> float:
        times = [process.cpu_times() for process in self._processes()]
        return sum(time.user + time.system + time.children_user + time.children_system for time in times)


def _busy_seconds() -> float:
    """CPU time of the whole machine, stolen time included."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq + times.steal
