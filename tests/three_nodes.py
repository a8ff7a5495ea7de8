"""Three nodes of one network on loopback: real servers with logs, operators, payees and deposits of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from chain import Devnet, terms_of
from chain_node import CARD
from eth_account import Account
from eth_account.signers.local import LocalAccount
from live_server import LiveServer
from make_shape import TARGETS, make_adapter, make_model
from receipt_watch import log_size
from safetensors.torch import load_file, save_file
from scripted_source import ScriptedSource
from small_server import CONFIG
from transformers import LlamaConfig
from waiting import wait_for

from openlora.adapters.catalog_reader import CatalogReader
from openlora.adapters.manifest import adapter_manifest, model_manifest
from openlora.attribution.checkpoint import verify_checkpoint
from openlora.attribution.log_key import load_log_key
from openlora.network.devnet import NOTICE_SECONDS
from openlora.network.parameters import Parameters
from openlora.network.signer import write_key
from openlora_client import Adapters, NotFinite, OpenLoRAClient

PROMPT = "the cat sat"
LONG = 3000  # tokens: seconds of work, so that a client leaves in the middle
DEPOSIT = 10**20
GAS_MONEY = 10**18
CLERKS_NEW_PRICE = 8 * 10**18 + 9
COMPLETE, CANCELLED, ERROR = 1, 2, 3


def person(name: str) -> str:
    """An address that nobody else has."""
    return Account.from_key(name.encode().rjust(32, b"\1")).address


def data_set(name: str, ppm: int, **people: int) -> dict[str, Any]:
    contributors = [{"name": who, "address": person(who), "share_ppm": share} for who, share in people.items()]
    return {"id": name, "digest": "da" * 32, "licence": "MIT", "share_ppm": ppm, "contributors": contributors}


def prices(input: int, output: int) -> dict[str, Any]:
    """So high that the last digit of every share shows in what is paid."""
    return {"version": 1, "input": str(input), "output": str(output)}


@dataclass
class Node:
    """A server, whose operator has a key, gas money and tokens. `statuses` and `prices` are what its clients saw."""

    name: str
    live: LiveServer
    network: ThreeNodes
    statuses: list[int] = field(default_factory=list)
    prices: dict[int, int] = field(default_factory=dict)  # by receipt number, of the answers that brought one

    @property
    def key(self) -> tuple[str, str]:
        return "--key", str(self.network.root / "keys" / f"{self.name}.key")

    @property
    def state(self) -> tuple[str, str]:
        return "--state-dir", str(self.live.state_dir)

    @property
    def log_id(self) -> bytes:
        return load_log_key(self.live.log_key).log_id

    @property
    def payee(self) -> str:
        return person(f"{self.name} payee")

    def register(self) -> None:
        """The log, with its payee, and the deposit."""
        place = ("--deployment", str(self.network.devnet.deployment_file))
        told = self.network.ask("network", "register-log", *self.key, "--payee", self.payee, *place, *self.state)
        self.network.ask("settle", "deposit", told["log_id"], str(DEPOSIT), *self.key, *place, *self.state)

    def adapters(self) -> list[str]:
        """What it serves."""
        with closing(CatalogReader(self.live.state_dir / "catalog.sqlite")) as reader:
            return reader.names()

    def wait_for_chain(self) -> None:
        """Until it goes by the chain's newest block."""
        newest = self.network.devnet.web3.eth.block_number
        with closing(CatalogReader(self.live.state_dir / "catalog.sqlite")) as reader:

            def look() -> bool | None:
                view = reader.chain_view()
                return True if view is not None and view.number >= newest else None

            wait_for(f"view of block {newest}", look)

    def ask(self, adapters: Adapters = None, tokens: int = 6) -> dict[str, Any]:
        """The receipt."""
        with OpenLoRAClient(self.live.grpc_url) as client:
            receipt = client.generate(PROMPT, adapters, max_tokens=tokens, temperature=0, ignore_eos=True).receipt
        self.prices[receipt["seq"]] = int(receipt["price"])
        self._noted(COMPLETE)
        return receipt

    def leave(self, adapters: Adapters = None) -> None:
        """Ask for a long answer, and go away after its first token."""
        with (
            OpenLoRAClient(self.live.grpc_url) as client,
            client.stream(PROMPT, adapters, max_tokens=LONG, temperature=0, ignore_eos=True) as chunks,
        ):
            next(chunk for chunk in chunks if chunk.token_ids)
        self._noted(CANCELLED)

    def fail(self) -> None:
        """Ask for the adapter whose numbers run over."""
        try:
            self.ask(self.network.named("overflow"))
        except NotFinite:
            self._noted(ERROR)
        else:
            raise AssertionError("an answer of numbers that are none")

    def _noted(self, status: int) -> None:
        self.statuses.append(status)
        wait_for(f"receipt {len(self.statuses) - 1}", lambda: log_size(self.live) == len(self.statuses) or None)

    def anchor(self) -> None:
        """By the anchor worker, when the server's own checkpoint covers everything."""
        wait_for("checkpoint over all receipts", lambda: self._checkpoint_size() == len(self.statuses) or None)
        place = ("--deployment", str(self.network.devnet.deployment_file))
        self.network.run("settle", "anchor", "--once", *self.key, *place, *self.state)

    def _checkpoint_size(self) -> int:
        key = load_log_key(self.live.log_key)
        try:
            return verify_checkpoint((self.live.state_dir / "log" / "checkpoint").read_bytes(), key).size
        except FileNotFoundError:
            return 0

    def export(self) -> Path:
        """Brought up to date."""
        directory = self.network.root / "exports" / self.name
        self.network.run("receipts", "export", str(directory), *self.state)
        return directory


class ThreeNodes:
    """A devnet, a source of adapters of two owners, a base of a third one, and three servers of one model."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.devnet, self.http = Devnet(root / "devnet"), ScriptedSource()
        self.names: dict[str, str] = {}
        self.digests: dict[str, str] = {}
        self.cards: dict[str, dict[str, Any]] = {}
        self.nodes: list[Node] = []

    def start(self) -> ThreeNodes:
        self.devnet.start()
        config = LlamaConfig(**{**CONFIG.to_dict(), "max_position_embeddings": 4096})
        self._shapes = make_model(self.root / "model", config, torch.float32, seed=1)
        self.digests["base"] = model_manifest(self.root / "model").digest
        web = data_set("web", 1_000_000, cid=999_999, dan=1)
        self._register("base", "owner-3", None, "openlora:base", 10**12, 2 * 10**12 + 1, [web])
        self._publish("poet", "owner-1", 3 * 10**18, 5 * 10**18 + 1, [])
        people = [data_set("letters", 333_333, ann=600_000, bob=400_000), data_set("laws", 666_667, bob=1_000_000)]
        self._publish("clerk", "owner-2", 10**18 - 1, 7_654_321 * 10**12 + 7, people)
        self._publish("overflow", "owner-2", 1, 1, [])
        for name in ("north", "south", "west"):
            self.nodes.append(Node(name, self._server(name), self))
            self.give_account(name)
        served = set(self.names.values()) - {self.names["base"]}
        with ThreadPoolExecutor(len(self.nodes)) as pool:
            list(pool.map(lambda node: node.live.start(), self.nodes))
            list(pool.map(lambda node: node.register(), self.nodes))
        for node in self.nodes:
            wait_for(f"adapters of {node.name}", lambda node=node: set(node.adapters()) == served or None)
            node.wait_for_chain()
        return self

    def give_account(self, name: str, tokens: int = DEPOSIT) -> LocalAccount:
        """An operator's: a key file, money for gas, and tokens."""
        operator = Account.from_key(f"{name} key".encode().rjust(32, b"\2"))
        write_key(self.root / "keys" / f"{name}.key", operator)
        self.devnet.rpc("anvil_setBalance", operator.address, hex(GAS_MONEY))
        self.devnet.send("admin", self.devnet.contracts.token.mint(operator.address, tokens))
        return operator

    def stop(self) -> None:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda node: node.live.stop(), self.nodes))
        self.devnet.stop()
        self.http.close()

    def named(self, name: str) -> str:
        return self.names[name]

    def called(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`openlora …` as people of the network call it."""
        command = [sys.executable, "-m", "openlora.cli", *words]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "400"})

    def run(self, *words: str) -> str:
        """Its standard output."""
        done = self.called(*words)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def ask(self, *words: str) -> Any:
        return json.loads(self.run(*words, "--json"))

    def _settle_words(self, what: str, who: str, words: tuple[str, ...]) -> list[str]:
        place = ["--deployment", str(self.devnet.deployment_file), "--state-dir", str(self.root / "people" / who)]
        return ["settle", what, *words, "--key", str(self.devnet.key(who)), *place]

    def settle(self, what: str, who: str, *words: str) -> Any:
        """`openlora settle …` by a role of the network, on a state directory of its own."""
        return self.ask(*self._settle_words(what, who, words))

    def refused(self, what: str, who: str, *words: str) -> str:
        """What it says instead."""
        done = self.called(*self._settle_words(what, who, words))
        assert done.returncode != 0, done.stdout
        return done.stderr

    def anchor_and_export(self) -> list[Path]:
        with ThreadPoolExecutor(len(self.nodes)) as pool:
            list(pool.map(Node.anchor, self.nodes))
            return list(pool.map(Node.export, self.nodes))

    def change_terms(self) -> None:
        """Another price of the clerk and other parts for everybody, in force at the newest block."""
        registry, digest = self.devnet.contracts.registry, self.digests["clerk"]
        card = {**self.cards["clerk"], "prices": prices(2 * 10**18 + 3, CLERKS_NEW_PRICE)}
        self.cards["clerk"] = card
        self.devnet.send("owner-2", registry.publish_terms(bytes.fromhex(digest), terms_of(digest, card)))
        parts = {"platform": 123_456, "node": 200_001, "adapter": 400_000, "data": 199_999, "base": 76_544}
        document = Parameters(
            schema=1,
            platform=self.devnet.account("admin").address,
            **{f"{part}_ppm": ppm for part, ppm in parts.items()},
            max_age=3600,
        ).document
        self.devnet.send("admin", registry.publish_parameters(document))
        self.devnet.mine(NOTICE_SECONDS + 1)

    def settle_epoch(self, exports: list[Path]) -> dict[str, Any]:
        """Propose with these logs, attest twice, accept, claim for everybody; what was proposed."""
        logs = [word for export in exports for word in ("--export", str(export))]
        proposed = self.settle("propose", "publisher", *logs)
        roles = ("attestor-1", "attestor-2")
        files = [str(self.root / f"{role}-{proposed['proposal']['epoch']}.json") for role in roles]
        for role, file in zip(roles, files, strict=True):
            self.settle("attest", role, *logs, "--out", file)
        self.devnet.mine(3)
        self.settle("accept", "operator", *files)
        self.settle("claim", "operator", "--all", *logs)
        return proposed["proposal"]

    def _register(
        self, name: str, role: str, base: str | None, uri: str, price_in: int, price_out: int, datasets: list[Any]
    ) -> None:
        card = {**CARD, "prices": prices(price_in, price_out), "datasets": datasets}
        self.cards[name] = self.devnet.register(role, self.digests[name], base, name, uri, card)
        self.names[name] = f"{self.devnet.account(role).address}/{name}"

    def _publish(self, name: str, role: str, price_in: int, price_out: int, datasets: list[Any]) -> None:
        folder = self.root / "remote" / name
        make_adapter(folder, self._shapes, 8, TARGETS, torch.float32, seed=len(self.digests))
        if name == "overflow":
            file = folder / "adapter_model.safetensors"
            huge = {part: tensor * 1e37 for part, tensor in load_file(file).items()}
            save_file(huge, file, metadata={"format": "pt"})
        for file in folder.iterdir():
            self.http.files[f"/{name}/{file.name}"] = file.read_bytes()
        self.digests[name] = adapter_manifest(folder).digest
        uri = f"{self.http.url}/{name}"
        self._register(name, role, self.digests["base"], uri, price_in, price_out, datasets)

    def _server(self, name: str) -> LiveServer:
        owners = [self.devnet.account(role).address for role in ("owner-1", "owner-2", "owner-3")]
        settings = {
            "engine": {"dtype": "float32", "threads": 1, "kv_cache_tokens": 8192},
            "network": {"deployment": str(self.devnet.deployment_file), "allowed_owners": owners},
        }
        return LiveServer(self.root / "model", None, self.root / name, [], settings)
