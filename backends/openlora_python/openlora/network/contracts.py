"""Thin typed bindings of the four contracts: views give dataclasses, changes give calls for `transactions.send`.

bytes32 are 32 bytes, addresses checksummed text, amounts the token's smallest unit. Views raise ContractRefused and
Unavailable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..attribution.log_key import LogKey
from ..attribution.settlement.chain_state import Allocation
from .artifacts import load_artifact
from .deployment import Deployment
from .rpc import reaching
from .transactions import rpc_url

if TYPE_CHECKING:
    from web3 import Web3
    from web3.contract.contract import Contract, ContractConstructor, ContractFunction

Block = int | str
LATEST = "latest"


class _Bound:
    """A contract of its class's name."""

    def __init__(self, web3: Web3, address: str) -> None:
        self.address = address
        self.contract: Contract = contract_at(web3, type(self).__name__, address)
        self._web3 = web3

    def _view(self, name: str, *values: Any, block: Block = LATEST) -> Any:
        with reaching(rpc_url(self._web3)):
            return self.contract.functions[name](*values).call(block_identifier=block)

    def _change(self, name: str, *values: Any) -> ContractFunction:
        return self.contract.functions[name](*values)


@dataclass(frozen=True)
class RegisteredModel:
    """The newest version of a model's terms; `terms_version` 0 = not registered."""

    base: bytes  # manifest digest; zero: it is a base model
    terms_version: int
    terms_hash: bytes
    effective_at: int  # Unix seconds
    revoked: bool


class AdapterRegistry(_Bound):
    """Models with their terms and access, and the network's parameters: JSON documents, in force after the notice."""

    def model_of(self, owner: str, digest: bytes, block: Block = LATEST) -> RegisteredModel:
        return RegisteredModel(*self._view("modelOf", owner, digest, block=block))

    def register(self, digest: bytes, base: bytes, name: str, uri: str, terms: str) -> ContractFunction:
        return self._change("register", digest, base, name, uri, terms)

    def publish_terms(self, digest: bytes, document: str) -> ContractFunction:
        return self._change("publishTerms", digest, document)

    def set_access(self, digest: bytes, document: str) -> ContractFunction:
        return self._change("setAccess", digest, document)

    def revoke(self, digest: bytes) -> ContractFunction:
        return self._change("revoke", digest)

    def publish_parameters(self, document: str) -> ContractFunction:
        return self._change("publishParameters", document)


@dataclass(frozen=True)
class LogHead:
    """What was anchored last of a log."""

    size: int  # receipts
    root: bytes  # of their RFC 6962 tree
    submitter: str  # zero address: closed, or not registered


class AttributionLog(_Bound):
    """Receipt logs and their anchored heads, by log id."""

    def head_of(self, log_id: bytes, block: Block = LATEST) -> LogHead:
        return LogHead(*self._view("headOf", log_id, block=block))

    def register_log(self, key: LogKey, submitter: str, payee: str, signature: bytes) -> ContractFunction:
        """`payee` earns the node's part, for good; `signature`: the receipt key's, as `registration_signature`."""
        init = (key.origin_hash, key.signer, key.checkpoint_key, key.nonce, key.predecessor)
        return self._change("registerLog", init, submitter, payee, signature)

    def set_submitter(self, log_id: bytes, submitter: str) -> ContractFunction:
        """Who anchors from now on; zero: nobody. The log's owner's."""
        return self._change("setSubmitter", log_id, submitter)

    def anchor(
        self, log_id: bytes, previous_size: int, previous_root: bytes, size: int, root: bytes
    ) -> ContractFunction:
        """Compare and set: refused unless the head is (`previous_size`, `previous_root`)."""
        return self._change("anchor", log_id, previous_size, previous_root, size, root)


@dataclass(frozen=True)
class Totals:
    """Of all accepted epochs, in the token's smallest unit."""

    total: int
    claimed: int
    paused: bool


@dataclass(frozen=True)
class Pending:
    """The proposal that waits for its attestations and its delay."""

    hash: bytes  # zero: nothing is pending
    valid_at: int  # Unix seconds; accepted from then on


class RewardDistributor(_Bound):
    """Deposits of logs, epochs of rewards as cumulative Merkle roots, and claims from the accepted one."""

    def deposit(self, log_id: bytes, amount: int) -> ContractFunction:
        """From the sender, who has approved the distributor for so much; there is no way back."""
        return self._change("deposit", log_id, amount)

    def propose(self, root: bytes, total: int, allocations: Sequence[Allocation]) -> ContractFunction:
        """`total`: cumulative, of all epochs up to this one."""
        return self._change("propose", root, total, [one.words for one in allocations])

    def accept(
        self, epoch: int, root: bytes, total: int, allocations: Sequence[Allocation], signatures: Sequence[bytes]
    ) -> ContractFunction:
        """`signatures`: of attestors, 65 bytes each, by ascending address."""
        return self._change("accept", epoch, root, total, [one.words for one in allocations], list(signatures))

    def claim(self, account: str, cumulative: int, proof: Sequence[bytes]) -> ContractFunction:
        """Pays `account` what of `cumulative`, its reward in the accepted root, it was not paid before."""
        return self._change("claim", account, cumulative, list(proof))

    def veto(self) -> ContractFunction:
        """Drops the pending proposal."""
        return self._change("veto")

    def pause(self) -> ContractFunction:
        """Stops propose, accept and claim; a guardian's."""
        return self._change("pause")

    def unpause(self) -> ContractFunction:
        """The admin's."""
        return self._change("unpause")

    def grant_role(self, role: bytes, account: str) -> ContractFunction:
        return self._change("grantRole", role, account)

    def role(self, name: str) -> bytes:
        """`PUBLISHER_ROLE`, `ATTESTOR_ROLE` or `GUARDIAN_ROLE` as its 32 bytes."""
        return self._view(name)

    def claimed_of(self, account: str, block: Block = LATEST) -> int:
        """Paid to the account so far."""
        return self._view("claimedOf", account, block=block)

    def totals(self, block: Block = LATEST) -> Totals:
        return Totals(*self._view("totals", block=block))

    def pending(self, block: Block = LATEST) -> Pending:
        return Pending(*self._view("pending", block=block))

    def epoch(self, block: Block = LATEST) -> int:
        """Number of the newest proposal, pending or not; 0 before the first."""
        return self._view("epoch", block=block)

    def root(self, block: Block = LATEST) -> bytes:
        """Of the accepted epoch's cumulative rewards."""
        return self._view("root", block=block)

    def epoch_cap(self) -> int:
        """The most that one epoch may add to the total."""
        return self._view("epochCap")


class RewardToken(_Bound):
    """The ERC-20 that rewards are paid in; one of ours can be minted by its owner."""

    def approve(self, spender: str, amount: int) -> ContractFunction:
        return self._change("approve", spender, amount)

    def mint(self, to: str, amount: int) -> ContractFunction:
        return self._change("mint", to, amount)


@dataclass(frozen=True)
class Contracts:
    """All four of a deployment, on a connected chain."""

    registry: AdapterRegistry
    log: AttributionLog
    distributor: RewardDistributor
    token: RewardToken


def contracts_of(web3: Web3, deployment: Deployment) -> Contracts:
    """Those of a deployment that was checked: `Deployment.connect` gives such a `web3`."""
    places = deployment.contracts
    return Contracts(
        AdapterRegistry(web3, places.AdapterRegistry.address),
        AttributionLog(web3, places.AttributionLog.address),
        RewardDistributor(web3, places.RewardDistributor.address),
        RewardToken(web3, places.RewardToken.address),
    )


def contract_at(web3: Web3, name: str, address: str) -> Contract:
    """web3's own object of a contract, by the name of its artifact."""
    return web3.eth.contract(address=address, abi=load_artifact(name).abi)


def constructor_of(web3: Web3, name: str, *values: Any) -> ContractConstructor:
    """What deploys a contract, by the name of its artifact, with the values that its constructor takes."""
    artifact = load_artifact(name)
    return web3.eth.contract(abi=artifact.abi, bytecode=artifact.bytecode).constructor(*values)
