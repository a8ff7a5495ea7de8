"""`openlora network register-model | publish-terms | …`: what owners and operators write to the chain."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidArgument
from .arguments import AsJson, DeploymentFile, Key, StateDir, deployment_file, parse_address, parse_hash

if TYPE_CHECKING:
    from eth_account.signers.local import LocalAccount
    from web3 import Web3
    from web3.contract.contract import ContractFunction

    from .contracts import Contracts
    from .deployment import Deployment

ModelArgument = Annotated[str, typer.Argument(metavar="PATH|NAME", help="Directory of a model, or an adapter's name.")]
CardFile = Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Terms, in place of its own card.")]
Digest = Annotated[str, typer.Argument(metavar="DIGEST", help="Manifest digest of the model, 64 hex digits.")]


def register_model(
    model: ModelArgument,
    key: Key,
    uri: Annotated[str | None, typer.Option(help="Where nodes fetch it; default: the source in the catalog.")] = None,
    name: Annotated[str | None, typer.Option(help="Its name there; default: that of here.")] = None,
    base: Annotated[str | None, typer.Option(help="Digest of an adapter's base; default: what is known of it.")] = None,
    card: CardFile = None,
    deployment: DeploymentFile = None,
    state_dir: StateDir = Path("var"),
    as_json: AsJson = False,
) -> None:
    """Register a model under its digest, with the terms and the access of its card."""
    from .registration import local_model

    found = local_model(model, card, state_dir)
    base_digest = parse_hash(base, "base") if base is not None else found.base
    if found.is_adapter and base_digest is None:
        raise InvalidArgument("the card names no base model: give --base DIGEST", field="base")
    place = uri or found.source
    if "://" not in place:
        if found.is_adapter:
            raise InvalidArgument("nodes fetch it from a URI (https://…, s3://…, hf://…): give --uri", field="uri")
        place = place or f"openlora:{found.digest.hex()}"  # nobody fetches base models from here
    chain = _Sending(deployment, key)
    terms = found.terms(chain.account.address)
    registry = chain.contracts.registry
    chain.send(registry.register(found.digest, base_digest or bytes(32), name or found.name, place, terms))
    if found.access is not None:
        chain.send(registry.set_access(found.digest, found.access))
    chain.tell(
        as_json,
        f"{name or found.name} ({found.digest.hex()[:16]}…) is registered by {chain.account.address}",
        digest=found.digest.hex(),
        owner=chain.account.address,
        terms=terms,
    )


def publish_terms(
    model: ModelArgument,
    key: Key,
    card: CardFile = None,
    deployment: DeploymentFile = None,
    state_dir: StateDir = Path("var"),
    as_json: AsJson = False,
) -> None:
    """Publish a registered model's card as the next version of its terms; in force after the notice."""
    from .registration import local_model

    found = local_model(model, card, state_dir)
    chain = _Sending(deployment, key)
    terms = found.terms(chain.account.address)
    chain.send(chain.contracts.registry.publish_terms(found.digest, terms))
    newest = chain.contracts.registry.model_of(chain.account.address, found.digest)
    chain.tell(
        as_json,
        f"version {newest.terms_version} of the terms of {found.name}, in force from {_when(newest.effective_at)}",
        digest=found.digest.hex(),
        version=newest.terms_version,
        effective_at=newest.effective_at,
        terms=terms,
    )


def set_access(
    digest: Digest,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON of an access rule, as in a card.")],
    key: Key,
    deployment: DeploymentFile = None,
    as_json: AsJson = False,
) -> None:
    """Say who may use a model of yours; effective at once."""
    from .registration import access_document, parse_access, read_json

    document = access_document(parse_access(read_json(file)))
    chain = _Sending(deployment, key)
    chain.send(chain.contracts.registry.set_access(parse_hash(digest, "DIGEST"), document))
    chain.tell(as_json, f"access of {digest[:16]}…: {document}", digest=digest, access=document)


def revoke(digest: Digest, key: Key, deployment: DeploymentFile = None, as_json: AsJson = False) -> None:
    """Revoke a model of yours, for good."""
    chain = _Sending(deployment, key)
    chain.send(chain.contracts.registry.revoke(parse_hash(digest, "DIGEST")))
    chain.tell(as_json, f"{digest[:16]}… is revoked", digest=digest)


def register_log(
    key: Key,
    submitter: Annotated[str | None, typer.Option(help="Who may anchor; default: the key's account.")] = None,
    payee: Annotated[str | None, typer.Option(help="Who earns the node's part, for good; default: likewise.")] = None,
    deployment: DeploymentFile = None,
    state_dir: StateDir = Path("var"),
    as_json: AsJson = False,
) -> None:
    """Register the receipt log of a server; its receipt key signs that, so it is called on the serving machine."""
    from ..attribution.keys import load_keys
    from ..attribution.log_key import load_log_key
    from .registration import registration_signature

    log_key = load_log_key(str(state_dir / "log.pub"))
    signer = load_keys(state_dir / "keys", create=False).receipt
    chain = _Sending(deployment, key)
    owner = chain.account.address
    who = [owner if one is None else parse_address(one, "address") for one in (submitter, payee)]
    signature = registration_signature(chain.deployment, signer, log_key, owner, *who)
    chain.send(chain.contracts.log.register_log(log_key, *who, signature))
    chain.tell(
        as_json,
        f"log {log_key.log_id.hex()[:16]}… is registered; {who[0]} anchors it, {who[1]} is paid",
        log_id=log_key.log_id.hex(),
        owner=owner,
        submitter=who[0],
        payee=who[1],
    )


def set_submitter(
    log_id: Annotated[str, typer.Argument(metavar="LOG", help="The log's id, 64 hex digits.")],
    submitter: Annotated[str, typer.Argument(metavar="ADDRESS", help="Who may anchor; zeros: nobody for now.")],
    key: Key,
    deployment: DeploymentFile = None,
    as_json: AsJson = False,
) -> None:
    """Say who anchors a log of yours from now on; the key is its owner's."""
    log, who = parse_hash(log_id, "LOG"), parse_address(submitter, "ADDRESS")
    chain = _Sending(deployment, key)
    chain.send(chain.contracts.log.set_submitter(log, who))
    chain.tell(as_json, f"{who} anchors log {log.hex()[:16]}…", log_id=log.hex(), submitter=who)


def publish_parameters(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON of the parameters; see docs/settlement.md.")],
    key: Key,
    deployment: DeploymentFile = None,
    as_json: AsJson = False,
) -> None:
    """Publish the next version of the network's parameters; in force after the notice."""
    from .parameters import parse_parameters
    from .registration import read_json

    document = parse_parameters(read_json(file)).document
    chain = _Sending(deployment, key)
    chain.send(chain.contracts.registry.publish_parameters(document))
    chain.tell(as_json, f"published: {document}", parameters=document)


class _Sending:
    """A checked chain and the account of a key file, for one command."""

    def __init__(self, deployment: Path | None, key: Path) -> None:
        from .contracts import contracts_of
        from .deployment import Deployment
        from .signer import load_signer

        self.deployment: Deployment = Deployment.load(deployment_file(deployment))
        self.account: LocalAccount = load_signer(key, self.deployment.chain_id, self.deployment.rpc_url)
        self._web3: Web3 = self.deployment.connect()
        self.contracts: Contracts = contracts_of(self._web3, self.deployment)
        self.transactions: list[str] = []

    def send(self, call: ContractFunction) -> None:
        from .transactions import send

        self.transactions.append(send(self._web3, self.account, call)["transactionHash"].to_0x_hex())

    def tell(self, as_json: bool, words: str, **facts: Any) -> None:
        typer.echo(json.dumps({**facts, "transactions": self.transactions}) if as_json else words)


def _when(timestamp: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(timestamp))
