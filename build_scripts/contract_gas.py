"""What transactions cost, measured on anvil with the committed artifacts: `--write` puts it into contracts/gas.json.

Total gas of each transaction, from its receipt. Keys, values and time are fixed, so the figures are exact and the same
everywhere; a difference is a change of the contracts or of the chain's rules.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eth_account import Account
from eth_account.signers.local import LocalAccount
from eth_hash.auto import keccak
from web3 import HTTPProvider, Web3
from web3.contract import Contract

from openlora.network.artifacts import load_artifact
from openlora.network.tools import find_tool

GAS_FILE = Path(__file__).resolve().parents[1] / "contracts" / "gas.json"
EARNERS = 131_072
DELAY = 60


@contextmanager
def local_chain() -> Iterator[Web3]:
    """A fresh anvil on a free port of the loopback, always at the same time of day."""
    command = [str(find_tool("anvil")), "--port", "0", "--host", "127.0.0.1", "--timestamp", "1800000000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"Listening on (\S+)", line):
                break
        else:
            raise RuntimeError(f"anvil did not start: {''.join(said)}")
        yield Web3(HTTPProvider(f"http://{found[1]}", cache_allowed_requests=True))
    finally:
        process.terminate()
        process.communicate(timeout=10)


def key_of(name: str) -> LocalAccount:
    return Account.from_key(keccak(f"gas: {name}".encode()))


class Ledger:
    """Sends transactions and notes the gas of those that have a name."""

    def __init__(self, web3: Web3) -> None:
        self.web3 = web3
        self.gas: dict[str, int] = {}
        self.admin = web3.eth.accounts[0]

    def send(self, call: Any, name: str | None = None, sender: str | None = None) -> Any:
        sent = call.transact({"from": sender or self.admin, "gas": 8_000_000})
        receipt = self.web3.eth.wait_for_transaction_receipt(sent, poll_latency=0.005)
        if receipt["status"] != 1:
            raise RuntimeError(f"{name or call} failed")
        if name is not None:
            self.gas[name] = receipt["gasUsed"]
        return receipt

    def deploy(self, name: str, *values: Any) -> Contract:
        artifact = load_artifact(name)
        factory = self.web3.eth.contract(abi=artifact.abi, bytecode=artifact.bytecode)
        receipt = self.send(factory.constructor(*values), f"deploy {name}")
        return self.web3.eth.contract(address=receipt["contractAddress"], abi=artifact.abi)


class RewardTree:
    """OpenZeppelin's standard tree, as docs/settlement.md says it."""

    def __init__(self, chain_id: int, distributor: str, amounts: dict[bytes, int]) -> None:
        domain = chain_id.to_bytes(32, "big") + bytes(12) + bytes.fromhex(distributor[2:])
        self._leaves = {
            account: keccak(keccak(domain + bytes(12) + account + amount.to_bytes(32, "big")))
            for account, amount in amounts.items()
        }
        ordered = sorted(self._leaves.values())
        self._nodes = [b""] * (len(ordered) - 1) + ordered[::-1]
        for place in range(len(ordered) - 2, -1, -1):
            low, high = sorted(self._nodes[2 * place + 1 : 2 * place + 3])
            self._nodes[place] = keccak(low + high)
        self.root = self._nodes[0]

    def proof(self, account: bytes) -> list[bytes]:
        place = self._nodes.index(self._leaves[account])
        hashes = []
        while place > 0:
            hashes.append(self._nodes[place + 1 if place % 2 else place - 1])
            place = (place - 1) // 2
        return hashes


def measure(web3: Web3) -> dict[str, int]:
    """Gas by transaction."""
    ledger = Ledger(web3)
    token = ledger.deploy("RewardToken", ledger.admin)
    registry = ledger.deploy("AdapterRegistry", ledger.admin, 86400)
    log = ledger.deploy("AttributionLog")
    distributor = ledger.deploy("RewardDistributor", token.address, log.address, ledger.admin, DELAY, 10**27, 2)
    _measure_registry(ledger, registry)
    log_ids = [_register_log(ledger, log, f"log {number}") for number in range(32)]
    _measure_anchors(ledger, log, log_ids[0])
    for log_id in log_ids[1:]:
        ledger.send(log.functions.anchor(log_id, 0, bytes(32), 10_000, keccak(log_id)))
    _measure_rewards(ledger, token, distributor, sorted(log_ids))
    return ledger.gas


def _measure_registry(ledger: Ledger, registry: Contract) -> None:
    document = json.dumps({"datasets": [], "digest": "5" * 64, "input": "100", "output": "300", "owner": ledger.admin})
    digest, base = keccak(b"adapter"), keccak(b"base")
    call = registry.functions.register(digest, base, "name", "https://example.org/adapter", document)
    ledger.send(call, "register a model")
    ledger.send(registry.functions.publishTerms(digest, document), "publish terms")
    ledger.send(registry.functions.setAccess(digest, '{"kind":"public"}'), "set access")
    ledger.send(registry.functions.revoke(digest), "revoke")


def _register_log(ledger: Ledger, log: Contract, name: str) -> bytes:
    signer = key_of(name)
    init = (keccak(name.encode()), signer.address, keccak(b"checkpoint"), keccak(b"nonce"), bytes(32))
    log_id = log.functions.logIdOf(init).call()
    registration = {
        "types": {
            "EIP712Domain": [
                {"name": "name", "type": "string"},
                {"name": "version", "type": "string"},
                {"name": "chainId", "type": "uint256"},
                {"name": "verifyingContract", "type": "address"},
            ],
            "Registration": [
                {"name": "logId", "type": "bytes32"},
                {"name": "owner", "type": "address"},
                {"name": "submitter", "type": "address"},
                {"name": "payee", "type": "address"},
            ],
        },
        "domain": {
            "name": "OpenLoRA Log",
            "version": "1",
            "chainId": ledger.web3.eth.chain_id,
            "verifyingContract": log.address,
        },
        "primaryType": "Registration",
        "message": {"logId": log_id, "owner": ledger.admin, "submitter": ledger.admin, "payee": signer.address},
    }
    signature = signer.sign_typed_data(full_message=registration).signature
    call = log.functions.registerLog(init, ledger.admin, signer.address, signature)
    ledger.send(call, "register a log" if name == "log 0" else None)
    return log_id


def _measure_anchors(ledger: Ledger, log: Contract, log_id: bytes) -> None:
    head = (0, bytes(32))
    for name, size in (
        ("anchor, first", 10_000),
        ("anchor, again", 20_000),
        ("anchor, again, of 2^63 receipts", 2**63),
        ("anchor, again, of the greatest size", 2**64 - 1),
    ):
        root = hashlib.sha256(name.encode()).digest()
        ledger.send(log.functions.anchor(log_id, *head, size, root), name)
        head = (size, root)


def _measure_rewards(ledger: Ledger, token: Contract, distributor: Contract, log_ids: list[bytes]) -> None:
    attestors = sorted((key_of("attestor 1"), key_of("attestor 2")), key=lambda key: key.address.lower())
    publisher_role = distributor.functions.PUBLISHER_ROLE().call()
    attestor_role = distributor.functions.ATTESTOR_ROLE().call()
    ledger.send(distributor.functions.grantRole(publisher_role, ledger.admin))
    for attestor in attestors:
        ledger.send(distributor.functions.grantRole(attestor_role, attestor.address))
    ledger.send(token.functions.mint(ledger.admin, 10**30))
    ledger.send(token.functions.approve(distributor.address, 10**30))
    ledger.send(distributor.functions.deposit(log_ids[0], 10**25), "deposit, first")
    for log_id in log_ids:
        ledger.send(distributor.functions.deposit(log_id, 10**25), "deposit, again" if log_id == log_ids[0] else None)

    def settle(tree: RewardTree, total: int, allocations: list[tuple[bytes, int, int, int]], name: str | None) -> None:
        ledger.send(distributor.functions.propose(tree.root, total, allocations), name and f"propose, {name}")
        epoch = distributor.functions.epoch().call()
        digest, _ = distributor.functions.pending().call()
        signatures = [attestor.unsafe_sign_hash(digest).signature for attestor in attestors]
        ledger.web3.provider.make_request("evm_increaseTime", [DELAY])
        call = distributor.functions.accept(epoch, tree.root, total, allocations, signatures)
        ledger.send(call, name and f"accept, {name}")

    accounts = [keccak(number.to_bytes(4, "big"))[12:] for number in range(EARNERS)]
    amounts = {account: 10**18 + place for place, account in enumerate(accounts)}
    total = sum(amounts.values())
    share = total // 32
    chain_id = ledger.web3.eth.chain_id
    first = RewardTree(chain_id, distributor.address, amounts)
    allocations = [(log_id, 0, 5_000, share) for log_id in log_ids]
    settle(first, 32 * share, allocations, "32 logs")
    earner = accounts[1000]
    address = Web3.to_checksum_address(earner)
    proof = first.proof(earner)
    ledger.send(distributor.functions.claim(address, amounts[earner], proof), f"claim, first, {EARNERS} earners")

    amounts[earner] += 10**17
    second = RewardTree(chain_id, distributor.address, amounts)
    settle(second, 32 * share + 10**17, [(log_ids[0], 5_000, 6_000, 10**17)], "1 log")
    proof = second.proof(earner)
    ledger.send(distributor.functions.claim(address, amounts[earner], proof), f"claim, again, {EARNERS} earners")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"to {GAS_FILE.name}")
    write = parser.parse_args().write
    with local_chain() as web3:
        gas = measure(web3)
    text = json.dumps(gas, indent=1) + "\n"
    print(text, end="")
    if write:
        GAS_FILE.write_text(text)


if __name__ == "__main__":
    main()
