"""Programs of the chain's side, from npm: where they are."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..errors import Unavailable

MODULES = Path(__file__).resolve().parents[4] / "contracts" / "node_modules"


def find_tool(name: str) -> Path:
    """`anvil` or `forge`: that of contracts/node_modules, or else of PATH. Unavailable: there is none.

    It is the program itself, not npm's wrapper: signals reach it, and its process id is its own.
    """
    for found in sorted(MODULES.glob(f"@foundry-rs/{name}-*/bin/{name}")):
        return found
    on_path = shutil.which(name)
    if on_path is None:
        raise Unavailable(f"{name} is not installed: `make chain-tools` brings it")
    return Path(on_path)
