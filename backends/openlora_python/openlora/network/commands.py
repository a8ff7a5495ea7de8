"""`openlora network …`: deploy, register, publish, and follow a chain."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from eth_utils import is_checksum_address, to_checksum_address
from rich.console import Console
from rich.table import Table

from ..command_errors import reported
from ..config import NetworkSettings, load_settings
from ..errors import InvalidArgument, OpenLoRAError
from ..serving.access_rule import ADDRESS

if TYPE_CHECKING:
    from eth_account.signers.local import LocalAccount
    from web3 import Web3
    from web3.contract.contract import ContractFunction

    from .contracts import Contracts
    from .deployment import Deployment
    from .sync import Synced

network_app = typer.Typer(help="The chain: contracts, models, logs, parameters.", no_args_is_help=True)

Key = Annotated[Path, typer.Option("--key", help="File of the key that sends: 64 hex digits, mode 0600.")]
DeploymentFile = Annotated[Path, typer.Option("--deployment", help="The deployment file.")]
StateDir = Annotated[Path, typer.Option("--state-dir", help="The server's state directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine output.")]
CardFile = Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Terms, in place of its own card.")]
Digest = Annotated[str, typer.Argument(metavar="DIGEST", help="Manifest digest of the model, 64 hex digits.")]

DEVNET_DEPLOYMENT = Path("var/devnet/deployment.json")


@network_app.command("deploy")
def deploy_contracts(
    rpc_url: Annotated[str, typer.Option(help="JSON-RPC of the chain.")],
    key: Key,
    out: Annotated[Path, typer.Option(help="The deployment file to write.")],
    publisher: Annotated[list[str], typer.Option(help="May propose epochs; none = nobody yet.")] = [],  # noqa: B006
    attestor: Annotated[list[str], typer.Option(help="May attest epochs.")] = [],  # noqa: B006
    guardian: Annotated[list[str], typer.Option(help="May veto and pause.")] = [],  # noqa: B006
    threshold: Annotated[int, typer.Option(min=1, max=255, help="Attestations that an epoch needs.")] = 2,
    token: Annotated[str | None, typer.Option(help="ERC-20 that is paid; default: a new one to play with.")] = None,
    epoch_cap: Annotated[str, typer.Option(help="Most that an epoch may add, in the token's smallest unit.")] = str(
        10**24
    ),
    delay_seconds: Annotated[int, typer.Option(min=1, help="From proposal to acceptance.")] = 86_400,
    notice_seconds: Annotated[int, typer.Option(min=0, help="From publication of terms to their effect.")] = 86_400,
    confirmations: Annotated[str, typer.Option(help="Blocks on top of a final one, or `finalized`.")] = "finalized",
    as_json: AsJson = False,
) -> None:
    """Put the contracts on a chain, with the key's account as their admin, and write the deployment file."""
    from .deploy import DeploymentPlan, deploy
    from .deployment import connect
    from .rpc import reaching
    from .signer import load_signer

    with reported():
        if out.exists():
            raise InvalidArgument(f"{out} exists: that deployment would be forgotten", field="out")
        web3 = connect(rpc_url)
        with reaching(rpc_url):
            chain_id = web3.eth.chain_id
        account = load_signer(key, chain_id, rpc_url)
        plan = DeploymentPlan(
            notice_seconds,
            delay_seconds,
            _whole(epoch_cap, "epoch_cap"),
            threshold,
            [_address(one, "publisher") for one in publisher],
            [_address(one, "attestor") for one in attestor],
            [_address(one, "guardian") for one in guardian],
            None if token is None else _address(token, "token"),
            "finalized" if confirmations == "finalized" else _whole(confirmations, "confirmations"),
        )
        console = Console(stderr=True)
        with console.status("…") as status:
            deployment = deploy(web3, account, plan, status.update)
        deployment.save(out)
        typer.echo(deployment.model_dump_json() if as_json else f"deployed on chain {chain_id}; see {out}")


@network_app.command("register-model")
def register_model(
    model: Annotated[str, typer.Argument(metavar="PATH|NAME", help="Directory of a model, or an adapter's name.")],
    key: Key,
    uri: Annotated[str | None, typer.Option(help="Where nodes fetch it; default: the source in the catalog.")] = None,
    name: Annotated[str | None, typer.Option(help="Its name there; default: that of here.")] = None,
    base: Annotated[str | None, typer.Option(help="Digest of an adapter's base; default: what is known of it.")] = None,
    card: CardFile = None,
    deployment: DeploymentFile = DEVNET_DEPLOYMENT,
    state_dir: StateDir = Path("var"),
    as_json: AsJson = False,
) -> None:
    """Register a model under its digest, with the terms and the access of its card."""
    from .registration import local_model

    with reported():
        found = local_model(model, card, state_dir)
        base_digest = _digest(base, "base") if base is not None else found.base
        if found.is_adapter and base_digest is None:
            raise InvalidArgument("the card names no base model: give --base DIGEST", field="base")
        place = uri or found.source
        if "://" not in place:
            if found.is_adapter:
                raise InvalidArgument("nodes fetch it from a URI (https://…, s3://…, hf://…): give --uri", field="uri")
            place = place or f"openlora:{found.digest.hex()}"  # nobody fetches base models from here
        with _Sending(deployment, key) as chain:
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


@network_app.command("publish-terms")
def publish_terms(
    model: Annotated[str, typer.Argument(metavar="PATH|NAME", help="Directory of a model, or an adapter's name.")],
    key: Key,
    card: CardFile = None,
    deployment: DeploymentFile = DEVNET_DEPLOYMENT,
    state_dir: StateDir = Path("var"),
    as_json: AsJson = False,
) -> None:
    """Publish a registered model's card as the next version of its terms; in force after the notice."""
    from .registration import local_model

    with reported():
        found = local_model(model, card, state_dir)
        with _Sending(deployment, key) as chain:
            terms = found.terms(chain.account.address)
            chain.send(chain.contracts.registry.publish_terms(found.digest, terms))
            newest = chain.contracts.registry.model_of(chain.account.address, found.digest)
            chain.tell(
                as_json,
                f"version {newest.terms_version} of the terms of {found.name}, "
                f"in force from {_when(newest.effective_at)}",
                digest=found.digest.hex(),
                version=newest.terms_version,
                effective_at=newest.effective_at,
                terms=terms,
            )


@network_app.command("set-access")
def set_access(
    digest: Digest,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON of an access rule, as in a card.")],
    key: Key,
    deployment: DeploymentFile = DEVNET_DEPLOYMENT,
    as_json: AsJson = False,
) -> None:
    """Say who may use a model of yours; effective at once."""
    from .registration import access_document, parse_access, read_json

    with reported():
        document = access_document(parse_access(read_json(file)))
        with _Sending(deployment, key) as chain:
            chain.send(chain.contracts.registry.set_access(_digest(digest, "DIGEST"), document))
            chain.tell(as_json, f"access of {digest[:16]}…: {document}", digest=digest, access=document)


@network_app.command("revoke")
def revoke(digest: Digest, key: Key, deployment: DeploymentFile = DEVNET_DEPLOYMENT, as_json: AsJson = False) -> None:
    """Revoke a model of yours, for good."""
    with reported(), _Sending(deployment, key) as chain:
        chain.send(chain.contracts.registry.revoke(_digest(digest, "DIGEST")))
        chain.tell(as_json, f"{digest[:16]}… is revoked", digest=digest)


@network_app.command("register-log")
def register_log(
    key: Key,
    submitter: Annotated[str | None, typer.Option(help="Who may anchor; default: the key's account.")] = None,
    payee: Annotated[str | None, typer.Option(help="Who earns the node's part, for good; default: likewise.")] = None,
    deployment: DeploymentFile = DEVNET_DEPLOYMENT,
    state_dir: StateDir = Path("var"),
    as_json: AsJson = False,
) -> None:
    """Register the receipt log of a server; its receipt key signs that, so it is called on the serving machine."""
    from ..attribution.keys import load_keys
    from ..attribution.log_key import load_log_key
    from .registration import registration_signature

    with reported():
        log_key = load_log_key(str(state_dir / "log.pub"))
        signer = load_keys(state_dir / "keys", create=False).receipt
        with _Sending(deployment, key) as chain:
            owner = chain.account.address
            who = [owner if one is None else _address(one, "address") for one in (submitter, payee)]
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


@network_app.command("publish-parameters")
def publish_parameters(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON of the parameters; see docs/settlement.md.")],
    key: Key,
    deployment: DeploymentFile = DEVNET_DEPLOYMENT,
    as_json: AsJson = False,
) -> None:
    """Publish the next version of the network's parameters; in force after the notice."""
    from .parameters import parse_parameters
    from .registration import read_json

    with reported():
        document = parse_parameters(read_json(file)).document
        with _Sending(deployment, key) as chain:
            chain.send(chain.contracts.registry.publish_parameters(document))
            chain.tell(as_json, f"published: {document}", parameters=document)


@network_app.command("status")
def status(
    deployment: DeploymentFile = DEVNET_DEPLOYMENT, state_dir: StateDir = Path("var"), as_json: AsJson = False
) -> None:
    """The chain, its parameters, and the view that the server of a state directory goes by."""
    from ..adapters.catalog import AdapterFilter, CatalogReader
    from ..adapters.chain_view import CHAIN_ORIGIN
    from ..adapters.ingest_worker import CATALOG_FILE
    from .chain_facts import read_facts
    from .deployment import Deployment
    from .registry_state import registry_view

    with reported():
        chain = Deployment.load(deployment)
        web3 = chain.connect()
        facts = read_facts(web3, chain)
        registry = registry_view(facts.events, facts.headers[facts.head])
        tree: dict[str, Any] = {
            "chain_id": chain.chain_id,
            "final_block": facts.head,
            "parameters": None if registry.parameters is None else json.loads(registry.parameters.document),
            "models_in_force": len(registry.models),
            "view": None,
        }
        if (state_dir / CATALOG_FILE).is_file():
            reader = CatalogReader(state_dir / CATALOG_FILE)
            view = reader.chain_view()
            names = [
                record.name
                for record in reader.page(AdapterFilter(status="ready", current=True)).records
                if record.origin == CHAIN_ORIGIN
            ]
            reader.close()
            if view is not None:
                tree["view"] = {
                    "block": view.number,
                    "age_seconds": round(time.time() - view.read_at, 1),
                    "base_card": view.base_card is not None,
                    "adapters": names,
                }
        if as_json:
            typer.echo(json.dumps(tree))
            return
        for name, value in tree.items():
            typer.echo(f"{name:>16}  {value if isinstance(value, int) else json.dumps(value)}")


@network_app.command("sync")
def sync_catalog(
    config: Annotated[Path | None, typer.Option(help="The server's YAML file, for its `network` section.")] = None,
    allow: Annotated[list[str], typer.Option("--allow", help="An owner to follow, beside the settings'.")] = [],  # noqa: B006
    deployment: Annotated[Path | None, typer.Option("--deployment", help="Default: the settings'.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until stopped.")] = False,
    state_dir: StateDir = Path("var"),
    as_json: AsJson = False,
) -> None:
    """Bring adapters, terms and revocations from the chain into the catalog. A running server does so by itself."""
    from .deployment import Deployment
    from .sync import POLL_SECONDS, CatalogSync, only_sync

    with reported():
        settings = _network_settings(config, deployment, allow)
        chain = Deployment.load(settings.deployment)
        console = Console(stderr=True)
        with only_sync(state_dir):
            sync = CatalogSync(state_dir, settings, chain, chain.connect())
            try:
                with console.status("reading the chain") as status:
                    _told(sync.once(status.update), as_json)
                while follow:
                    time.sleep(POLL_SECONDS)
                    try:
                        synced = sync.follow()
                    except OpenLoRAError as error:
                        if error.code != "UNAVAILABLE":
                            raise
                        console.print(f"{error}", markup=False)
                        continue
                    if synced.added or synced.removed:
                        _told(synced, as_json)
            except KeyboardInterrupt:
                pass
            finally:
                sync.close()


def _told(synced: Synced, as_json: bool) -> None:
    if as_json:
        tree = {
            "block": synced.view.number,
            "adapters": [one.name for one in synced.announced],
            "added": [one.name for one in synced.added if one.status == "ready"],
            "removed": synced.removed,
            "refused": synced.refused,
        }
        typer.echo(json.dumps(tree))
        return
    typer.echo(f"block {synced.view.number}: {len(synced.announced)} adapters in force")
    table = Table(box=None, show_header=False)
    for one in synced.added:
        table.add_row(one.name, "added" if one.status == "ready" else one.status)
    for name in synced.removed:
        table.add_row(name, "removed")
    for name, why in synced.refused.items():
        table.add_row(name, why)
    if table.row_count:
        Console().print(table)


class _Sending:
    """A checked chain and the account of a key file, for one command."""

    def __init__(self, deployment: Path, key: Path) -> None:
        self._files = (deployment, key)
        self.transactions: list[str] = []

    def __enter__(self) -> _Sending:
        from .contracts import contracts_of
        from .deployment import Deployment
        from .signer import load_signer

        file, key = self._files
        self.deployment: Deployment = Deployment.load(file)
        self.account: LocalAccount = load_signer(key, self.deployment.chain_id, self.deployment.rpc_url)
        self._web3: Web3 = self.deployment.connect()
        self.contracts: Contracts = contracts_of(self._web3, self.deployment)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def send(self, call: ContractFunction) -> None:
        from .transactions import send

        self.transactions.append(send(self._web3, self.account, call)["transactionHash"].to_0x_hex())

    def tell(self, as_json: bool, words: str, **facts: Any) -> None:
        typer.echo(json.dumps({**facts, "transactions": self.transactions}) if as_json else words)


def _network_settings(config: Path | None, deployment: Path | None, allow: list[str]) -> NetworkSettings:
    # The section alone is wanted; a model is named only because settings without one are none.
    network = load_settings(config, model=None if config else Path()).network
    owners = (*network.allowed_owners, *(_address(one, "allow") for one in allow))
    file = deployment or network.deployment
    if file is None:
        raise InvalidArgument("no deployment file: give --deployment, or --config with network.deployment")
    return network.model_copy(update={"deployment": file, "allowed_owners": owners})


def _address(text: str, field: str) -> str:
    if not ADDRESS.fullmatch(text):
        raise InvalidArgument(f"{text!r:.80} is not an address", field=field)
    if text[2:] not in (text[2:].lower(), text[2:].upper()) and not is_checksum_address(text):
        raise InvalidArgument(f"{text!r} has a typing error: its checksum is wrong", field=field)
    return to_checksum_address(text)


def _digest(text: str, field: str) -> bytes:
    plain = text.removeprefix("0x").lower()
    if len(plain) != 64 or not set(plain) <= set("0123456789abcdef"):
        raise InvalidArgument(f"{text!r:.80}: 64 hex digits are wanted", field=field)
    return bytes.fromhex(plain)


def _whole(text: str, field: str) -> int:
    if not text.isdecimal() or len(text) > 40:
        raise InvalidArgument(f"{text!r:.80} is not a whole number", field=field)
    return int(text)


def _when(timestamp: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(timestamp))
