"""Make the demo: data sets, a small Llama-shaped base model and its LoRA adapters, trained on the spot.

    python build_scripts/make_demo.py --out var/demo

The result is cached: `complete.json` holds the digest of the recipe (these sources, the settings and the libraries'
versions) and of every file, and a run that finds both right returns at once. The demo is built in a directory beside
`--out` and renamed at the end, so an interrupted run leaves nothing half-made; one run builds at a time.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

MARKER = "complete.json"
_SOURCES = ("make_demo.py", "demo_build.py", "demo_data.py", "demo_train.py", "demo_adapters.py")
_LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "safetensors")


class DemoError(Exception):
    """The demo can't be made; the message says why."""


def ensure_demo(out: Path) -> Path:
    """Make the demo in `out` unless it is there already; returns `out`.

    Shows progress on standard error. Raises `DemoError` if `out` holds something that this script did not make, or
    if the building fails.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with _lock(out.with_name(f".{out.name}.lock")) as lock:
        if is_complete(out):
            return out
        if out.exists() and any(out.iterdir()) and not (out / MARKER).is_file():
            raise DemoError(f"{out} holds something else than the demo: choose an empty or a new directory with --out")
        building = out.with_name(f".{out.name}.building")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        _build(building, lock)
        marker = {"recipe": recipe_digest(), "files": _file_digests(building)}
        (building / MARKER).write_text(json.dumps(marker, indent=1, sort_keys=True) + "\n")
        if out.exists():
            shutil.rmtree(out)
        building.rename(out)
    return out


def is_complete(out: Path) -> bool:
    """Whether `out` holds a whole demo of today's recipe: its files are there with the digests they were made with."""
    try:
        marker = json.loads((out / MARKER).read_text())
        return marker["recipe"] == recipe_digest() and marker["files"] == _file_digests(out)
    except (FileNotFoundError, NotADirectoryError, KeyError, ValueError):
        return False


def recipe_digest() -> str:
    """SHA-256 over everything that decides the demo's bytes on one machine."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    for library in _LIBRARIES:
        digest.update(f"{library}=={version(library)}\n".encode())
    return digest.hexdigest()


def _build(folder: Path, lock: int) -> None:
    # In a process of its own, whoever calls: these are read once, when torch and tokenizers load. Two threads that
    # spin while they wait for each other make a busy machine's run many times longer; asleep they cost nothing.
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).with_name("demo_build.py")), str(folder)]
    # The child holds the lock too: if this process is killed, nobody builds in the same place until the child ends.
    finished = subprocess.run(command, env=environment, pass_fds=(lock,), check=False)
    if finished.returncode != 0:
        raise DemoError(f"building the demo failed with exit status {finished.returncode}; its error is above")


def _file_digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@contextmanager
def _lock(path: Path) -> Iterator[int]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle.fileno()


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the demo base model and its adapters (cached).")
    parser.add_argument("--out", type=Path, default=Path("var/demo"), help="directory to make (default: var/demo)")
    arguments = parser.parse_args()
    try:
        out = ensure_demo(arguments.out)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"The demo is in {out}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
