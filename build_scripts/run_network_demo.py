"""The whole circle on a chain of this machine: serve, be paid for receipts, recompute, claim. Shown as a table.

    python build_scripts/run_network_demo.py

Needs `make_demo.py` and `make chain-tools` to have run. Everything is done by the commands that a network's people use,
each with its own key; only the source of the adapters is this script, which serves their folders over HTTP.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from openlora.attribution.blobs import NO_PARAMETERS
from openlora.errors import OpenLoRAError
from openlora.network.contracts import contracts_of
from openlora.network.deployment import Deployment
from openlora.network.devnet import ROLES, devnet_account
from openlora_client import Adapters, OpenLoRAClient

DEMO = Path("var/demo")
ROOT = Path("var/network-demo")
DEVNET, STATE = ROOT / "devnet", ROOT / "state"
DEPLOYMENT = DEVNET / "deployment.json"
OWNERS = {"emoji": "owner-1", "json": "owner-2", "pirate": "owner-3", "shout": "owner-1", "sql": "owner-2"}
BASE_OWNER = "owner-3"
PROMPT = "Tell me about the cat."
UNIT = 10**9  # of the token's smallest ones, which have 18 places
DEPOSIT = 10**18
WAIT_SECONDS = 120.0

console = Console(highlight=False, soft_wrap=True)


def openlora(*words: str | Path, quiet: bool = False) -> str:
    """Run a command of the CLI as a user would; its standard output."""
    shown = " ".join(str(word) for word in words)
    if not quiet:
        console.print(f"[dim]$ openlora {shown}[/dim]", markup=True)
    done = subprocess.run([sys.executable, "-m", "openlora.cli", *map(str, words)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"openlora {shown} ended with {done.returncode}")
    return done.stdout


def as_json(*words: str | Path) -> Any:
    return json.loads(openlora(*words, "--json"))


def key(role: str) -> tuple[str, str]:
    return "--key", str(DEVNET / "keys" / f"{role}.key")


def on_chain() -> tuple[str, str]:
    return "--deployment", str(DEPLOYMENT)


def owned_by(folder: Path, role: str) -> Path:
    """The card of a model of the demo, with somebody of the devnet as its owner, and prices in 10^-9 tokens."""
    card = json.loads((folder / "openlora.json").read_text())
    prices = {part: str(card["prices"][part] * UNIT) for part in ("input", "output")}
    file = ROOT / "cards" / f"{folder.name}.json"
    owner = devnet_account(ROLES.index(role)).address
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**card, "owner": owner, "prices": {"version": 1, **prices}}))
    return file


@contextmanager
def served_folder(folder: Path) -> Iterator[str]:
    """The URL of a folder, on this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def register(source: str) -> str:
    """The base model and all adapters, each by its owner; the base's digest."""
    model = DEMO / "model"
    card = owned_by(model, BASE_OWNER)
    made = as_json(
        "network", "register-model", model, "--card", card, "--state-dir", STATE, *key(BASE_OWNER), *on_chain()
    )
    for name, role in OWNERS.items():
        folder = DEMO / "adapters" / name
        openlora(
            *("network", "register-model", folder, "--uri", f"{source}/{name}", "--base", made["digest"]),
            *("--card", owned_by(folder, role), *key(role), *on_chain()),
        )
    return made["digest"]


def serve() -> None:
    config = ROOT / "serve.yaml"
    owners = sorted({devnet_account(ROLES.index(role)).address for role in (*OWNERS.values(), BASE_OWNER)})
    network = {"deployment": str(DEPLOYMENT.resolve()), "allowed_owners": owners}
    config.write_text(yaml.safe_dump({"network": network}))
    openlora("serve", "--config", config, "--model", DEMO / "model", "--state-dir", STATE, "--detach")


def names_on_chain() -> dict[str, str]:
    return {name: f"{devnet_account(ROLES.index(role)).address}/{name}" for name, role in OWNERS.items()}


def wait_for_adapters() -> None:
    until = time.monotonic() + WAIT_SECONDS
    wanted = set(names_on_chain().values())
    while True:
        told = openlora("network", "status", "--state-dir", STATE, *on_chain(), "--json", quiet=True)
        view = json.loads(told)["view"]
        if view is not None and wanted <= set(view["adapters"]) and view["base_card"]:
            return
        if time.monotonic() > until:
            raise SystemExit(f"the adapters did not come from the chain; its log is in {STATE}/logs/network.log")
        time.sleep(0.5)


def answers() -> None:
    """Base, every adapter, an ensemble: each leaves a receipt that names a block of the chain."""
    named = names_on_chain()
    questions: list[tuple[str, Adapters]] = [("base model", None), *named.items()]
    questions.append(("0.6 pirate + 0.6 shout", [(named["pirate"], 0.6), (named["shout"], 0.6)]))
    table = Table("asked", "answer", "receipt", "block", "price", title=PROMPT)
    with OpenLoRAClient() as client:
        for title, adapters in questions:
            answer = client.generate(PROMPT, adapters, max_tokens=40, temperature=0)
            receipt = answer.receipt
            if receipt["blobs"]["terms"]["parameters"] == NO_PARAMETERS:
                raise SystemExit("a receipt without parameters: it could never be settled")
            words = " ".join(answer.text.split())[:48]
            block = receipt["blobs"]["registry"]["block_number"]
            table.add_row(title, words, str(receipt["seq"]), str(block), str(receipt["price"]))
    console.print(table)


def settle() -> None:
    log_id = as_json("network", "register-log", "--state-dir", STATE, *key("operator"), *on_chain())["log_id"]
    openlora("settle", "deposit", log_id, str(DEPOSIT), *key("operator"), *on_chain(), "--state-dir", STATE)
    openlora("settle", "anchor", "--once", "--state-dir", STATE, *key("operator"), *on_chain())
    export = ROOT / "export"
    openlora("receipts", "export", export, "--state-dir", STATE)
    common = ("--export", export, *on_chain())
    openlora("settle", "propose", *common, *key("publisher"), "--state-dir", ROOT / "publisher")
    files = [ROOT / f"{role}.json" for role in ("attestor-1", "attestor-2")]
    for role, file in zip(("attestor-1", "attestor-2"), files, strict=True):  # each computes it again by itself
        openlora("settle", "attest", *common, *key(role), "--out", file, "--state-dir", ROOT / role)
    time.sleep(3)  # the devnet's delay between proposal and acceptance
    openlora("settle", "accept", *files, *key("operator"), *on_chain(), "--state-dir", STATE)
    openlora("settle", "claim", "--all", *common, *key("operator"), "--state-dir", ROOT / "publisher")


def balances() -> None:
    deployment = Deployment.load(DEPLOYMENT)
    contracts = contracts_of(deployment.connect(), deployment)
    who = {devnet_account(index).address: role for index, role in enumerate(ROLES)}
    for folder in (DEMO / "model", *(DEMO / "adapters").iterdir()):
        for dataset in json.loads((folder / "openlora.json").read_text())["datasets"]:
            for one in dataset["contributors"]:
                who.setdefault(one["address"], f"{one['name']} ({dataset['id']})")
    table = Table("account", "who", "claimed", title="paid out, in the token's smallest unit")
    paid = 0
    for account, name in who.items():
        claimed = contracts.distributor.claimed_of(account)
        if claimed:
            paid += claimed
            table.add_row(account, name, f"{claimed:,}")
    totals = contracts.distributor.totals()
    table.add_section()
    table.add_row("", "claimed of settled", f"{totals.claimed:,} of {totals.total:,}")
    console.print(table)
    if not totals.total or paid != totals.claimed:
        raise SystemExit("the circle is not closed")


def main() -> int:
    shutil.rmtree(ROOT, ignore_errors=True)
    ROOT.mkdir(parents=True)
    with served_folder(DEMO / "adapters") as source:
        try:
            openlora("devnet", "--state-dir", DEVNET, "--block-seconds", "2", "--detach")
            register(source)
            serve()
            wait_for_adapters()
            answers()
            settle()
            balances()
        except OpenLoRAError as error:
            console.print(f"error: {error}", style="red", markup=False)
            return 1
        finally:
            for words in (("stop", "--state-dir", STATE), ("devnet", "--state-dir", DEVNET, "--stop")):
                subprocess.run([sys.executable, "-m", "openlora.cli", *map(str, words)], check=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
