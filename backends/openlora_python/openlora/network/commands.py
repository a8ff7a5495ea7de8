"""`openlora network …`: deploy contracts, and follow a chain. What owners write to it: owner_commands.py."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..adapters.sources import SourceLimits
from ..command_group import command_group
from ..config import NetworkSettings, load_section
from ..errors import InvalidArgument, OpenLoRAError
from .arguments import AsJson, DeploymentFile, Key, StateDir, deployment_file, parse_address, parse_whole
from .owner_commands import (
    publish_parameters,
    publish_terms,
    register_log,
    register_model,
    revoke,
    set_access,
    set_submitter,
)

if TYPE_CHECKING:
    from .sync import Synced

network_app = command_group("The chain: contracts, models, logs, parameters.")


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

    if out.exists():
        raise InvalidArgument(f"{out} exists: that deployment would be forgotten", field="out")
    web3 = connect(rpc_url)
    with reaching(rpc_url):
        chain_id = web3.eth.chain_id
    account = load_signer(key, chain_id, rpc_url)
    plan = DeploymentPlan(
        notice_seconds,
        delay_seconds,
        parse_whole(epoch_cap, "epoch_cap"),
        threshold,
        [parse_address(one, "publisher") for one in publisher],
        [parse_address(one, "attestor") for one in attestor],
        [parse_address(one, "guardian") for one in guardian],
        None if token is None else parse_address(token, "token"),
        "finalized" if confirmations == "finalized" else parse_whole(confirmations, "confirmations"),
    )
    console = Console(stderr=True)
    with console.status("…") as status:
        deployment = deploy(web3, account, plan, status.update)
    deployment.save(out)
    typer.echo(deployment.model_dump_json() if as_json else f"deployed on chain {chain_id}; see {out}")


for _command in (register_model, publish_terms, set_access, revoke, register_log, set_submitter, publish_parameters):
    network_app.command()(_command)


@network_app.command("status")
def status(deployment: DeploymentFile = None, state_dir: StateDir = Path("var"), as_json: AsJson = False) -> None:
    """The chain, its parameters, and the view that the server of a state directory goes by."""
    from ..adapters.catalog_file import CATALOG_FILE
    from ..adapters.catalog_reader import CatalogReader
    from ..adapters.catalog_rows import AdapterFilter
    from ..adapters.chain_view import CHAIN_ORIGIN
    from .chain_facts import read_facts
    from .deployment import Deployment
    from .registry_state import registry_view

    chain = Deployment.load(deployment_file(deployment))
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
        with CatalogReader(state_dir / CATALOG_FILE) as reader:
            view = reader.chain_view()
            ready = reader.page(AdapterFilter(status="ready", current=True)).records
        names = [record.name for record in ready if record.origin == CHAIN_ORIGIN]
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
    deployment: DeploymentFile = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until stopped.")] = False,
    state_dir: StateDir = Path("var"),
    as_json: AsJson = False,
) -> None:
    """Bring adapters, terms and revocations from the chain into the catalog. A running server does so by itself."""
    from .deployment import Deployment
    from .sync import POLL_SECONDS, CatalogSync, only_sync

    settings = _network_settings(config, deployment, allow)
    chain = Deployment.load(settings.deployment)
    console = Console(stderr=True)
    with only_sync(state_dir):
        sync = CatalogSync(state_dir, settings, chain, chain.connect(), load_section(SourceLimits, config))
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


def _network_settings(config: Path | None, deployment: Path | None, allow: list[str]) -> NetworkSettings:
    network = load_section(NetworkSettings, config)
    owners = (*network.allowed_owners, *(parse_address(one, "allow") for one in allow))
    file = deployment_file(deployment or network.deployment)
    return network.model_copy(update={"deployment": file, "allowed_owners": owners})
