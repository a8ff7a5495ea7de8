"""A real chain for tests: `openlora devnet` in a process of its own, on a free port, and what tests do on it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from eth_account.signers.local import LocalAccount
from live_server import free_ports
from waiting import wait_for
from web3 import Web3

from openlora.attribution.blobs import model_terms, model_terms_document
from openlora.attribution.card import parse_card
from openlora.network.contracts import Contracts, RewardDistributor, RewardToken, contracts_of
from openlora.network.deployment import Deployment
from openlora.network.signer import load_signer
from openlora.network.transactions import send


@dataclass
class Devnet:
    """A devnet over `state_dir`. Blocks come with transactions, and with `mine`."""

    state_dir: Path
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Devnet:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> Devnet:
        self.port = self.port or free_ports(1)[0]
        self.state_dir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "openlora.cli", "devnet", "--state-dir", str(self.state_dir)]
        with (self.state_dir / "devnet.log").open("ab") as words:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port), "--block-seconds", "0"],
                stdin=subprocess.DEVNULL,
                stdout=words,
                stderr=words,
                start_new_session=True,
            )
        wait_for("devnet", self._is_ready, words=self.words)
        return self

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, f"the devnet ended:\n{self.words()}"
        try:
            return int((self.state_dir / "ready").read_text()) == self.process.pid
        except (FileNotFoundError, ValueError):
            return False

    def words(self) -> str:
        return (self.state_dir / "devnet.log").read_text()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(30)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def deployment_file(self) -> Path:
        return self.state_dir / "deployment.json"

    @property
    def deployment(self) -> Deployment:
        return Deployment.load(self.deployment_file)

    @cached_property
    def web3(self) -> Web3:
        return self.deployment.connect()

    @property
    def contracts(self) -> Contracts:
        return contracts_of(self.web3, self.deployment)

    def key(self, role: str) -> Path:
        return self.state_dir / "keys" / f"{role}.key"

    def account(self, role: str) -> LocalAccount:
        return load_signer(self.key(role), 31337, self.deployment.rpc_url)

    def send(self, role: str, call: Any) -> Any:
        """The transaction's receipt."""
        return send(self.web3, self.account(role), call)

    def rpc(self, method: str, *values: Any) -> Any:
        return rpc(self.web3, method, *values)

    def mine(self, seconds: int = 0) -> None:
        """One block more, so many seconds after the newest one."""
        if seconds:
            self.rpc("evm_increaseTime", seconds)
        self.rpc("evm_mine")

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`openlora network …` on this deployment, as a user calls it."""
        return subprocess.run(
            [sys.executable, "-m", "openlora.cli", "network", *words],
            capture_output=True,
            text=True,
            env={**os.environ, "COLUMNS": "400"},
        )

    def ask(self, *words: str) -> Any:
        """The same; its JSON."""
        done = self.command(*words, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def register(
        self, role: str, digest: str, base: str | None, name: str, uri: str, card: dict[str, Any]
    ) -> dict[str, Any]:
        """Register a model by a card that this role's account owns; the card."""
        mine = {**card, "owner": self.account(role).address}
        terms = terms_of(digest, mine)
        base_digest = bytes(32) if base is None else bytes.fromhex(base)
        self.send(role, self.contracts.registry.register(bytes.fromhex(digest), base_digest, name, uri, terms))
        return mine


def rpc(web3: Web3, method: str, *values: Any) -> Any:
    """The result of a method that web3 has no name for."""
    answer = web3.provider.make_request(method, list(values))
    assert "error" not in answer, f"{method}: {answer['error']}"
    return answer["result"]


def terms_of(digest: str, card: dict[str, Any]) -> str:
    """The terms document of a card."""
    return model_terms_document(model_terms(digest, parse_card(card))).decode()


def deposit_of(distributor: RewardDistributor, log_id: bytes) -> int:
    return distributor.contract.functions.depositOf(log_id).call()


def settled_size_of(distributor: RewardDistributor, log_id: bytes) -> int:
    return distributor.contract.functions.settledSizeOf(log_id).call()


def balance_of(token: RewardToken, account: str) -> int:
    return token.contract.functions.balanceOf(account).call()
