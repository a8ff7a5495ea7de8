"""`openlora engines …`: the recipes of TensorRT-LLM engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console

from ..command_group import command_group
from .recipe import DEFAULT_FOLDER, find_recipe, load_recipes

engines_app = command_group("Recipes of TensorRT-LLM engines.")

Folder = Annotated[Path, typer.Option("--recipes", help="Where the recipes are.")]
NameOrFile = Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a recipe, or its YAML file.")]
Gpu = Annotated[str | None, typer.Option(help="On this GPU, not on the recipe's.")]
Version = Annotated[str | None, typer.Option("--version", help="With this TensorRT-LLM, not with the recipe's.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine output.")]


@engines_app.command("list")
def list_recipes(recipes: Folder = DEFAULT_FOLDER, as_json: AsJson = False) -> None:
    """All recipes, and what `check` says of each."""
    from .report import describe, list_table

    found = load_recipes(recipes)
    if as_json:
        typer.echo(json.dumps([describe(recipe) for recipe in found]))
    else:
        Console().print(list_table(found))


@engines_app.command("show")
def show_recipe(
    name: NameOrFile,
    recipes: Folder = DEFAULT_FOLDER,
    gpu: Gpu = None,
    version: Version = None,
    values: Annotated[bool, typer.Option("--values", help="Its entry in the Helm chart's values, as YAML.")] = False,
    as_json: AsJson = False,
) -> None:
    """What a recipe needs of each GPU and of the host, and how many adapters fit."""
    from .deployment import chart_values
    from .planner import plan_memory
    from .report import describe, memory_table

    recipe = find_recipe(name, recipes).retargeted(gpu, version)
    if as_json:
        typer.echo(json.dumps(describe(recipe)))
        return
    if values:
        typer.echo(yaml.safe_dump({"engines": {recipe.name: chart_values(recipe)}}, sort_keys=False), nl=False)
        return
    console = Console()
    console.print(f"{recipe.name}: {recipe.summary}", markup=False, highlight=False)
    console.print(memory_table(plan_memory(recipe)))


@engines_app.command("check")
def check(
    name: NameOrFile,
    recipes: Folder = DEFAULT_FOLDER,
    gpu: Gpu = None,
    version: Version = None,
    as_json: AsJson = False,
) -> None:
    """Whether a recipe can work on its GPU and version, or on others; exit code 2 if not, with the reason."""
    from .report import finding_lines
    from .rules import check_recipe

    recipe = find_recipe(name, recipes).retargeted(gpu, version)
    findings = check_recipe(recipe)
    works = all(finding.severity != "error" for finding in findings)
    if as_json:
        told = {"recipe": recipe.name, "gpu": recipe.target.gpu, "version": recipe.target.tensorrt_llm, "works": works}
        typer.echo(json.dumps({**told, "findings": [vars(finding) for finding in findings]}))
    else:
        for line in finding_lines(findings):
            typer.echo(line, err=True)
        if works:
            typer.echo(f"{recipe.name} can work on {recipe.target.gpu} with TensorRT-LLM {recipe.target.tensorrt_llm}")
    if not works:
        raise typer.Exit(2)
