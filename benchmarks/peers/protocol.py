"""What driver and workers say to each other: JSON lines over a worker's stdin and stdout.

A worker runs in its system's own environment, so this module needs nothing but the standard library. A worker gets
its settings as one JSON argument, loads, says `{"ready": {...}}`, and then answers every job with a result.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Settings:
    """How to start a system. `adapters` are the PEFT directories that are loaded before it says that it is ready."""

    model: str
    adapters: list[str]
    batch: int  # of the largest job
    tokens: int  # prompt and new tokens of the longest request together
    max_rank: int
    threads: int
    options: dict[str, Any] = field(default_factory=dict)  # what sets one variant of a system apart from another


@dataclass(frozen=True)
class Job:
    """A batch of requests that arrive at once; every one gets `new_tokens` greedy tokens, EOS or not."""

    prompts: list[list[int]]
    adapters: list[str | None]  # a directory of `Settings.adapters` for each prompt; None = base model
    new_tokens: int


@dataclass(frozen=True)
class Result:
    """`seconds` from handing over the batch to its last token; `tokens` are the new ones, `[requests][new_tokens]`."""

    seconds: float
    tokens: list[list[int]]


Answer = Callable[[Job], list[list[int]]]
"""Computes the new tokens of a job; its wall time is what is measured."""


def serve(start: Callable[[Settings, ExitStack], tuple[Answer, dict[str, Any]]]) -> None:
    """A worker's whole life. `start` loads the system, and leaves on the stack what has to be done at the end; what it
    returns beside `Answer` is told to the reader as it is.

    Libraries print to stdout as they like: the messages go over a copy of it, and stdout itself becomes stderr.
    """
    messages = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with ExitStack() as cleanup:
        answer, facts = start(Settings(**json.loads(sys.argv[1])), cleanup)
        print(json.dumps({"ready": facts}), file=messages)
        for line in sys.stdin:
            job = Job(**json.loads(line))
            began = time.perf_counter()
            tokens = answer(job)
            seconds = time.perf_counter() - began
            print(json.dumps(asdict(Result(seconds, tokens))), file=messages)
