"""`openlora bench`."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..errors import InvalidArgument
from .popularity import POPULARITIES

PopularityName = StrEnum("PopularityName", list(POPULARITIES))


def bench(
    model: Annotated[Path, typer.Option(help="Directory of a Hugging Face causal language model.")],
    adapters: Annotated[Path | None, typer.Option(help="Directory of PEFT adapter directories.")] = None,
    popularity: Annotated[
        list[PopularityName] | None,
        typer.Option(help="Which adapter each request asks for. Repeat it to compare; default: base."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Requests that arrive together.")] = 16,
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens of each prompt: random ones.")] = 32,
    new_tokens: Annotated[int, typer.Option(min=1, help="New tokens of each request: greedy, EOS ignored.")] = 32,
    repeat: Annotated[int, typer.Option(min=1, help="Measured batches, each with prompts of its own.")] = 5,
    warmup: Annotated[int, typer.Option(min=0, help="Batches before them that don't count.")] = 1,
    seed: Annotated[int, typer.Option(help="Of prompts and popularity.")] = 0,
    load_adapters: Annotated[
        bool, typer.Option("--load-adapters", help="Have all adapters resident, whoever asks for them.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    quantization: Annotated[str, typer.Option(help="As of `openlora serve`.")] = "none",
    threads: Annotated[int | None, typer.Option(min=1, help="Default: torch's, one a core.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Append the lines to this file.")] = None,
) -> None:
    """Measure the engine in this process: tokens per second, time to first token, time between tokens, memory.

    The workloads take turns, so that what changes on the machine meanwhile touches all of them. Start-up, and the
    loading of adapters, are not in the figures. The engine's threads wait for their next piece of work as the OpenMP
    library likes, spinning for a few milliseconds; in a server, where others want the cores, for a tenth of that.
    """
    from .measure import Workload, measure
    from .report import table_of

    if json_file is not None and not json_file.parent.is_dir():
        raise InvalidArgument(f"{json_file.parent} is not a directory", field="json")
    notes = Console(stderr=True)
    workload = Workload(
        model=model,
        adapters=_adapter_directories(adapters),
        popularities=list(dict.fromkeys(str(name) for name in popularity or ["base"])),
        batch=batch,
        prompt_len=prompt_len,
        new_tokens=new_tokens,
        repeat=repeat,
        warmup=warmup,
        seed=seed,
        load_adapters=load_adapters,
        dtype=dtype,
        quantization=quantization,
        threads=threads,
    )
    reports = measure(workload, notes)
    lines = [json.dumps(asdict(report)) for report in reports]
    for line in lines:
        typer.echo(line)
    if json_file is not None:
        with json_file.open("a") as file:
            file.writelines(line + "\n" for line in lines)
    notes.print(table_of(reports))


def _adapter_directories(root: Path | None) -> list[Path]:
    """The directories in `root` that hold an adapter, by name.

    Raises:
        InvalidArgument: there is no such directory, or no adapter in it.
    """
    if root is None:
        return []
    if not root.is_dir():
        raise InvalidArgument(f"{root} is not a directory", field="adapters")
    found = sorted(path.parent for path in root.glob("*/adapter_config.json"))
    if not found:
        raise InvalidArgument(f"{root} holds no directory with an adapter_config.json", field="adapters")
    return found
