"""Work in a process of its own: both ends of the talk between a command and its worker.

The worker takes one request as JSON on standard input and answers with JSON lines on standard output. Where it
crashes, hangs or is killed for its memory, that costs one piece of work and no server.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, TypeVar

import msgspec

from ..adapters.printable import printable
from ..errors import from_message
from .parent_watch import exit_with

STDERR_TAIL = 2000
Request = TypeVar("Request")


class Fatal(msgspec.Struct, frozen=True, tag="fatal"):
    """Why nothing at all can be done: an OpenLoRAError's message."""

    message: str


@dataclass(frozen=True)
class WorkerEnd:
    """How a worker ended: exit status (negative = that signal), and the end of what it wrote to standard error."""

    status: int
    complaint: str


def run_worker(module: str, request: msgspec.Struct, events: Any, follow: Callable[[Any], None]) -> WorkerEnd:
    """Run `python -m module` on `request` until it ends; it never outlives this call.

    Args:
        events: the type, or union of types, of its answers.
        follow: is told each of them.

    Raises:
        OpenLoRAError: the one that the worker reported as `Fatal`.
    """
    with tempfile.TemporaryFile() as complaints, tempfile.TemporaryFile() as asked:
        asked.write(msgspec.json.encode(request))
        asked.seek(0)
        command = [sys.executable, "-m", module]
        with subprocess.Popen(command, stdin=asked, stdout=subprocess.PIPE, stderr=complaints) as process:
            try:
                _follow(process.stdout, events, follow)
            except BaseException:
                process.kill()
                raise
        complaints.seek(0)
        lines = complaints.read().decode(errors="replace")[-STDERR_TAIL:].strip().splitlines()
        return WorkerEnd(process.returncode, "\n".join(printable(line) for line in lines))


def _follow(answers: IO[bytes], events: Any, follow: Callable[[Any], None]) -> None:
    for line in answers:
        if not line.endswith(b"\n"):
            return  # it died within a line
        event = msgspec.json.decode(line, type=events | Fatal)
        if isinstance(event, Fatal):
            raise from_message(event.message)
        follow(event)


def take_request(kind: type[Request]) -> tuple[Request, Callable[[msgspec.Struct], None]]:
    """The worker's end: what it was asked, and how to answer. It ends with whoever asked."""
    exit_with(os.getppid())
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=kind)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not get between the answers

    def report(event: msgspec.Struct) -> None:
        answers.write(msgspec.json.encode(event) + b"\n")
        answers.flush()

    return request, report
