"""What the scripts that carry out a recipe have in common: their options, the check before, the dry run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from ..command_group import report
from ..errors import OpenLoRAError
from .build_plan import Step, shell_script
from .layout import Layout
from .recipe import DEFAULT_FOLDER, Recipe, find_recipe
from .report import finding_lines
from .rules import refuse_broken

Plan = Callable[[argparse.Namespace, Recipe, Layout], list[Step]]
Carry = Callable[[list[Step], Recipe, Layout, Console], None]


def script_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    defaults = Layout()
    parser.add_argument("recipe", help="name of a recipe, or its YAML file")
    parser.add_argument("--recipes", type=Path, default=DEFAULT_FOLDER, help="where the recipes are")
    parser.add_argument("--gpu", help="this GPU, not the recipe's")
    parser.add_argument("--version", help="this TensorRT-LLM, not the recipe's")
    parser.add_argument("--models", type=Path, default=defaults.models, help="base models, DIR/<organisation>/<name>")
    parser.add_argument("--artefacts", type=Path, default=defaults.artefacts, help="where checkpoints and engines go")
    parser.add_argument("--adapters", type=Path, default=defaults.adapters, help="adapters to serve")
    parser.add_argument("--state-dir", type=Path, default=defaults.state, help="the server's state")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    return parser


def run_script(arguments: argparse.Namespace, plan: Plan, carry: Carry) -> int:
    """Check the recipe, plan, and carry the plan out or print it. Returns the exit code; an error is one line."""
    notes = Console(stderr=True)
    layout = Layout(arguments.models, arguments.artefacts, arguments.adapters, arguments.state_dir)
    try:
        recipe = find_recipe(arguments.recipe, arguments.recipes).retargeted(arguments.gpu, arguments.version)
        for line in finding_lines(refuse_broken(recipe)):
            notes.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
        steps = plan(arguments, recipe, layout)
        if arguments.dry_run:
            print(shell_script(steps))
        else:
            carry(steps, recipe, layout, notes)
    except OpenLoRAError as error:
        return report(error)
    return 0


def run_made(steps: Sequence[Step], recipe: Recipe, layout: Layout, notes: Console) -> None:
    """Run the steps that make something; what was made before from the same inputs is left alone."""
    from .step_runner import run_steps

    if not steps:
        notes.print(f"{recipe.name} serves {layout.base(recipe)} as it is: nothing to do", markup=False)
    run_steps(steps, layout.made(recipe), notes)


def run_and_become(steps: Sequence[Step], _: Recipe, layout: Layout, notes: Console) -> None:
    """Run all but the last step, and become that one."""
    from .step_runner import become, run_steps

    run_steps(steps[:-1], layout.launching, notes)
    notes.print(f"{steps[-1].name}: {steps[-1].command[0]}", markup=False)
    sys.stderr.flush()
    become(steps[-1])
