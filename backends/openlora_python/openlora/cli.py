"""`openlora …`: one place for every command; each lives beside the part that it drives."""

from __future__ import annotations

import logging

from rich.console import Console
from rich.logging import RichHandler

from .adapters.commands import adapters_app
from .adapters.routes_commands import routes_app
from .attribution.commands import receipts_app
from .attribution.settlement.commands import settle_app
from .attribution.witness_commands import witness_app
from .bench.command import bench
from .command_group import command_group
from .explorer.commands import explore
from .network.anchor.command import anchor
from .network.commands import network_app
from .network.devnet_command import devnet
from .recipes.commands import engines_app
from .serving.access.keys_command import keys_app
from .serving.generate_command import generate
from .serving.serve_command import serve, stop

app = command_group("Many LoRA adapters over one base model, served by NVIDIA Triton, every answer with a receipt.")
app.command()(serve)
app.command()(stop)
app.command()(generate)
app.command()(bench)
app.command()(devnet)
settle_app.command()(anchor)
app.command()(explore)
app.add_typer(adapters_app, name="adapters")
app.add_typer(routes_app, name="routes")
app.add_typer(engines_app, name="engines")
app.add_typer(receipts_app, name="receipts")
app.add_typer(settle_app, name="settle")
app.add_typer(keys_app, name="keys")
app.add_typer(network_app, name="network")
app.add_typer(witness_app, name="witness")


def main() -> None:
    """Run a command."""
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=Console(stderr=True), show_path=False)]
    )
    app()


if __name__ == "__main__":
    main()
