"""`openlora receipts export | fsck | forget | rotate`: a log for others, for the doubtful, its secrets, and its end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import TaskProgressColumn, TimeRemainingColumn

from ..errors import InvalidArgument
from ..progress import progress_bars
from .custody import rotate as close_and_follow
from .export import LogExport, write_export
from .fsck import check_export, check_log
from .log import ReceiptLog
from .receipt_lookup import find_receipt
from .rotation import closed_directory

StateDir = Annotated[Path, typer.Option(help="The server's state directory, or one below its `closed`.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]


def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Made, or brought up to date.")],
    state_dir: StateDir = Path("var"),
    as_json: AsJson = False,
) -> None:
    """Write everything that others need to check and to settle the log, up to its newest checkpoint. No salts."""
    with closing(ReceiptLog.open(state_dir, read_only=True)) as log:
        with _progress("exporting") as progress:
            size = write_export(log, directory, progress)
        facts = {"log": log.key.log_id.hex(), "receipts": size, "directory": str(directory)}
    typer.echo(json.dumps(facts) if as_json else f"{size} receipts of log {facts['log'][:16]}… in {directory}")


def fsck(
    exported: Annotated[Path | None, typer.Option("--export", metavar="DIR", help="An export, instead.")] = None,
    state_dir: StateDir = Path("var"),
    as_json: AsJson = False,
) -> None:
    """Recompute everything from the raw leaves; print what is wrong and exit 1 if something is."""
    with _progress("checking") as progress:
        if exported is not None:
            read = LogExport(exported)
            size, faults = read.size, list(check_export(read, progress))
        else:
            with closing(ReceiptLog.open(state_dir, read_only=True)) as log:
                faults = list(check_log(log, state_dir / "journal", progress))
                size = log.size()
    if as_json:
        typer.echo(json.dumps({"receipts": size, "faults": faults}))
    else:
        for fault in faults:
            typer.echo(fault)
        typer.echo(f"{size} receipts, {len(faults)} faults")
    if faults:
        raise typer.Exit(1)


def forget(
    which: Annotated[str, typer.Argument(metavar="SEQ|REQUEST_ID")],
    state_dir: StateDir = Path("var"),
    as_json: AsJson = False,
) -> None:
    """Erase a receipt's salts from the log, for good. The server must be stopped.

    Nobody can show from this log any more which texts the receipt is of; it stays valid. Whoever was sent it has its
    salts, and the journal until the server erases what is projected, minutes after a checkpoint.
    """
    with closing(ReceiptLog.open(state_dir, read_only=True)) as log:
        seq = find_receipt(log, which)
        log.receipt_json(seq)  # refuses a number that there is not
    with closing(ReceiptLog.open(state_dir, wait=False)) as log:
        log.forget_salts(seq)
    facts = {"seq": seq, "forgotten": ["prompt", "output"]}
    typer.echo(json.dumps(facts) if as_json else f"the salts of receipt {seq} are erased; the receipt stays valid")


def rotate(state_dir: StateDir = Path("var"), as_json: AsJson = False) -> None:
    """Close the log and open one that names it as its predecessor. The server must be stopped."""
    if not (state_dir / "log" / "receipts.sqlite").exists():
        raise InvalidArgument(f"no receipt log in {state_dir}", field="state-dir")
    with closing(ReceiptLog.open(state_dir, read_only=True)) as log:
        old = log.key
    new = close_and_follow(state_dir)
    closed = closed_directory(state_dir, old)
    if as_json:
        typer.echo(json.dumps({"closed": str(closed), "log": new.line}))
    else:
        typer.echo(f"closed: {closed}\nnow: {new.line}")


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, where somebody looks at it."""
    with progress_bars(TaskProgressColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task(what)
        yield lambda done, of: bar.update(task, completed=done, total=of)
