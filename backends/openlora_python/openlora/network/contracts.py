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

    base: bytes
    terms_version: int
    terms_hash: bytes
    effective_at: int
    revoked: bool


class AdapterRegistry(_Bound):
    def model_of(self, owner: str, digest: bytes, block: Block = LATEST) -> RegisteredModel:
        return RegisteredModel(*self._view("modelOf", owner, digest, block=block))

    def notice(self) -> int:
        """Seconds until later versions are in force."""
        return self._view("notice")

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
    size: int
    root: bytes
    submitter: str  # zero address: closed, or not registered


class AttributionLog(_Bound):
    def head_of(self, log_id: bytes, block: Block = LATEST) -> LogHead:
        return LogHead(*self._view("headOf", log_id, block=block))

    def owner_of(self, log_id: bytes) -> str:
        """Zero address: not registered."""
        return self._view("ownerOf", log_id)

    def register_log(self, key: LogKey, submitter: str, payee: str, signature: bytes) -> ContractFunction:
        init = (key.origin_hash, key.signer, key.checkpoint_key, key.nonce, key.predecessor)
        return self._change("registerLog", init, submitter, payee, signature)

    def set_submitter(self, log_id: bytes, submitter: str) -> ContractFunction:
        return self._change("setSubmitter", log_id, submitter)

    def anchor(
        self, log_id: bytes, previous_size: int, previous_root: bytes, size: int, root: bytes
    ) -> ContractFunction:
        return self._change("anchor", log_id, previous_size, previous_root, size, root)


@dataclass(frozen=True)
class Totals:
    total: int
    claimed: int
    paused: bool


@dataclass(frozen=True)
class Pending:
    hash: bytes  # zero: nothing is pending
    valid_at: int


class RewardDistributor(_Bound):
    def deposit(self, log_id: bytes, amount: int) -> ContractFunction:
        return self._change("deposit", log_id, amount)

    def propose(self, root: bytes, total: int, allocations: Sequence[Allocation]) -> ContractFunction:
        return self._change("propose", root, total, [one.words for one in allocations])

    def accept(
        self, epoch: int, root: bytes, total: int, allocations: Sequence[Allocation], signatures: Sequence[bytes]
    ) -> ContractFunction:
        return self._change("accept", epoch, root, total, [one.words for one in allocations], list(signatures))

    def claim(self, account: str, cumulative: int, proof: Sequence[bytes]) -> ContractFunction:
        return self._change("claim", account, cumulative, list(proof))

    def veto(self) -> ContractFunction:
        return self._change("veto")

    def pause(self) -> ContractFunction:
        return self._change("pause")

    def unpause(self) -> ContractFunction:
        return self._change("unpause")

    def grant_role(self, role: bytes, account: str) -> ContractFunction:
        return self._change("grantRole", role, account)

    def role(self, name: str) -> bytes:
        """`PUBLISHER_ROLE`, `ATTESTOR_ROLE` or `GUARDIAN_ROLE` as its 32 bytes."""
        return self._view(name)

    def deposit_of(self, log_id: bytes, block: Block = LATEST) -> int:
        return self._view("depositOf", log_id, block=block)

    def settled_size_of(self, log_id: bytes, block: Block = LATEST) -> int:
        return self._view("settledSizeOf", log_id, block=block)

    def claimed_of(self, account: str, block: Block = LATEST) -> int:
        return self._view("claimedOf", account, block=block)

    def totals(self, block: Block = LATEST) -> Totals:
        return Totals(*self._view("totals", block=block))

    def pending(self, block: Block = LATEST) -> Pending:
        return Pending(*self._view("pending", block=block))

    def epoch(self, block: Block = LATEST) -> int:
        return self._view("epoch", block=block)

    def root(self, block: Block = LATEST) -> bytes:
        return self._view("root", block=block)

    def delay(self) -> int:
        return self._view("delay")

    def epoch_cap(self) -> int:
        return self._view("epochCap")

    def threshold(self) -> int:
        return self._view("threshold")


class RewardToken(_Bound):
    def balance_of(self, account: str, block: Block = LATEST) -> int:
        return self._view("balanceOf", account, block=block)

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
    artifact = load_artifact(name)
    return web3.eth.contract(abi=artifact.abi, bytecode=artifact.bytecode).constructor(*values)
