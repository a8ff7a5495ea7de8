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
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import demo_data
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

BASE_NAME = "openlora-demo-base"
MARKER = "complete.json"
_SOURCES = ("make_demo.py", "demo_data.py", "demo_train.py", "demo_adapters.py")
_LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "safetensors")
# Seconds of each stage on two cores, which the overall bar weighs its stages by.
_BASE_WEIGHT, _ADAPTER_WEIGHT = 90, 10


class DemoError(Exception):
    """The demo can't be made; the message says why."""


def ensure_demo(out: Path, console: Console | None = None) -> Path:
    """Make the demo in `out` unless it is there already; returns `out`.

    Raises `DemoError` if `out` holds something that this script did not make.
    """
    console = console or Console(stderr=True)
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with _lock(out.with_name(f".{out.name}.lock")):
        if is_complete(out):
            console.print(f"The demo in {out} is up to date.")
            return out
        if out.exists() and any(out.iterdir()) and not (out / MARKER).is_file():
            raise DemoError(f"{out} holds something else than the demo: choose an empty or a new directory with --out")
        building = out.with_name(f".{out.name}.building")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        _build(building, console)
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


def _build(folder: Path, console: Console) -> None:
    # Read once, when torch and tokenizers load. Two threads that spin while they wait for each other make a busy
    # machine's run many times longer; asleep they cost an idle machine's run nothing.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import demo_adapters
    import demo_train
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of saving one file, which would break into ours
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT's call, not ours
    with Progress(*columns, console=console) as progress, demo_train.deterministic():
        total = _BASE_WEIGHT + _ADAPTER_WEIGHT * len(demo_adapters.ADAPTERS)
        overall = progress.add_task("demo model", total=total, loss="")

        @contextmanager
        def stage(name: str, weight: int) -> Iterator[demo_train.Report]:
            begun = progress.tasks[overall].completed
            task = progress.add_task(name, total=None, loss="")

            def report(step: int, steps: int, loss: float) -> None:
                progress.update(task, completed=step, total=steps, loss=f"loss {loss:6.4f}")
                progress.update(overall, completed=begun + weight * step / steps)

            yield report
            progress.update(overall, completed=begun + weight)

        datasets = demo_data.write_datasets(folder / "datasets")
        (folder / "prompts.json").write_text(json.dumps(demo_data.parity_prompts(), indent=1) + "\n")
        with stage("base model", _BASE_WEIGHT) as report:
            demo_adapters.make_base(datasets, folder / "model", report)
        for recipe in demo_adapters.ADAPTERS:
            with stage(f"adapter {recipe.name}", _ADAPTER_WEIGHT) as report:
                demo_adapters.make_adapter(datasets, folder, BASE_NAME, recipe, report)


def _file_digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the demo base model and its adapters (cached).")
    parser.add_argument("--out", type=Path, default=Path("var/demo"), help="directory to make (default: var/demo)")
    arguments = parser.parse_args()
    try:
        ensure_demo(arguments.out)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
