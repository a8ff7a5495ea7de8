"""What a command of ours says when it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from .errors import OpenLoRAError


@contextmanager
def reported() -> Iterator[None]:
    """An error of ours becomes one line on stderr and its exit code."""
    try:
        yield
    except OpenLoRAError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(error.exit_code) from error
