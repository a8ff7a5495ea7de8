"""Progress of long commands."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn


def progress_bars(*columns: ProgressColumn) -> Progress:
    """Bars with `columns` behind them, on standard error where that is a terminal; gone when the command is."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), *columns)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
