"""The server of the page."""

from __future__ import annotations

from pathlib import Path

import uvicorn
from rich.console import Console

from .app import create_app
from .settlement_view import SettlementView


class PageServer(uvicorn.Server):
    """Says where the page is once it is there."""

    def __init__(self, state_dir: Path, view: SettlementView, host: str, port: int) -> None:
        super().__init__(uvicorn.Config(create_app(state_dir, view), host, port, log_level="warning"))

    async def startup(self, sockets: list | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            Console(stderr=True).print(f"explorer at http://{host}:{port}/", highlight=False, soft_wrap=True)
