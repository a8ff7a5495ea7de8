"""A group of commands, and what one says when it fails: one line on stderr, and the exit code of errors.py."""

from __future__ import annotations

from typing import Any

import typer
from click import Context
from typer.core import TyperGroup

from .errors import OpenLoRAError


def report(error: OpenLoRAError) -> int:
    """Print it as one line, red on a terminal; its exit code."""
    typer.secho(str(error), fg=typer.colors.RED, err=True)
    return error.exit_code


def command_group(help: str) -> typer.Typer:
    """Commands under one name; errors of ours that they raise are reported."""
    return typer.Typer(
        cls=_ReportingGroup, help=help, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False
    )


class _ReportingGroup(TyperGroup):
    def invoke(self, ctx: Context) -> Any:
        try:
            return super().invoke(ctx)
        except OpenLoRAError as error:
            raise typer.Exit(report(error)) from error
