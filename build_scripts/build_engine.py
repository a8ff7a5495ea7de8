"""Build the TensorRT engine of a recipe of the engine path, with `trtllm-build`, from what quantize.py made.

Runs in the Triton container with TensorRT-LLM below 1.3, on the GPU that will serve. Done before from the same
checkpoint and flags, it does nothing.
"""

from __future__ import annotations

import argparse
import sys

from openlora.recipes.build_plan import Step, engine_steps
from openlora.recipes.layout import Layout
from openlora.recipes.recipe import Recipe
from openlora.recipes.script import run_made, run_script, script_parser


def plan(_: argparse.Namespace, recipe: Recipe, layout: Layout) -> list[Step]:
    return engine_steps(recipe, layout)


if __name__ == "__main__":
    sys.exit(run_script(script_parser(__doc__).parse_args(), plan, run_made))
