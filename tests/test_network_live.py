"""A real server that follows a real chain: what its receipts refer to, whom it lets in, and a chain that goes away."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from chain import Devnet, terms_of
from chain_node import CARD
from eth_account import Account
from live_server import LiveServer
from make_shape import TARGETS, make_adapter, make_model
from scripted_source import ScriptedSource
from small_server import CONFIG, small_server
from waiting import wait_for

from openlora.adapters.manifest import adapter_manifest, model_manifest
from openlora.attribution.blobs import model_terms_hash
from openlora.attribution.log_key import load_log_key
from openlora.attribution.registry_reference import RegistryReference
from openlora_client import AdapterNotFound, OpenLoRAClient, OpenLoRAError, Unavailable, login_token

PROMPT = "the cat sat"
MAX_AGE = 6.0  # seconds; short, so that a test can see the end of it
WAIT_SECONDS = 60.0
HOLDER, STRANGER = Account.from_key("0x" + "51" * 32), Account.from_key("0x" + "52" * 32)


@dataclass
class Network:
    """A chain of the test's own, a source of adapters, and a server between them."""

    devnet: Devnet
    http: ScriptedSource
    live: LiveServer
    root: Path
    base: str

    def publish(self, name: str, **changes: Any) -> str:
        folder = self.root / "remote" / name
        shapes = make_model(self.root / "again", CONFIG, torch.float32, seed=1)
        make_adapter(folder, shapes, 8, TARGETS, torch.float32, seed=100 + len(self.http.files))
        for file in folder.iterdir():
            self.http.files[f"/{name}/{file.name}"] = file.read_bytes()
        digest = adapter_manifest(folder).digest
        self.devnet.register("owner-1", digest, self.base, name, f"{self.http.url}/{name}", {**CARD, **changes})
        return digest

    @property
    def log_id(self) -> str:
        return load_log_key(self.live.log_key).log_id.hex()

    def named(self, name: str) -> str:
        return f"{self.devnet.account('owner-1').address}/{name}"

    def ask(self, adapter: Any, signer: Any = None, **more: Any) -> dict[str, Any]:
        """The receipt of an answer."""
        key = None if signer is None else login_token(bytes(signer.key).hex(), self.log_id)
        with OpenLoRAClient(self.live.grpc_url, api_key=key) as client:
            return client.generate(PROMPT, adapter, max_tokens=4, temperature=0, **more).receipt

    def refusal(self, adapter: Any, signer: Any = None) -> OpenLoRAError:
        error = self.refused(adapter, signer)
        assert error is not None
        return error

    def refused(self, adapter: Any, signer: Any = None) -> OpenLoRAError | None:
        """None: it was answered."""
        try:
            self.ask(adapter, signer)
        except OpenLoRAError as error:
            return error
        return None

    def until(self, condition: Any) -> Any:
        """What `condition` gives as soon as it gives something; refusals are not yet."""

        def found() -> Any:
            with suppress(AdapterNotFound, Unavailable):
                return condition()

        return wait_for("such answer", found, WAIT_SECONDS, self.live.words)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    root = tmp_path_factory.mktemp("network")
    devnet, http = Devnet(root / "devnet").start(), ScriptedSource()
    live = small_server(
        root,
        {"local": ()},
        {
            "network": {
                "deployment": str(devnet.deployment_file),
                "allowed_owners": [devnet.account("owner-1").address],
                "max_view_age_seconds": MAX_AGE,
            },
            "access": {"signed_requests": "any"},
        },
    )
    base = model_manifest(root / "model").digest
    devnet.register("owner-1", base, None, "base", "openlora:base", {**CARD, "prices": {**CARD["prices"], "input": 7}})
    try:
        yield Network(devnet, http, live.start(), root, base)
    finally:
        live.stop()
        devnet.stop()
        http.close()


def test_receipts_name_a_final_block_and_what_is_in_force_there(network: Network) -> None:
    digest = network.publish("poet", prices={"version": 1, "input": str(10**12), "output": 3})
    name = network.named("poet")
    receipt = network.until(lambda: network.ask([name, {"name": "local", "weight": 0.5}]))
    reference = RegistryReference.from_document(receipt["blobs"]["registry"])
    block = network.devnet.web3.eth.get_block(reference.block_number)
    assert reference.block_hash == bytes(block["hash"])
    assert reference.registry == network.devnet.contracts.registry.address
    assert hashlib.sha256(reference.preimage).hexdigest() == receipt["registry_ref"].removeprefix("0x")
    terms = receipt["blobs"]["terms"]
    published = network.devnet.contracts.registry.contract.functions.parameters().call()[1]
    assert terms["parameters"] == published.hex()
    owner = network.devnet.account("owner-1").address
    for model, wanted in ((terms["base"], network.base), (terms["adapters"][0], digest)):
        registered = network.devnet.contracts.registry.model_of(
            owner, bytes.fromhex(wanted), block=reference.block_number
        )
        assert (model["digest"], model_terms_hash(model)) == (wanted, registered.terms_hash)
    assert terms["base"]["input"] == "7"


def test_an_address_in_other_letters_is_the_same_adapter(network: Network) -> None:
    network.publish("letters")
    name = network.named("letters")
    network.until(lambda: network.ask(name))
    owner, _, label = name.partition("/")
    assert network.ask(f"{owner.lower()}/{label}")["status"] == 1


def test_revoked_and_dearer_for_the_next_request(network: Network) -> None:
    digest = network.publish("brief")
    name, registry = network.named("brief"), network.devnet.contracts.registry
    before = network.until(lambda: network.ask(name))
    owner = network.devnet.account("owner-1").address
    card = {**CARD, "owner": owner, "prices": {"version": 1, "input": 50, "output": 2}}
    network.devnet.send("owner-1", registry.publish_terms(bytes.fromhex(digest), terms_of(digest, card)))
    network.devnet.mine(10)

    def dearer() -> dict[str, Any] | None:
        receipt = network.ask(name)
        return receipt if receipt["blobs"]["terms"]["adapters"][0]["input"] == "50" else None

    after = network.until(dearer)
    assert after["blobs"]["registry"]["block_number"] > before["blobs"]["registry"]["block_number"]
    network.devnet.send("owner-1", registry.revoke(bytes.fromhex(digest)))
    network.until(lambda: isinstance(network.refused(name), AdapterNotFound))
    assert str(network.refusal(name)) == str(network.refusal(name.replace("brief", "nosuch"))).replace(
        "nosuch", "brief"
    )


def test_a_token_opens_and_whatever_is_not_known_closes(network: Network) -> None:
    devnet, token = network.devnet, network.devnet.contracts.token
    devnet.send("admin", token.mint(HOLDER.address, 5))
    digest = network.publish("gated")
    rule = {"policy": "token-gated", "token": {"chain_id": 31337, "contract": token.address, "minimum": 5}}
    devnet.send("owner-1", devnet.contracts.registry.set_access(bytes.fromhex(digest), json.dumps(rule)))
    name = network.named("gated")
    network.until(lambda: "gated" in json.dumps(models(network, HOLDER)))  # the view is there, and the first reading
    assert network.until(lambda: network.ask(name, HOLDER))["status"] == 1
    # A stranger's first question can't be answered yet, whatever it is about; later ones are like any unknown name.
    for asked in (name, network.named("nosuch")):
        network.until(lambda asked=asked: isinstance(network.refused(asked, STRANGER), AdapterNotFound))
    assert isinstance(network.refusal(name), AdapterNotFound)  # nobody holds anything anonymously
    devnet.send("admin", token.mint(STRANGER.address, 4))
    devnet.mine()
    assert isinstance(network.refusal(name, STRANGER), AdapterNotFound)
    devnet.send("admin", token.mint(STRANGER.address, 1))
    network.until(lambda: network.ask(name, STRANGER))  # read again while it asks


def test_a_new_address_is_told_to_come_again_whatever_it_asks_for(network: Network) -> None:
    for name in ("gated", "nosuch"):
        newcomer = Account.create()
        error = network.refusal(network.named(name), newcomer)
        assert isinstance(error, Unavailable) and error.retry_after_ms
        assert newcomer.address in str(error)
        network.until(lambda n=name, who=newcomer: isinstance(network.refused(network.named(n), who), AdapterNotFound))


def test_without_the_chain_its_adapters_close_and_local_ones_go_on(network: Network) -> None:
    network.publish("steady")
    name, live = network.named("steady"), network.live
    network.until(lambda: network.ask(name))
    network.devnet.stop()
    last = network.ask(name)["blobs"]["registry"]
    closed = network.until(lambda: error if isinstance(error := network.refused(name), Unavailable) else None)
    assert "the chain was not heard of" in str(closed)
    assert str(network.refusal(network.named("nosuch"))) == str(closed)  # nor what there is
    assert "steady" not in json.dumps(models(network))
    receipt = network.ask("local")
    assert receipt["blobs"]["registry"] == last  # it says which block it went by, and settlement judges its age
    assert live.readiness()["ready"]
    network.devnet.start()
    network.until(lambda: network.ask(name))
    network.devnet.mine()
    network.until(lambda: network.ask("local")["blobs"]["registry"]["block_number"] > last["block_number"])


def test_a_chain_that_was_reset_is_followed_anew(network: Network) -> None:
    """Last: the devnet loses its state, and is deployed anew in the same place."""
    network.publish("gone")
    name = network.named("gone")
    network.until(lambda: network.ask(name))
    genesis = network.devnet.deployment.genesis
    network.devnet.stop()
    (network.devnet.state_dir / "chain.json").unlink()
    network.devnet.start()
    assert network.devnet.deployment.genesis != genesis
    network.until(lambda: isinstance(network.refused(name), AdapterNotFound))
    reference = RegistryReference.from_document(network.ask("local")["blobs"]["registry"])
    assert bytes(network.devnet.web3.eth.get_block(reference.block_number)["hash"]) == reference.block_hash


def models(network: Network, signer: Any = None) -> Any:
    """`/v1/models` of the gateway."""
    headers = {}
    if signer is not None:
        token = login_token(bytes(signer.key).hex(), network.log_id)
        headers["Authorization"] = f"Bearer {token}"
    return httpx.get(f"{network.live.gateway_url}/v1/models", headers=headers, timeout=30).json()
