"""`openlora witness …`: one witness of receipt logs, a process of its own on a machine of somebody else's."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..command_group import command_group
from .keys import load_key
from .log_key import load_known_logs
from .witness import Witness

witness_app = command_group("A witness of receipt logs.")


@witness_app.callback()
def _group() -> None:
    """A witness of receipt logs."""


@witness_app.command()
def serve(
    known_logs: Annotated[Path, typer.Option(help="A file with the key lines of the logs to cosign.")],
    key: Annotated[Path, typer.Option(help="The witness's key; made if there is none.")],
    state_dir: Annotated[Path, typer.Option(help="What it saw. Never restore it from a copy.")],
    name: Annotated[str, typer.Option(help="The witness's name, of its own in the world.")] = "localhost/witness",
    host: Annotated[str, typer.Option(help="Address to serve on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to serve on.")] = 9101,
) -> None:
    """Cosign checkpoints of known logs that are consistent with all that was seen before (C2SP tlog-witness)."""
    import uvicorn

    from .witness_server import create_witness_app  # brings FastAPI

    private = Ed25519PrivateKey.from_private_bytes(load_key(key, create=True))
    with closing(Witness(state_dir, load_known_logs(known_logs), private, name)) as witness:
        typer.echo(f"http://{host}:{port} {witness.public.vkey}")
        uvicorn.run(create_witness_app(witness), host=host, port=port, log_level="warning")
