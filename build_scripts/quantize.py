"""Make the checkpoint of a recipe: ModelOpt's Hugging Face export for the PyTorch path, TensorRT-LLM's for the engine
path.

Runs in the Triton container with TensorRT-LLM, on a GPU that holds the model in 16 bits. Interrupted, it starts the
step again; done before from the same inputs, it does nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from openlora.recipes.build_plan import Step, Tools, quantize_steps
from openlora.recipes.layout import Layout
from openlora.recipes.recipe import Recipe
from openlora.recipes.script import run_made, run_script, script_parser


def plan(arguments: argparse.Namespace, recipe: Recipe, layout: Layout) -> list[Step]:
    return quantize_steps(recipe, layout, Tools(arguments.python, arguments.trtllm_examples, arguments.modelopt))


def main() -> int:
    tools, parser = Tools(), script_parser(__doc__)
    parser.add_argument("--python", default=tools.python, help="interpreter that has TensorRT-LLM and ModelOpt")
    parser.add_argument("--trtllm-examples", type=Path, default=tools.trtllm_examples, help="examples of TensorRT-LLM")
    parser.add_argument("--modelopt", type=Path, default=tools.modelopt, help="clone of NVIDIA/Model-Optimizer")
    return run_script(parser.parse_args(), plan, run_made)


if __name__ == "__main__":
    sys.exit(main())
