"""Serve a recipe: on one machine, or on several through mpirun or srun.

Writes the settings, waits for the other machines, and becomes the server. In a pod of a LeaderWorkerSet, `--group`
takes the hosts from the controller's variables.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from openlora.recipes.build_plan import Cluster, Step, group_hosts, launch_steps
from openlora.recipes.layout import Layout
from openlora.recipes.recipe import Recipe
from openlora.recipes.script import run_and_become, run_script, script_parser


def plan(arguments: argparse.Namespace, recipe: Recipe, layout: Layout) -> list[Step]:
    hosts = group_hosts(os.environ) if arguments.group else tuple(filter(None, arguments.hosts.split(",")))
    scheduler = "slurm" if arguments.slurm else "mpi" if hosts else "none"
    cluster = Cluster(scheduler, hosts, arguments.ssh_port, arguments.ssh_keys)
    return launch_steps(recipe, layout, cluster, arguments.openlora)


def main() -> int:
    parser = script_parser(__doc__)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--hosts", default="", help="machines for mpirun, the leader first, with commas")
    where.add_argument("--slurm", action="store_true", help="inside an allocation: srun starts the ranks")
    where.add_argument("--group", action="store_true", help="the pods of this LeaderWorkerSet's group")
    parser.add_argument("--ssh-port", type=int, default=22, help="of sshd on the other machines")
    parser.add_argument("--ssh-keys", type=Path, help="directory with id_ed25519 and known_hosts; default: the user's")
    parser.add_argument(
        "--openlora", default=str(Path(sys.executable).parent / "openlora"), help="the command to serve"
    )
    return run_script(parser.parse_args(), plan, run_and_become)


if __name__ == "__main__":
    sys.exit(main())
