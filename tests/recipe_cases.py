"""Recipes of the repository for tests, as they are and changed in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from openlora.recipes.build_plan import Cluster, Step, Tools, engine_steps, launch_steps, quantize_steps, shell_script
from openlora.recipes.catalogue import VERSIONS
from openlora.recipes.deployment import chart_values, serve_settings
from openlora.recipes.layout import Layout
from openlora.recipes.planner import plan_memory
from openlora.recipes.recipe import Recipe, load_recipes
from openlora.recipes.rules import check_recipe

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {recipe.name: recipe for recipe in load_recipes(ROOT / "engines")}


def changed(name: str, **changes: Any) -> Recipe:
    """The recipe with other values: `target__gpu="L4"`."""
    tree = RECIPES[name].model_dump()
    for path, value in changes.items():
        *parents, leaf = path.split("__")
        node = tree
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return Recipe.model_validate(tree)


def everything_generated(recipe: Recipe) -> str:
    """What follows from a recipe of one version, as one YAML document; of a recipe that can't work, why."""
    findings = check_recipe(recipe)
    told: dict[str, Any] = {"check": [f"{one.severity} {one.rule}: {one.message}" for one in findings]}
    if not any(one.severity == "error" for one in findings):
        layout, tools = Layout(), Tools()
        told["containers"] = list(VERSIONS[recipe.target.tensorrt_llm].containers)
        told["memory"] = plan_memory(recipe).to_json()
        told["quantize"] = _lines(quantize_steps(recipe, layout, tools))
        if recipe.target.path == "engine":
            told["build"] = _lines(engine_steps(recipe, layout))
        told["settings"] = serve_settings(recipe, layout)
        told["launch"] = {
            name: _lines(launch_steps(recipe, layout, cluster)[1:]) for name, cluster in _clusters(recipe)
        }
        told["chart"] = chart_values(recipe)
    return yaml.safe_dump(told, sort_keys=False, width=10_000, allow_unicode=True)


def _clusters(recipe: Recipe) -> list[tuple[str, Cluster]]:
    if recipe.parallel.world <= recipe.target.gpus_per_node:
        return [("one machine", Cluster()), ("slurm", Cluster("slurm"))]
    hosts = tuple(f"node{number}" for number in range(recipe.target.nodes))
    keys = Cluster("mpi", hosts, 2222, Path("/ssh"))
    return [("mpi", Cluster("mpi", hosts)), ("mpi with keys", keys), ("slurm", Cluster("slurm"))]


def _lines(steps: list[Step]) -> list[str]:
    return shell_script(steps).splitlines()
