"""The devnet and its deployment file: what survives, what is deployed anew, and what stops before anything acts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from chain import Devnet, balance_of
from eth_account import Account
from live_server import free_ports
from waiting import wait_for

from openlora.errors import ChainMismatch, ContractRefused, Internal, InvalidArgument, Unavailable
from openlora.network.chain_facts import read_facts
from openlora.network.deployment import Deployment, is_loopback
from openlora.network.devnet import ROLES, DevnetOptions, ensure_deployed
from openlora.network.signer import load_signer, write_key


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Devnet]:
    """A chain that a test may break."""
    chain = Devnet(tmp_path / "devnet")
    try:
        yield chain.start()
    finally:
        chain.stop()


def children(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_what_was_sent_survives_a_stop_and_a_kill(own: Devnet) -> None:
    before = own.deployment
    token, guardian = own.contracts.token, own.account("guardian").address
    own.send("admin", token.mint(guardian, 5))
    own.stop()
    own.start()
    assert balance_of(own.contracts.token, guardian) == 5
    own.send("admin", own.contracts.token.mint(guardian, 2))
    kept = own.state_dir / "chain.json"
    block = own.web3.eth.block_number
    wait_for(
        "dump of the block", lambda: json.loads(kept.read_text())["best_block_number"] == block
    )  # a dump follows each change
    assert len(json.loads(kept.read_text())["blocks"]) == block + 1
    anvil = children(own.process.pid)
    assert len(anvil) == 1
    own.kill()
    wait_for("end of anvil", lambda: all(gone(one) for one in anvil))  # with its parent, however that ends
    for _ in range(3):  # each start brings a genesis of its own
        own.start()
        assert own.deployment == before
        own.stop()
    own.start()
    assert balance_of(own.contracts.token, guardian) == 7
    assert read_facts(own.deployment.connect(), own.deployment).head == block


def test_a_chain_that_was_lost_is_deployed_anew_here_alone(own: Devnet) -> None:
    before = own.deployment
    own.stop()
    (own.state_dir / "chain.json").unlink()
    own.start()
    assert own.deployment.genesis != before.genesis
    own.deployment.connect()
    with pytest.raises(
        ChainMismatch, match="genesis is 0x[0-9a-f]{64} on this chain, 0x[0-9a-f]{64} in the deployment"
    ):
        before.connect()
    options, web3 = DevnetOptions(own.state_dir, own.port), own.web3
    for foreign in ({"chain_id": 1}, {"rpc_url": "http://chain.example:8545"}):
        written = before.model_copy(update=foreign)
        written.save(own.deployment_file)
        with pytest.raises(ChainMismatch, match="no devnet replaces it"):
            ensure_deployed(web3, options)
        assert own.deployment == written


def test_a_chain_of_another_number_is_never_deployed_on(tmp_path: Path, own: Devnet) -> None:
    """The file is a devnet's, the chain at its place is none."""
    before = own.deployment
    own.rpc("anvil_setChainId", 4242)
    with pytest.raises(ChainMismatch, match="no devnet replaces it"):
        ensure_deployed(own.web3, DevnetOptions(own.state_dir, own.port))
    with pytest.raises(ChainMismatch, match="chain id is 4242 on this chain, 31337 in the deployment file"):
        before.connect()
    assert own.deployment == before


def test_every_difference_stops(own: Devnet) -> None:
    deployment = own.deployment
    registry = deployment.contracts.AdapterRegistry
    changed = {
        "code hash": registry.model_copy(update={"code_hash": "0x" + "ab" * 32}),
        "code hash of AdapterRegistry 0x": registry.model_copy(update={"address": own.account("owner-1").address}),
    }
    for words, place in changed.items():
        contracts = deployment.contracts.model_copy(update={"AdapterRegistry": place})
        with pytest.raises(ChainMismatch, match=words):
            deployment.model_copy(update={"contracts": contracts}).connect()
    own.rpc("anvil_setCode", registry.address, "0x60006000")
    done = own.command("revoke", "ab" * 32, "--key", str(own.key("owner-1")), "--deployment", str(own.deployment_file))
    assert (done.returncode, "code hash of AdapterRegistry" in done.stderr) == (9, True)
    own.stop()
    with pytest.raises(Unavailable, match="no chain answers at 127.0.0.1"):
        deployment.connect()


def test_a_deployment_file_is_read_strictly(devnet: Devnet, tmp_path: Path) -> None:
    tree = json.loads(devnet.deployment_file.read_text())
    file = tmp_path / "deployment.json"
    for change, words in [
        ({"chain_id": "31337x"}, "chain_id"),
        ({"more": 1}, "more"),
        ({"genesis": "0x12"}, "genesis"),
        ({"confirmations": "safe"}, "confirmations"),
        ({"contracts": {}}, "contracts.AdapterRegistry"),
    ]:
        file.write_text(json.dumps({**tree, **change}))
        with pytest.raises(InvalidArgument, match=words):
            Deployment.load(file)
    with pytest.raises(InvalidArgument, match="can't read the deployment file"):
        Deployment.load(tmp_path / "nosuch.json")


def test_one_devnet_a_directory_and_one_a_port(devnet: Devnet, tmp_path: Path) -> None:
    def start(state: Path, port: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "openlora.cli", "devnet", "--state-dir", str(state), "--port", str(port)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    again = start(devnet.state_dir, free_ports(1)[0])
    assert (again.returncode, "runs on" in again.stderr) == (7, True)
    taken = start(tmp_path / "other", devnet.port)
    assert (taken.returncode, "is taken by another program" in taken.stderr) == (7, True)
    assert not (tmp_path / "other" / "deployment.json").exists()


def test_without_anvil_it_says_what_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openlora.network.tools.MODULES", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    from openlora.network.tools import find_tool

    with pytest.raises(Unavailable, match="anvil is not installed: `make chain-tools` brings it"):
        find_tool("anvil")


def test_public_keys_are_for_this_machine_alone(devnet: Devnet, tmp_path: Path) -> None:
    for role in ROLES:
        assert devnet.key(role).stat().st_mode & 0o777 == 0o600
        for chain_id, url in [
            (1, devnet.deployment.rpc_url),
            (31337, "http://chain.example"),
            (31337, "http://10.0.0.1"),
        ]:
            with pytest.raises(InvalidArgument, match="one of anvil's keys, which everybody has"):
                load_signer(devnet.key(role), chain_id, url)
    mine = Account.create()
    write_key(tmp_path / "mine.key", mine)
    assert load_signer(tmp_path / "mine.key", 1, "http://chain.example").address == mine.address
    (tmp_path / "mine.key").chmod(0o640)
    with pytest.raises(Internal, match="others can read it"):
        load_signer(tmp_path / "mine.key", 1, "http://chain.example")


def test_what_a_loopback_is() -> None:
    for url in ("http://127.0.0.1:8545", "http://localhost", "http://[::1]:1", "http://127.9.9.9"):
        assert is_loopback(url)
    for url in ("http://127.0.0.1.example", "http://localhost.example", "http://0.0.0.0", "http://10.0.0.1", "http://"):
        assert not is_loopback(url)


def test_a_contract_s_refusal_is_one_line_with_its_values(devnet: Devnet) -> None:
    registry, owner = devnet.contracts.registry, devnet.account("owner-3").address
    with pytest.raises(ContractRefused, match=rf"UnknownModel\(owner={owner}, digest=0x{'cd' * 32}\)"):
        devnet.send("owner-3", registry.revoke(b"\xcd" * 32))
    with pytest.raises(ContractRefused, match=rf"AccessControlUnauthorizedAccount\(account={owner}, neededRole=0x"):
        devnet.send("owner-3", registry.publish_parameters("{}"))
    with pytest.raises(ContractRefused, match="NotLogOwner"):
        devnet.send("owner-3", devnet.contracts.log.set_submitter(b"\1" * 32, owner))


def test_a_new_deployment_anywhere(devnet: Devnet, tmp_path: Path) -> None:
    out = tmp_path / "deployment.json"
    words = ["deploy", "--rpc-url", devnet.deployment.rpc_url, "--key", str(devnet.key("admin")), "--out", str(out)]
    roles = [devnet.account(role).address for role in ("publisher", "attestor-1", "guardian")]
    made = devnet.ask(
        *words, "--publisher", roles[0], "--attestor", roles[1], "--guardian", roles[2], "--threshold", "1"
    )
    deployment = Deployment.load(out)
    assert deployment.confirmations == "finalized" and deployment.chain_id == made["chain_id"] == 31337
    assert deployment.contracts.AdapterRegistry != devnet.deployment.contracts.AdapterRegistry
    deployment.connect()
    again = devnet.command(*words)
    assert (again.returncode, "would be forgotten" in again.stderr) == (2, True)
