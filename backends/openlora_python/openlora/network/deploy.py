"""Putting the contracts on a chain, once, and the deployment file that says where they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from eth_account.signers.local import LocalAccount

from .contracts import RewardDistributor, constructor_of, contract_at
from .deployment import ContractPlace, ContractPlaces, Deployment, code_hash
from .rpc import reaching
from .transactions import rpc_url, send

if TYPE_CHECKING:
    from web3 import Web3
    from web3.contract.contract import ContractConstructor

Progress = Callable[[str], None]


@dataclass(frozen=True)
class DeploymentPlan:
    """What is fixed for good. Addresses are checksummed; `token` None: a new RewardToken, the deployer's to mint."""

    notice_seconds: int
    delay_seconds: int
    epoch_cap: int  # the token's smallest unit
    threshold: int
    publishers: Sequence[str] = ()
    attestors: Sequence[str] = ()
    guardians: Sequence[str] = ()
    token: str | None = None
    confirmations: int | Literal["finalized"] = "finalized"


def deploy(web3: Web3, account: LocalAccount, plan: DeploymentPlan, progress: Progress = lambda _: None) -> Deployment:
    """Deploy the contracts with `account` as their admin, and give the roles.

    Raises:
        ContractRefused, Unavailable: what is on the chain by then stays there; a new call deploys all anew.
    """
    first_block: int | None = None

    def put(name: str, constructor: ContractConstructor) -> str:
        nonlocal first_block
        progress(f"deploying {name}")
        receipt = send(web3, account, constructor)
        first_block = receipt["blockNumber"] if first_block is None else first_block
        return receipt["contractAddress"]

    admin = account.address
    token = plan.token or put("RewardToken", constructor_of(web3, "RewardToken", admin))
    registry = put("AdapterRegistry", constructor_of(web3, "AdapterRegistry", admin, plan.notice_seconds))
    log = put("AttributionLog", constructor_of(web3, "AttributionLog"))
    values = (token, log, admin, plan.delay_seconds, plan.epoch_cap, plan.threshold)
    distributor = put("RewardDistributor", constructor_of(web3, "RewardDistributor", *values))
    roles = RewardDistributor(web3, distributor)
    for role, holders in (
        ("PUBLISHER_ROLE", plan.publishers),
        ("ATTESTOR_ROLE", plan.attestors),
        ("GUARDIAN_ROLE", plan.guardians),
    ):
        for holder in holders:
            progress(f"{role} to {holder}")
            send(web3, account, roles.grant_role(roles.role(role), holder))
    parameters = contract_at(web3, "AdapterRegistry", registry).functions
    with reaching(rpc_url(web3)):
        role_hash = parameters.PARAMETERS_ROLE().call()
    progress("PARAMETERS_ROLE to the admin")
    send(web3, account, parameters.grantRole(role_hash, admin))
    addresses = {
        "AdapterRegistry": registry,
        "AttributionLog": log,
        "RewardDistributor": distributor,
        "RewardToken": token,
    }
    with reaching(rpc_url(web3)):
        places = {name: ContractPlace(address=at, code_hash=code_hash(web3, at)) for name, at in addresses.items()}
        return Deployment(
            chain_id=web3.eth.chain_id,
            genesis=web3.eth.get_block(0)["hash"].to_0x_hex(),
            rpc_url=rpc_url(web3),
            start_block=first_block,
            confirmations=plan.confirmations,
            contracts=ContractPlaces(**places),
        )
