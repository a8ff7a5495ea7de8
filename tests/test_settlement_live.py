"""Settlement on a real chain, by its commands: from deposit to claim, and every way in which it is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from chain import Devnet, balance_of, settled_size_of
from eth_account import Account
from eth_account.messages import encode_typed_data
from settlement_cases import BASE, FRENCH, ZERO32, CaseLog, canonical, key_of, model, tree_root

from openlora.attribution.settlement.attestation import attest
from openlora.attribution.settlement.chain_state import Allocation, Proposal
from openlora.attribution.settlement.facts import BlockHeader
from openlora.network.chain_facts import read_facts

PRICE = 70 + 19  # 10 and 20 tokens of the two models
DEPOSIT = 10 * PRICE
REPLACE = ("propose", "--replace-root")


@dataclass
class RealChain:
    """What a `CaseLog` asks of a chain."""

    devnet: Devnet
    parameters_digest: bytes = ZERO32

    @property
    def registry(self) -> str:
        return self.devnet.deployment.contracts.AdapterRegistry.address

    @property
    def head(self) -> BlockHeader:
        block = self.devnet.web3.eth.get_block("latest")
        return BlockHeader(block["number"], bytes(block["hash"]), block["timestamp"])


@dataclass
class Network:
    """A devnet with two models and one log that is registered; `directory` is of the test."""

    devnet: Devnet
    log: CaseLog
    base: dict[str, Any]
    french: dict[str, Any]
    directory: Path
    anchored: tuple[int, bytes] = (0, ZERO32)
    exports: int = 0

    def serve(self, count: int) -> None:
        for _ in range(count):
            self.log.serve(self.base, (self.french, 1))

    def anchor(self) -> None:
        size, root = self.log.size, tree_root(self.log.rows)
        call = self.devnet.contracts.log.anchor(self.log.log_id, *self.anchored, size, root)
        self.devnet.send("operator", call)
        self.anchored = (size, root)

    def export(self) -> str:
        self.exports += 1
        return str(self.log.write(self.directory / f"export-{self.exports}"))

    def settle(self, *words: str, state: str = "state") -> subprocess.CompletedProcess[str]:
        """`openlora settle …` on this deployment."""
        command = [sys.executable, "-m", "openlora.cli", "settle", *words]
        command += ["--state-dir", str(self.directory / state), "--deployment", str(self.devnet.deployment_file)]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "400"})

    def ask(self, *words: str, state: str = "state") -> Any:
        """The same; its JSON."""
        done = self.settle(*words, "--json", state=state)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def refused(self, code: int, says: str, *words: str) -> None:
        """The command ends with this status and one line that says why."""
        done = self.settle(*words)
        assert done.returncode == code, done.stderr
        assert says in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr

    def key(self, role: str) -> tuple[str, str]:
        return "--key", str(self.devnet.key(role))

    def attest(self, export: str, *roles: str) -> list[str]:
        """Each attestor recomputes by itself, in a state directory of its own."""
        files = [str(self.directory / f"{role}-{self.exports}.json") for role in roles]
        for role, file in zip(roles, files, strict=True):
            self.ask("attest", "--export", export, *self.key(role), "--out", file, state=role)
        return files

    def drop_pending(self) -> None:
        """Leave nothing pending."""
        if self.devnet.contracts.distributor.pending().valid_at:
            self.ask("veto", *self.key("guardian"))


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Devnet]:
    with Devnet(tmp_path_factory.mktemp("devnet")) as devnet:
        yield devnet


@pytest.fixture(scope="module")
def network(chain: Devnet, tmp_path_factory: pytest.TempPathFactory) -> Network:
    owner = {role: chain.account(role).address for role in ("owner-1", "owner-2", "operator")}
    base, french = model(BASE, owner["owner-1"]), model(FRENCH, owner["owner-2"], "500000", "700000")
    registry, log_contract = chain.contracts.registry, chain.contracts.log
    digest = bytes.fromhex(BASE)
    chain.send("owner-1", registry.register(digest, ZERO32, "base", "file:///base", canonical(base)))
    chain.send(
        "owner-2",
        registry.register(bytes.fromhex(FRENCH), bytes.fromhex(BASE), "french", "file:///french", canonical(french)),
    )
    (published,) = read_facts(chain.web3, chain.deployment).of("AdapterRegistry", "ParametersPublished")
    log = CaseLog(RealChain(chain, published.args["digest"]), "node", register=False)  # type: ignore[arg-type]
    operator = owner["operator"]
    words = {"logId": log.log_id, "owner": operator, "submitter": operator, "payee": operator}
    domain = {
        "name": "OpenLoRA Log",
        "version": "1",
        "chainId": 31337,
        "verifyingContract": chain.deployment.contracts.AttributionLog.address,
    }
    types = {
        "Registration": [
            {"name": "logId", "type": "bytes32"},
            {"name": "owner", "type": "address"},
            {"name": "submitter", "type": "address"},
            {"name": "payee", "type": "address"},
        ]
    }
    signer = Account.from_key(key_of("node signer").secret)
    signature = bytes(signer.sign_message(encode_typed_data(domain, types, words)).signature)
    chain.send("operator", log_contract.register_log(log.key, operator, operator, signature))
    contracts = chain.contracts
    chain.send("operator", contracts.token.approve(contracts.distributor.address, DEPOSIT))
    chain.send("operator", contracts.distributor.deposit(log.log_id, DEPOSIT))
    return Network(chain, log, base, french, tmp_path_factory.mktemp("settle"))


def test_from_deposit_to_claim(network: Network) -> None:
    chain = network.devnet
    network.ask("deposit", network.log.log_id.hex(), "1", *network.key("operator"))
    network.serve(3)
    network.log.serve(network.base, changes={"status": 3, "price": 0})
    chain.mine()
    network.anchor()
    export = network.export()
    computed = network.ask("epoch", "--export", export)
    assert computed["proposal"]["allocations"] == [
        {"log_id": "0x" + network.log.log_id.hex(), "from": 0, "to": 4, "amount": str(3 * PRICE)}
    ]
    assert computed["void"] == {"status": {"receipts": 1, "price": "0"}}
    proposed = network.ask("propose", "--export", export, *network.key("publisher"))
    assert proposed["proposal"] == computed["proposal"]
    files = network.attest(export, "attestor-1", "attestor-2")
    accept = ("accept", *files, *network.key("operator"))
    chain.mine(3)
    assert network.ask(*accept)["epoch"] == computed["proposal"]["epoch"]
    earned = {one["account"]: int(one["cumulative"]) for one in computed["earners"]}
    token = chain.contracts.token
    before = {who: balance_of(token, who) for who in earned}
    first = sorted(earned)[0]
    one = network.ask("claim", first, "--export", export, *network.key("guardian"))
    assert one == {"claims": [{"account": first, "amount": str(earned[first]), "cumulative": str(earned[first])}]}
    rest = network.ask("claim", "--all", "--export", export, *network.key("guardian"))
    assert {one["account"] for one in rest["claims"]} == earned.keys() - {first}
    assert {who: balance_of(token, who) - before[who] for who in earned} == earned
    assert network.ask("claim", "--all", "--export", export, *network.key("guardian")) == {"claims": []}
    network.refused(10, "all of it was claimed", "claim", first, "--export", export, *network.key("guardian"))
    network.refused(2, "has earned nothing", "claim", "0x" + "77" * 20, "--export", export, *network.key("guardian"))
    status = network.ask("status", "--export", export)
    assert status["logs"] == [
        {
            "log_id": network.log.log_id.hex(),
            "deposited": str(DEPOSIT + 1),
            "available": str(DEPOSIT + 1 - 3 * PRICE),
            "anchored": 4,
            "settled": 4,
        }
    ]
    assert (status["total"], status["pending"], status["valid_at"]) == (str(3 * PRICE), None, None)
    assert status["claimed"] == str(sum(earned.values()))
    assert {who: int(amount) for who, amount in status["earners"].items()} == earned
    network.refused(2, "nothing to settle", "propose", "--export", export, *network.key("publisher"))


def test_a_second_epoch_costs_only_what_is_new_and_pays_the_difference(network: Network) -> None:
    chain = network.devnet
    network.serve(2)
    chain.mine()
    network.anchor()
    export = network.export()
    assert list((network.directory / "state" / "settle" / "prefixes").iterdir())
    computed = network.ask("epoch", "--export", export)
    assert network.ask("epoch", "--export", export, "--from-scratch") == computed
    file = str(network.directory / "facts.json")
    network.ask("facts", "--out", file, "--export", export)
    offline = json.loads(network.settle("epoch", "--export", export, "--facts", file, "--json").stdout)
    assert offline | {"head": computed["head"]} == computed
    network.ask("propose", "--export", export, *network.key("publisher"))
    network.refused(2, "is pending", "propose", "--export", export, *network.key("publisher"))
    assert network.ask("status")["pending"] == computed["proposal"]
    files = network.attest(export, "attestor-2", "attestor-3")
    chain.mine(3)
    network.ask("accept", *reversed(files), *network.key("owner-1"))
    claims = network.ask("claim", "--all", "--export", export, *network.key("owner-1"))["claims"]
    changed = [one for one in computed["earners"] if one["earns"] != "0"]
    assert {(one["account"], one["amount"], one["cumulative"]) for one in claims} == {
        (one["account"], one["earns"], one["cumulative"]) for one in changed
    }


def test_refusals_are_one_clear_line(network: Network) -> None:
    chain = network.devnet
    network.serve(1)
    chain.mine()
    network.anchor()
    export = network.export()
    exports = ("--export", export)
    network.refused(10, "does not have the role", "propose", *exports, *network.key("operator"))
    network.refused(2, "no proposal is pending", "attest", *exports, *network.key("attestor-1"), "--out", "x")
    network.refused(10, "no proposal is pending", "veto", *network.key("guardian"))
    network.refused(10, "does not have the role", "veto", *network.key("operator"))
    network.ask("propose", *exports, *network.key("publisher"))
    files = network.attest(export, "attestor-1", "attestor-2")
    chain.mine(3)
    network.refused(10, "more attestations are needed", "accept", files[0], *network.key("operator"))
    outsider = str(network.directory / "outsider.json")
    network.ask("attest", *exports, *network.key("owner-1"), "--out", outsider)
    network.refused(10, "is not an attestor", "accept", files[0], outsider, *network.key("operator"))
    log_id = network.log.log_id.hex()
    network.refused(10, "not enough of the token", "deposit", log_id, "7", *network.key("owner-3"))
    network.refused(10, "no such log", "deposit", "77" * 32, "7", *network.key("operator"))
    network.refused(2, "is not 64 hex digits", "deposit", "7", "7", *network.key("operator"))
    network.ask("veto", *network.key("guardian"))
    network.refused(2, "no proposal is pending", "accept", *files, *network.key("operator"))
    network.ask("propose", *exports, *network.key("publisher"))
    network.refused(2, "is not for the pending epoch", "accept", *files, *network.key("operator"))
    network.drop_pending()


def test_accepting_before_the_delay_is_over_is_refused(network: Network) -> None:
    chain = network.devnet
    network.serve(1)
    chain.mine()
    network.anchor()
    export = network.export()
    # Blocks are a second apart from here on, whatever this machine's clock says.
    chain.rpc("anvil_setBlockTimestampInterval", 1)
    try:
        network.ask("propose", "--export", export, *network.key("publisher"))
        files = network.attest(export, "attestor-1", "attestor-2")
        network.refused(10, "not ripe yet", "accept", *files, *network.key("operator"))
        chain.mine()
        chain.mine()
        network.ask("accept", *files, *network.key("operator"))
    finally:
        chain.rpc("anvil_removeBlockTimestampInterval")
        network.drop_pending()


@pytest.mark.parametrize("what", ["root", "amount"])
def test_nobody_attests_a_proposal_that_is_wrong(network: Network, what: str) -> None:
    chain = network.devnet
    network.serve(1)
    chain.mine()
    network.anchor()
    export = network.export()
    computed = network.ask("epoch", "--export", export)["proposal"]
    (right,) = computed["allocations"]
    allocation = Allocation(network.log.log_id, right["from"], right["to"], int(right["amount"]))
    wrong = Proposal(computed["epoch"], bytes.fromhex(computed["root"][2:]), int(computed["total"]), (allocation,))
    if what == "root":
        wrong = replace(wrong, root=b"\7" * 32)
    else:
        cheaper = replace(allocation, amount=allocation.amount - 1)
        wrong = replace(wrong, allocations=(cheaper,), total=wrong.total - 1)
    words = [Allocation(*one.words) for one in wrong.allocations]
    chain.send("publisher", chain.contracts.distributor.propose(wrong.root, wrong.total, words))
    out = network.directory / "wrong.json"
    says = "the root is 0707" if what == "root" else f"cost {allocation.amount}, not {allocation.amount - 1}"
    network.refused(11, says, "attest", "--export", export, *network.key("attestor-1"), "--out", str(out))
    assert not out.exists()
    network.drop_pending()


def test_a_wrong_root_that_was_accepted_is_replaced(network: Network) -> None:
    """By stolen keys, say: nothing more is settled or claimed, until an epoch without allocations mends it."""
    chain = network.devnet
    distributor = chain.contracts.distributor
    exports = ("--export", network.export())
    network.refused(2, "the accepted root is the computed one", *REPLACE, *exports, *network.key("publisher"))
    right = distributor.root()
    wrong = Proposal(distributor.epoch() + 1, b"\7" * 32, distributor.totals().total, ())
    chain.send("publisher", distributor.propose(wrong.root, wrong.total, ()))
    attestors = sorted((chain.account(f"attestor-{number}") for number in (1, 2)), key=lambda one: int(one.address, 16))
    signatures = [attest(one, 31337, distributor.address, wrong).signature for one in attestors]
    chain.mine(3)
    chain.send("owner-3", distributor.accept(wrong.epoch, wrong.root, wrong.total, (), signatures))
    for command in (("epoch",), ("propose", *network.key("publisher")), ("claim", "--all", *network.key("owner-1"))):
        network.refused(11, "the accepted root is 0707", *command, *exports)
    proposed = network.ask(*REPLACE, *exports, *network.key("publisher"))["proposal"]
    assert (proposed["root"], proposed["allocations"]) == ("0x" + right.hex(), [])
    files = network.attest(exports[1], "attestor-1", "attestor-3")
    chain.mine(3)
    network.ask("accept", *files, *network.key("operator"))
    assert distributor.root() == right
    network.ask("claim", "--all", *exports, *network.key("owner-1"))


def test_ways_back_are_commands(network: Network) -> None:
    chain = network.devnet
    exports = ("--export", network.export())
    network.refused(10, "does not have the role", "pause", *network.key("operator"))
    network.ask("pause", *network.key("guardian"))
    assert chain.contracts.distributor.totals().paused
    first = network.ask("status", *exports)["earners"].popitem()[0]
    network.refused(10, "is paused", "claim", first, *exports, *network.key("operator"))
    network.refused(10, "does not have the role", "unpause", *network.key("guardian"))
    network.ask("unpause", *network.key("admin"))
    assert not chain.contracts.distributor.totals().paused
    log_id, other = network.log.log_id, chain.account("owner-3").address
    deployment = ("--deployment", str(chain.deployment_file))
    told = chain.ask("set-submitter", log_id.hex(), other, *network.key("operator"), *deployment)
    assert told["submitter"] == other == chain.contracts.log.head_of(log_id).submitter
    stranger = chain.command("set-submitter", log_id.hex(), other, *network.key("owner-3"), *deployment)
    assert stranger.returncode == 10 and len(stranger.stderr.strip().splitlines()) == 1, stranger.stderr
    for nobody_and_back in ("0x" + "00" * 20, chain.account("operator").address):
        chain.ask("set-submitter", log_id.hex(), nobody_and_back, *network.key("operator"), *deployment)
        assert chain.contracts.log.head_of(log_id).submitter == nobody_and_back


def test_a_log_whose_history_was_rewritten_settles_nothing_more(network: Network) -> None:
    settled = settled_size_of(network.devnet.contracts.distributor, network.log.log_id)
    network.serve(1)
    network.devnet.mine()
    network.anchor()
    network.log.rows[settled], network.log.rows[-1] = network.log.rows[-1], network.log.rows[settled]
    network.serve(1)
    network.devnet.mine()
    network.anchor()
    computed = network.ask("epoch", "--export", network.export())
    assert computed["proposal"] is None
    assert "history rewritten" in computed["notes"][0]
