"""`openlora explore`: serve the page."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InvalidArgument
from ..network.arguments import DeploymentFile

if TYPE_CHECKING:
    from .settlement_view import SettlementView


def explore(
    state_dir: Annotated[Path, typer.Option(help="The server's state directory; it is only read.")] = Path("var"),
    deployment: DeploymentFile = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 9100,
) -> None:
    """Serve a page to look at: receipts, adapters, settlement of the deployment if one is given, and a verifier."""
    from .server import PageServer  # brings FastAPI, which no other command should wait for
    from .settlement_view import SettlementView

    if not state_dir.is_dir():
        raise InvalidArgument(f"no state directory at {state_dir}", field="state-dir")
    view = SettlementView()
    server = PageServer(state_dir, view, host, port)
    with _reader(state_dir, deployment, view):
        server.run()


def _reader(state_dir: Path, deployment: Path | None, view: SettlementView) -> AbstractContextManager[object]:
    if deployment is None:
        return nullcontext()
    from ..network.deployment import Deployment
    from .settlement_reader import SettlementReader  # brings web3

    return SettlementReader(state_dir, Deployment.load(deployment), view)
