"""A node's state directory without a server, adapters of owners at a real HTTP source, and passes over a real chain."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from chain import Devnet
from make_shape import TARGETS, make_adapter, make_model
from scripted_source import ScriptedSource
from small_server import CONFIG

from openlora.adapters.catalog import Catalog
from openlora.adapters.catalog_reader import CatalogReader
from openlora.adapters.catalog_rows import BaseFacts
from openlora.adapters.manifest import adapter_manifest, model_manifest
from openlora.config import NetworkSettings
from openlora.network.sync import CatalogSync

CARD = {"schema": 1, "owner": "0x" + "00" * 20, "licence": "MIT", "prices": {"version": 1, "input": 1, "output": 2}}


@dataclass
class ChainNode:
    """`owners` are the roles whose adapters are followed."""

    root: Path
    devnet: Devnet
    http: ScriptedSource
    owners: tuple[str, ...] = ("owner-1",)
    seed: int = 0
    shapes: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.shapes = make_model(self.root / "model", CONFIG, torch.float32, seed=1 + self.seed)
        self.base = BaseFacts(str(self.root / "model"), model_manifest(self.root / "model").digest, 64)
        with Catalog(self.catalog_path) as catalog:
            catalog.set_base(self.base)
        self.reader = CatalogReader(self.catalog_path)
        self.sync = CatalogSync(self.state, self.settings, self.devnet.deployment, self.devnet.web3)

    def close(self) -> None:
        self.sync.close()
        self.reader.close()

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def catalog_path(self) -> Path:
        return self.state / "catalog.sqlite"

    @property
    def settings(self) -> NetworkSettings:
        owners = tuple(self.devnet.account(role).address for role in self.owners)
        return NetworkSettings(deployment=self.devnet.deployment_file, allowed_owners=owners)

    def publish(self, name: str, role: str = "owner-1", on_chain: str | None = None, **changes: Any) -> str:
        """Make an adapter, put it at the source, and register it; its digest."""
        folder = self.root / "remote" / name
        make_adapter(folder, self.shapes, 8, TARGETS, torch.float32, seed=1000 * self.seed + len(self.http.files) + 1)
        for file in folder.iterdir():
            self.http.files[f"/{name}/{file.name}"] = file.read_bytes()
        digest = adapter_manifest(folder).digest
        uri = changes.pop("uri", f"{self.http.url}/{name}")
        base = changes.pop("base", self.base.digest)
        self.devnet.register(role, digest, base, on_chain or name, uri, {**CARD, **changes})
        return digest

    def address(self, role: str = "owner-1") -> str:
        return self.devnet.account(role).address

    def names(self) -> list[str]:
        """What answers."""
        return self.reader.names()

    def write_access(self, rule: dict[str, Any]) -> Path:
        file = self.root / "access.json"
        file.write_text(json.dumps(rule))
        return file
