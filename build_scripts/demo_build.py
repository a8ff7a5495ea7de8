"""One build of the demo, from data sets to adapters, with a progress bar; `make_demo.py` runs it as its own process.

python build_scripts/demo_build.py EMPTY_DIRECTORY
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import demo_adapters
import demo_data
import demo_train
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.utils.logging import disable_progress_bar

BASE_NAME = "openlora-demo-base"
# Seconds of each stage on two cores, which the overall bar weighs its stages by.
_BASE_WEIGHT, _ADAPTER_WEIGHT = 90, 10


def build(folder: Path, console: Console) -> None:
    """Write data sets, prompts, base model, adapters and their cards into `folder`."""
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[loss]:<11}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress, demo_train.deterministic():
        weights = _BASE_WEIGHT + _ADAPTER_WEIGHT * len(demo_adapters.ADAPTERS)
        overall = progress.add_task("demo model", total=weights, loss="")
        datasets = demo_data.write_datasets(folder / "datasets")
        (folder / "prompts.json").write_text(json.dumps(demo_data.parity_prompts(), indent=1) + "\n")
        with _stage(progress, overall, "base model", _BASE_WEIGHT) as report:
            demo_adapters.make_base(datasets, folder / "model", report)
        for recipe in demo_adapters.ADAPTERS:
            with _stage(progress, overall, f"adapter {recipe.name}", _ADAPTER_WEIGHT) as report:
                demo_adapters.make_adapter(datasets, folder, BASE_NAME, recipe, report)


@contextmanager
def _stage(progress: Progress, overall: TaskID, name: str, weight: int) -> Iterator[demo_train.Report]:
    done_before = progress.tasks[overall].completed
    task = progress.add_task(name, total=None, loss="")

    def report(step: int, steps: int, loss: float) -> None:
        progress.update(task, completed=step, total=steps, loss=f"loss {loss:6.4f}")
        progress.update(overall, completed=done_before + weight * step / steps)

    yield report
    progress.update(overall, completed=done_before + weight)


def main() -> int:
    disable_progress_bar()  # of saving one file, which would break into ours
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT's call, not ours
    try:
        build(Path(sys.argv[1]), Console(stderr=True))
    except demo_train.NotConverged as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
