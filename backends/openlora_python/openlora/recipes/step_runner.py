"""Runs the steps of a plan, and leaves out what was done from the same inputs before.

A finished step leaves a stamp: the digest of its command, environment and inputs. An output grows under another name
and is renamed when its command succeeded, so an interrupted step leaves nothing that looks whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from ..errors import InvalidArgument, Unavailable
from .build_plan import Step, partial_of

STAMPS = ".stamps"
WHOLE_BYTES = 1 << 20  # larger files are known by size and time: a model's weights would take minutes to read


def run_steps(steps: Sequence[Step], folder: Path, notes: Console) -> None:
    """Run each step that was not done from the same inputs; stamps lie in `folder`.

    Raises:
        InvalidArgument: an input is not there.
        Unavailable: a command failed, or is not there.
    """
    stamps = folder / STAMPS
    stamps.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(steps, start=1):
        stamp, digest = stamps / f"{step.name}.json", digest_of(step)
        if _is_done(step, stamp, digest):
            notes.print(f"[{number}/{len(steps)}] {step.name}: done before", markup=False)
            continue
        notes.print(f"[{number}/{len(steps)}] {step.name}: {step.output or step.command[0]}", markup=False)
        stamp.unlink(missing_ok=True)
        started = time.monotonic()
        _run(step)
        seconds = round(time.monotonic() - started, 1)
        if step.output is not None:
            written = stamp.with_suffix(".tmp")
            written.write_text(json.dumps({"digest": digest, "seconds": seconds}) + "\n")
            written.replace(stamp)
        notes.print(f"[{number}/{len(steps)}] {step.name}: {seconds} s", markup=False)


def become(step: Step) -> NoReturn:
    """This process becomes the step's, so that signals reach it.

    Raises:
        Unavailable: there is no such command.
    """
    try:
        os.execvpe(step.command[0], list(step.command), {**os.environ, **step.environment})
    except OSError as error:
        raise Unavailable(f"{step.command[0]}: {error.strerror}") from error


def digest_of(step: Step) -> str:
    """SHA-256 over everything that the step's result follows from, 64 hex digits.

    Raises:
        InvalidArgument: an input is not there.
    """
    told = [step.name, list(step.command), dict(sorted(step.environment.items())), step.text]
    told.append([_content_of(path) for path in step.inputs])
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _content_of(path: Path) -> list[list[object]]:
    if not path.exists():
        raise InvalidArgument(f"{path} is not there", field="input")
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [_file_facts(file, str(file.relative_to(path))) for file in files]


def _file_facts(file: Path, name: str) -> list[object]:
    facts = file.stat()
    if facts.st_size <= WHOLE_BYTES:
        return [name, hashlib.sha256(file.read_bytes()).hexdigest()]
    return [name, facts.st_size, facts.st_mtime_ns]


def _is_done(step: Step, stamp: Path, digest: str) -> bool:
    if step.output is None or not step.output.exists():
        return False
    try:
        return json.loads(stamp.read_text())["digest"] == digest
    except (OSError, ValueError, KeyError):
        return False


def _run(step: Step) -> None:
    if step.output is None:
        _call(step)
        return
    partial = partial_of(step.output)
    _remove(partial)
    partial.parent.mkdir(parents=True, exist_ok=True)
    if step.text is not None:
        partial.write_text(step.text)
    else:
        _call(step)
        if not partial.exists():
            raise Unavailable(f"{step.name}: {step.command[0]} succeeded and wrote no {partial}")
    _remove(step.output)
    partial.rename(step.output)


def _call(step: Step) -> None:
    try:
        status = subprocess.run(step.command, env={**os.environ, **step.environment}, check=False).returncode
    except OSError as error:
        raise Unavailable(f"{step.name}: {step.command[0]}: {error.strerror}") from error
    if status:
        raise Unavailable(f"{step.name}: {step.command[0]} ended with status {status}")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
