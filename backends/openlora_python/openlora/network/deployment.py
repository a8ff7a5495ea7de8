"""The deployment file: which contracts, on which chain, and the check that they are what the file says.

The file is public. Nothing acts on a chain before chain id, genesis hash and the code of each contract are those of the
file: a chain that was reset, or a contract that is another one, stops every command.
"""

from __future__ import annotations

import os
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal
from urllib.parse import urlsplit

from eth_hash.auto import keccak
from eth_utils import is_checksum_address, to_checksum_address
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ..errors import ChainMismatch, InvalidArgument
from ..validation import first_fault

if TYPE_CHECKING:
    from web3 import Web3
    from web3.types import BlockData

CONTRACT_NAMES = ("AdapterRegistry", "AttributionLog", "RewardDistributor", "RewardToken")
DEVNET_CHAIN_ID = 31337
RPC_SECONDS = 10.0


def _checksummed(address: str) -> str:
    if not is_checksum_address(address):
        raise ValueError(f"{address!r} is not a checksummed address")
    return address


Address = Annotated[str, AfterValidator(_checksummed)]
Hash = Annotated[str, Field(pattern=r"^0x[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ContractPlace(_Strict):
    """Where a contract is, and keccak256 of its deployed code, immutables included."""

    address: Address
    code_hash: Hash


class ContractPlaces(_Strict):
    AdapterRegistry: ContractPlace
    AttributionLog: ContractPlace
    RewardDistributor: ContractPlace
    RewardToken: ContractPlace


class Deployment(_Strict):
    """One set of contracts. `start_block` is the first one with an event of theirs."""

    chain_id: Annotated[int, Field(ge=1, lt=2**53)]
    genesis: Hash
    rpc_url: Annotated[str, Field(pattern=r"^https?://\S+$")]
    start_block: Annotated[int, Field(ge=0)]
    confirmations: Annotated[int, Field(ge=0, le=100_000)] | Literal["finalized"]  # how a block becomes final
    contracts: ContractPlaces

    @classmethod
    def load(cls, path: Path) -> Deployment:
        """Raises InvalidArgument: there is no such file, or it is not of this form."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise InvalidArgument(
                f"can't read the deployment file {path}: {error.strerror}", field="deployment"
            ) from error
        except ValidationError as error:
            place, words = first_fault(error)
            raise InvalidArgument(f"{path}: {place or 'file'}: {words}", field="deployment") from error

    def save(self, path: Path) -> None:
        """Replace the file whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_text(self.model_dump_json(indent=1) + "\n")
        draft.rename(path)

    def connect(self) -> Web3:
        """The chain, checked against this file.

        Raises:
            Unavailable: it does not answer.
            ChainMismatch: it is another one, or a contract is; the message says what differs.
        """
        web3 = connect(self.rpc_url)
        self.check(web3)
        return web3

    def check(self, web3: Web3) -> None:
        """Raises as `connect` does."""
        from .rpc import reaching

        self.check_chain(web3)
        with reaching(self.rpc_url):
            for name in CONTRACT_NAMES:
                place: ContractPlace = getattr(self.contracts, name)
                _same(f"code hash of {name} {place.address}", place.code_hash, code_hash(web3, place.address))

    def check_chain(self, web3: Web3) -> None:
        """As `check`, without the contracts: their code does not change as long as the chain is the same."""
        from .rpc import reaching

        with reaching(self.rpc_url):
            _same("chain id", self.chain_id, web3.eth.chain_id)
            _same("genesis", self.genesis, web3.eth.get_block(0)["hash"].to_0x_hex())

    def final_block(self, web3: Web3) -> BlockData:
        """The newest block that counts as final: by the chain's word, or by `confirmations` blocks on top of it.

        Raises:
            Unavailable: the chain does not answer.
        """
        from .rpc import reaching

        with reaching(self.rpc_url):
            if self.confirmations == "finalized":
                return web3.eth.get_block("finalized")
            return web3.eth.get_block(max(web3.eth.block_number - self.confirmations, 0))

    @property
    def is_local_devnet(self) -> bool:
        """Whether this is a throw-away chain of this machine: only there keys may be public and contracts replaced."""
        return self.chain_id == DEVNET_CHAIN_ID and is_loopback(self.rpc_url)


def connect(rpc_url: str) -> Web3:
    """A client of the JSON-RPC server at `rpc_url`; nothing is asked yet."""
    from web3 import HTTPProvider, Web3

    return Web3(HTTPProvider(rpc_url, request_kwargs={"timeout": RPC_SECONDS}))


def code_hash(web3: Web3, address: str) -> str:
    """keccak256 of the code at `address`, as 0x and 64 hex digits."""
    return "0x" + keccak(bytes(web3.eth.get_code(to_checksum_address(address)))).hex()


def is_loopback(rpc_url: str) -> bool:
    """Whether the host of a URL is this machine, by its name or address alone."""
    host = urlsplit(rpc_url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _same(what: str, wanted: object, found: object) -> None:
    if wanted != found:
        raise ChainMismatch(f"{what} is {found} on this chain, {wanted} in the deployment file: nothing was done")
