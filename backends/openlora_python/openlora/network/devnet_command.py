"""`openlora devnet`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..processes.detached import start_detached

if TYPE_CHECKING:
    from .deployment import Deployment

DETACH_SECONDS = 60.0


def devnet(
    state_dir: Annotated[Path, typer.Option(help="Chain, keys and deployment file.")] = Path("var/devnet"),
    port: Annotated[int, typer.Option(min=1, max=65535, help="JSON-RPC, on 127.0.0.1 only.")] = 8545,
    block_seconds: Annotated[int, typer.Option(min=0, help="A block at least so often; 0: with transactions.")] = 10,
    detach: Annotated[bool, typer.Option("--detach", help="Return when it is ready; it goes on.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="End the one of this state directory.")] = False,
) -> None:
    """Run a chain of this machine's own, with the contracts on it and a key file for every role, until stopped."""
    from .devnet import DevnetOptions, devnet_lacks, run_devnet, stop_devnet

    console = Console(stderr=True)
    root = state_dir.resolve()
    if stop:
        console.print(f"stopped (pid {stop_devnet(root)})")
        return
    options = DevnetOptions(root, port, block_seconds)
    if detach:
        root.mkdir(parents=True, exist_ok=True)
        words = ["devnet", "--state-dir", str(root), "--port", str(port), "--block-seconds", str(block_seconds)]
        pid = start_detached(words, root / "devnet.log", DETACH_SECONDS, lambda pid: devnet_lacks(root, pid))
        console.print(f"ready (pid {pid}, state in {root})")
        return
    run_devnet(options, lambda deployment: _announce(deployment, root, console), lambda text: console.print(text))


def _announce(deployment: Deployment, root: Path, console: Console) -> None:
    table = Table(title=f"devnet is ready: chain {deployment.chain_id} at {deployment.rpc_url}", show_header=False)
    for name, place in deployment.contracts:
        table.add_row(name, place.address)
    table.add_row("deployment file", str(root / "deployment.json"))
    table.add_row("keys (public: worthless elsewhere)", str(root / "keys"))
    console.print(table)
