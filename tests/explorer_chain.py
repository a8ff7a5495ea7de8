"""A node whose receipts are settled on a real chain, by the commands that an operator uses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from attribution_cases import BASE, card, python_environment
from chain import Devnet
from explorer_cases import DIGESTS, NAMES, Agreed, adapter_card, make_log

from openlora.attribution.card import Card, parse_card
from openlora.attribution.log_key import load_log_key
from openlora.attribution.merkle_tree import MerkleTree
from openlora.attribution.registry_reference import RegistryReference
from openlora.network.chain_facts import read_facts

DEPOSIT = 10**9


class SettledNode:
    """One epoch accepted over the first `settled` receipts and claimed by one earner, one proposed over the rest."""

    def __init__(self, devnet: Devnet, directory: Path, count: int, settled: int) -> None:
        self.devnet = devnet
        self.directory = directory
        self.state = directory / "state"
        with make_log(self.state, count, self._agree()) as log:
            self._tree = MerkleTree(log.leaf_hashes())
        self.log_id = load_log_key(str(self.state / "log.pub")).log_id
        self._run("network", "register-log", *self._key("operator"), "--state-dir", str(self.state))
        devnet.mine()
        self._anchored = (0, bytes(32))
        self._anchor(settled)
        self._run("settle", "deposit", self.log_id.hex(), str(DEPOSIT), *self._key("operator"), *self._own("operator"))
        export = directory / "export"
        self._run("receipts", "export", str(export), "--state-dir", str(self.state), deployment=False)
        self._exports = ("--export", str(export))
        self._run("settle", "propose", *self._exports, *self._key("publisher"), *self._own("publisher"))
        files = [str(directory / f"{role}.json") for role in ("attestor-1", "attestor-2")]
        for role, file in zip(("attestor-1", "attestor-2"), files, strict=True):
            self._run("settle", "attest", *self._exports, *self._key(role), "--out", file, *self._own(role))
        devnet.mine(3)
        self._run("settle", "accept", *files, *self._key("operator"), *self._own("operator"))
        self.claimed = devnet.account("owner-2").address
        claim = ("claim", self.claimed, *self._exports, *self._key("owner-2"), *self._own("operator"))
        self._run("settle", *claim)
        self._anchor(count)
        self._run("settle", "propose", *self._exports, *self._key("publisher"), *self._own("publisher"))

    def _agree(self) -> Agreed:
        base = self._register("owner-1", BASE, None, "base", card())
        adapters = {
            name: self._register("owner-2" if place % 2 else "owner-3", DIGESTS[name], BASE, name, adapter_card(name))
            for place, name in enumerate(NAMES)
        }
        facts = read_facts(self.devnet.web3, self.devnet.deployment)
        parameters = [one.args["digest"] for one in facts.of("AdapterRegistry", "ParametersPublished")][-1]
        block = self.devnet.web3.eth.get_block("latest")
        reference = RegistryReference(facts.chain_id, facts.registry, block["number"], bytes(block["hash"]))
        return Agreed(base, adapters, parameters.hex(), reference.preimage)

    def _register(self, role: str, digest: str, base: str | None, name: str, given: Card) -> Card:
        document = given.model_dump(by_alias=True, mode="json", exclude_none=True)
        return parse_card(self.devnet.register(role, digest, base, name, f"file:///{name}", document))

    def _anchor(self, size: int) -> None:
        root = self._tree.root(size)
        self.devnet.send("operator", self.devnet.contracts.log.anchor(self.log_id, *self._anchored, size, root))
        self._anchored = (size, root)

    def _key(self, role: str) -> tuple[str, str]:
        return "--key", str(self.devnet.key(role))

    def _own(self, role: str) -> tuple[str, str]:
        """Whoever settles has a state directory of its own."""
        return "--state-dir", str(self.directory / role)

    def _run(self, *words: str, deployment: bool = True) -> Any:
        command = [sys.executable, "-m", "openlora.cli", *words, "--json"]
        if deployment:
            command += ["--deployment", str(self.devnet.deployment_file)]
        done = subprocess.run(command, capture_output=True, text=True, env=python_environment(COLUMNS="400"))
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return json.loads(done.stdout)
