"""What a kind of hostile adapter is: who makes it, and what ingest must say of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "openlora.json"
Maker = Callable[[Path], None]


@dataclass(frozen=True)
class Hostile:
    """One kind. `make` gets the directory; it raises PermissionError where this machine doesn't allow it."""

    make: Maker
    reason: str  # a part of the reason; empty for what is ready
    status: Literal["quarantined", "ready"] = "quarantined"


def harmless(make: Maker) -> Hostile:
    """Odd, but a whole adapter that means one thing: PEFT and engine must read the same in it."""
    return Hostile(make, "", "ready")


def file(name: str, content: bytes) -> Maker:
    """A maker that writes one file."""

    def make(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return make
