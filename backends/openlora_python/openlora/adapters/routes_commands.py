"""`openlora routes …`: groups and task preferences from the command line. A running server follows at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..command_group import command_group
from ..errors import AdapterNotFound, InvalidArgument
from .catalog_file import CATALOG_FILE
from .catalog_reader import CatalogReader
from .routes import Group, Routes, RoutesReader, Target

StateDir = Annotated[Path, typer.Option("--state-dir", help="Where the server keeps its state.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine output.")]

routes_app = command_group("Names that stand for adapters: groups with weights, and tasks.")


@routes_app.command("set")
def set_group(
    name: Annotated[str, typer.Argument(help="Of the group; no adapter may have it.")],
    to: Annotated[list[str], typer.Option(metavar="NAME[@VERSION]=WEIGHT", help="A target; give one or more.")],
    skip_unready: Annotated[
        bool, typer.Option("--skip-unready", help="Pass over targets that are gone or quarantined.")
    ] = False,
    state_dir: StateDir = Path("var"),
    as_json: AsJson = False,
) -> None:
    """Make a group, or change the one of this name: each request that names it gets one of its targets, by weight."""
    with CatalogReader(state_dir / CATALOG_FILE) as catalog:
        targets = tuple(_target(text, catalog) for text in to)
    with Routes(state_dir / CATALOG_FILE) as routes:
        group = routes.set_group(Group(name, targets, skip_unready))
    typer.echo(json.dumps(asdict(group)) if as_json else f"{group.name}: {_shown(group)}")


@routes_app.command("list")
def list_routes(state_dir: StateDir = Path("var"), as_json: AsJson = False) -> None:
    """All groups, how their targets do, and which adapters are preferred for tasks."""
    with CatalogReader(state_dir / CATALOG_FILE) as catalog:
        with Routes(state_dir / CATALOG_FILE):
            reader = RoutesReader(state_dir / CATALOG_FILE)
        groups, preferences = reader.groups(), reader.preferences()
        reader.close()
        states = {target: _state(target, catalog) for group in groups for target in group.targets}
        if as_json:
            trees = [
                {**asdict(group), "targets": [{**asdict(one), "state": states[one]} for one in group.targets]}
                for group in groups
            ]
            typer.echo(json.dumps({"groups": trees, "preferences": preferences}))
            return
        table = Table("group", "adapter", "version", "weight", "state", "unready targets", box=None)
        for group in groups:
            for target in group.targets:
                unready = "are skipped" if group.skip_unready else "fail"
                version = "current" if target.version is None else str(target.version)
                table.add_row(group.name, target.adapter, version, str(target.weight), states[target], unready)
        Console().print(table if groups else "no groups")
        for task, adapter in preferences.items():
            typer.echo(f"task {task}: {adapter}")


@routes_app.command()
def remove(name: Annotated[str, typer.Argument(help="Of a group.")], state_dir: StateDir = Path("var")) -> None:
    """Take a group away. Its adapters stay."""
    with _routes(state_dir) as routes:
        routes.remove_group(name)
        typer.echo(f"{name}: removed")


@routes_app.command()
def prefer(
    task: Annotated[str, typer.Argument(help="As in the cards of adapters.")],
    name: Annotated[str, typer.Argument(help="Of an adapter whose card declares the task.")],
    state_dir: StateDir = Path("var"),
) -> None:
    """Of several adapters for a task, requests that name the task get this one."""
    with CatalogReader(state_dir / CATALOG_FILE) as catalog:
        declared = (catalog.find(name).card or {}).get("tasks", [])
    if task not in declared:
        raise InvalidArgument(f"the card of {name!r} declares {declared}, not {task!r:.80}", field="task")
    with _routes(state_dir) as routes:
        routes.prefer(task, name)
    typer.echo(f"task {task}: {name}")


@routes_app.command()
def forget(task: Annotated[str, typer.Argument()], state_dir: StateDir = Path("var")) -> None:
    """Prefer no adapter for a task any more."""
    with _routes(state_dir) as routes:
        routes.forget(task)
        typer.echo(f"task {task}: no preference")


def _target(text: str, catalog: CatalogReader) -> Target:
    """`NAME[@VERSION][=WEIGHT]`; the version that is meant now, by its number."""
    label, equals, weight = text.partition("=")
    name, at, version = label.partition("@")
    if equals and not weight.isdecimal():
        raise InvalidArgument(f"{text!r:.140}: a whole number is wanted after '='", field="to")
    try:
        found = catalog.find(name, version if at else None)
    except AdapterNotFound as error:
        raise InvalidArgument(error.message, field="to") from error
    return Target(name, int(weight) if equals else 1, found.version if at else None)


def _state(target: Target, catalog: CatalogReader) -> str:
    try:
        return catalog.find(target.adapter, target.version).status
    except AdapterNotFound:
        return "missing"


def _shown(group: Group) -> str:
    whole = sum(target.weight for target in group.targets)
    return ", ".join(
        f"{target.adapter}{f'@{target.version}' if target.version else ''} {target.weight / whole:.2%}"
        for target in group.targets
    )


@contextmanager
def _routes(state_dir: Path) -> Iterator[Routes]:
    with CatalogReader(state_dir / CATALOG_FILE):
        pass  # there must be one: to write routes into an empty file helps nobody
    with Routes(state_dir / CATALOG_FILE) as routes:
        yield routes
