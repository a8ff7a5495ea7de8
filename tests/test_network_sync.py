"""From a real chain into the catalog: whose adapters, under which names, with which terms, from which block on."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from chain import Devnet, terms_of
from chain_node import CARD, ChainNode
from scripted_source import Fault, ScriptedSource
from web3 import Web3

from openlora.adapters.catalog import Catalog
from openlora.adapters.catalog_rows import AdapterRecord
from openlora.adapters.chain_view import CHAIN_ORIGIN, ChainTerms, ChainView
from openlora.attribution.settlement.facts import ChainFacts
from openlora.attribution.settlement.registry import Registry
from openlora.errors import AdapterNotFound, ChainMismatch, InvalidArgument, Unavailable
from openlora.network.chain_facts import read_facts
from openlora.network.registry_state import registry_view
from openlora.network.sync import CatalogSync, only_sync

SEEDS = count()


@pytest.fixture
def http() -> Iterator[ScriptedSource]:
    source = ScriptedSource()
    try:
        yield source
    finally:
        source.close()


@pytest.fixture
def node(devnet: Devnet, http: ScriptedSource, tmp_path: Path) -> Iterator[ChainNode]:
    """Each over a base model of its own, so that nobody finds another test's adapters."""
    node = ChainNode(tmp_path, devnet, http, seed=next(SEEDS))
    try:
        yield node
    finally:
        node.close()


def test_adapters_of_followed_owners_answer_and_no_others(node: ChainNode) -> None:
    mine = node.publish("poet", prices={"version": 1, "input": str(10**20), "output": 7})
    node.publish("stranger", role="owner-2")
    node.publish("elsewhere", base="ab" * 32)
    synced = node.sync.once()
    name = f"{node.address()}/poet"
    assert node.names() == [name]
    assert [(one.name, one.status) for one in synced.added] == [(name, "ready")]
    record = node.reader.lookup(name)
    assert (record.digest, record.origin, record.base) == (mine, CHAIN_ORIGIN, node.base.digest)
    assert record.card["owner"] == node.address()
    assert record.card["prices"] == {"version": 1, "input": str(10**20), "output": "7"}
    assert not node.http.asked("GET", "adapter_model.safetensors")  # those come with the first request


def test_the_view_is_a_final_block_and_what_is_in_force_there(node: ChainNode, devnet: Devnet) -> None:
    devnet.register("owner-1", node.base.digest, None, "base", "openlora:base", CARD)
    synced = node.sync.once()
    view = node.reader.chain_view()
    block = devnet.web3.eth.get_block(view.number)
    assert view == synced.view
    assert (view.hash, view.number) == (bytes(block["hash"]).hex(), devnet.web3.eth.block_number)
    assert (view.chain_id, view.registry) == (31337, devnet.contracts.registry.address)
    published = devnet.contracts.registry.contract.functions.parameters().call()
    assert view.parameters == published[1].hex()
    assert view.base_card["owner"] == node.address()


def test_new_terms_are_in_force_after_the_notice_and_not_before(node: ChainNode, devnet: Devnet) -> None:
    digest = node.publish("poet")
    node.sync.once()
    name, registry = f"{node.address()}/poet", devnet.contracts.registry
    dearer = {**CARD, "owner": node.address(), "prices": {"version": 1, "input": 100, "output": 200}}
    devnet.send("owner-1", registry.publish_terms(bytes.fromhex(digest), terms_of(digest, dearer)))
    effective_at = registry.model_of(node.address(), bytes.fromhex(digest)).effective_at
    seen = []
    for seconds in (1, 1, 1, 1, 1, 1):
        devnet.mine(seconds)
        view = node.sync.follow().view
        timestamp = devnet.web3.eth.get_block(view.number)["timestamp"]
        price = node.reader.lookup(name).card["prices"]["input"]
        assert (price == "100") == (timestamp >= effective_at)
        seen.append(price)
    assert (seen[0], seen[-1]) == ("1", "100")


def test_revoked_ones_answer_no_more(node: ChainNode, devnet: Devnet) -> None:
    digest = node.publish("poet")
    name = f"{node.address()}/poet"
    node.sync.once()
    devnet.send("owner-1", devnet.contracts.registry.revoke(bytes.fromhex(digest)))
    assert node.reader.lookup(name).status == "ready"  # until the next pass
    assert node.sync.once().removed == [name]
    with pytest.raises(AdapterNotFound):
        node.reader.lookup(name)
    for version in (1, digest[:12]):
        with pytest.raises(AdapterNotFound):
            node.reader.lookup(name, version)
    assert node.sync.once().removed == []


def test_of_several_with_one_name_the_last_registered_answers(node: ChainNode, devnet: Devnet) -> None:
    first = node.publish("v1", on_chain="poet")
    node.sync.once()
    second = node.publish("v2", on_chain="poet")
    node.sync.once()
    name = f"{node.address()}/poet"
    assert node.reader.lookup(name).digest == second
    assert node.reader.lookup(name, first[:12]).digest == first
    devnet.send("owner-1", devnet.contracts.registry.revoke(bytes.fromhex(second)))
    node.sync.once()
    assert node.reader.lookup(name).digest == first
    assert node.names() == [name]


def test_a_late_first_version_does_not_take_the_name(node: ChainNode) -> None:
    first = node.publish("v1", on_chain="poet")
    second = node.publish("v2", on_chain="poet")
    gone = {path: node.http.files.pop(path) for path in list(node.http.files) if path.startswith("/v1/")}
    synced = node.sync.once()
    name = f"{node.address()}/poet"
    assert node.reader.lookup(name).digest == second
    assert [why for why in synced.refused if first[:16] in why]
    node.http.files.update(gone)
    node.sync._retries.clear()  # as if the wait was over
    node.sync.once()
    assert node.reader.lookup(name, first[:12]).digest == first
    assert node.reader.lookup(name).digest == second


def test_access_is_the_chain_s_at_once(node: ChainNode, devnet: Devnet) -> None:
    digest = node.publish("poet")
    rule = {"policy": "allow-list", "callers": ["alice"]}
    done = devnet.command(
        *("set-access", digest, str(node.write_access(rule)), "--key", str(devnet.key("owner-1"))),
        *("--deployment", str(devnet.deployment_file)),
    )
    assert done.returncode == 0, done.stderr
    node.sync.once()
    assert node.reader.lookup(f"{node.address()}/poet").card["access"] == rule
    devnet.send("owner-1", devnet.contracts.registry.set_access(bytes.fromhex(digest), '{"policy":"nonsense"}'))
    synced = node.sync.once()  # an access nobody understands grants nothing
    assert node.names() == []
    assert any("card.access.policy" in why for why in synced.refused.values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"on_chain": "../evil"}, "is not the name of a chain's adapter"),
        ({"on_chain": "a/b"}, "is not the name of a chain's adapter"),
        ({"uri": "/etc"}, "is on this machine"),
        ({"uri": "file:///etc"}, "file:// is no source"),
        ({"uri": "http://user:pw@127.0.0.1/x"}, "which are never stored"),
    ],
)
def test_what_can_t_be_served_is_said_and_hurts_nobody(node: ChainNode, changes: dict[str, str], words: str) -> None:
    node.publish("bad", **changes)
    node.publish("good")
    synced = node.sync.once()
    assert node.names() == [f"{node.address()}/good"]
    (why,) = synced.refused.values()
    assert words in why


def test_an_owner_can_not_have_the_node_ask_servers_beside_it(node: ChainNode, devnet: Devnet) -> None:
    """http:// is taken from this machine's own chain alone, and to this machine alone."""
    good = f"{node.address()}/good"
    for number, uri in enumerate(("http://169.254.169.254/latest", "HTTP://10.0.0.1/x", "http://[::1/x")):
        node.publish(f"bad{number}", uri=uri)
    node.publish("good")
    synced = node.sync.once()
    assert node.names() == [good]
    assert sorted(name.partition(" ")[0] for name in synced.refused) == [f"{node.address()}/bad{n}" for n in range(3)]
    assert sum("https://, s3://, gs:// and hf:// only" in why for why in synced.refused.values()) == 2

    elsewhere = devnet.deployment.model_copy(update={"rpc_url": "https://rpc.example.org"})
    sync = CatalogSync(node.state, node.settings, elsewhere, devnet.web3)
    assert len(sync.once().refused) == 4
    assert node.names() == []
    sync.close()


def test_terms_that_no_receipt_could_name_are_refused(node: ChainNode, devnet: Devnet) -> None:
    registry, owner = devnet.contracts.registry, node.address()
    digest = node.publish("poet")
    right = json.loads(terms_of(digest, {**CARD, "owner": owner}))
    documents = {
        "01" * 32: json.dumps({**right, "digest": "01" * 32}),  # not canonical
        "02" * 32: terms_of(digest, {**CARD, "owner": owner}),  # another model's
        "03" * 32: terms_of("03" * 32, {**CARD, "owner": devnet.account("owner-2").address}),  # another owner's
        "04" * 32: "not JSON at all",
        "05" * 32: "[]",
        "06" * 32: terms_of("06" * 32, {**CARD, "owner": owner}).replace('"input":"1"', '"input":"01"'),
        "07" * 32: terms_of("07" * 32, {**CARD, "owner": owner}).replace('"datasets":[]', '"datasets":[7]'),
        "08" * 32: terms_of("08" * 32, {**CARD, "owner": owner}).replace('"1"', '"\\ud800"'),
    }
    for key, document in documents.items():
        call = registry.register(
            bytes.fromhex(key), bytes.fromhex(node.base.digest), f"n{key[:2]}", "http://x/y", document
        )
        devnet.send("owner-1", call)
    synced = node.sync.once()
    assert {name.partition("(")[2][:4] for name in synced.refused} == {key[:4] for key in documents}
    assert node.names() == [f"{owner}/poet"]


def test_a_local_name_is_never_taken_nor_a_chain_s_by_hand(node: ChainNode, devnet: Devnet) -> None:
    node.publish("poet")
    local = AdapterRecord("poet", 0, "cd" * 32, 8, "ready", "", None, base=node.base.digest, source="/somewhere")
    with Catalog(node.catalog_path) as catalog:
        catalog.put(local)
    node.sync.once()
    name = f"{node.address()}/poet"
    assert node.names() == [name, "poet"]
    assert node.reader.lookup("poet").digest == "cd" * 32
    from typer.testing import CliRunner

    from openlora.adapters.commands import adapters_app

    for words in (["remove", name], ["use", name, "1"], ["add", str(node.root / "remote" / "poet"), "--name", name]):
        done = CliRunner().invoke(adapters_app, [*words, "--state-dir", str(node.state)])
        assert (done.exit_code, "only `openlora network sync` changes it" in done.stderr) == (2, True)
    assert node.names() == [name, "poet"]


def test_an_owner_who_is_no_longer_followed_is_gone(node: ChainNode) -> None:
    node.publish("poet")
    node.sync.once()
    node.sync._allowed = frozenset()
    assert node.sync.once().removed == [f"{node.address()}/poet"]
    assert node.names() == []


def test_a_slow_source_does_not_hold_up_the_view(node: ChainNode, devnet: Devnet) -> None:
    digest = node.publish("slow")
    node.http.fail("/slow/adapter_config.json", Fault(stall_at=10), methods=("GET",), for_ever=True)
    first = node.sync.follow()
    devnet.mine()
    second = node.sync.follow()
    assert second.view.number == first.view.number + 1
    devnet.send("owner-1", devnet.contracts.registry.revoke(bytes.fromhex(digest)))
    assert node.sync.follow().announced == []
    node.http.over.set()


def test_a_chain_that_does_not_answer_leaves_the_view_as_it_was(
    devnet: Devnet, http: ScriptedSource, tmp_path: Path
) -> None:
    own = Devnet(tmp_path / "devnet").start()
    node = ChainNode(tmp_path, own, http)
    try:
        node.publish("poet")
        node.sync.once()
        before = node.reader.chain_view()
        own.stop()
        with pytest.raises(Unavailable, match="no chain answers"):
            node.sync.follow()
        (own.state_dir / "chain.json").unlink()
        own.start()  # another chain at the same place, with the same addresses
        with pytest.raises(ChainMismatch, match="genesis"):
            node.sync.follow()
        assert node.reader.chain_view() == before
        assert node.names() == [f"{node.address()}/poet"]
    finally:
        node.close()
        own.stop()


def test_readers_see_one_block_or_the_next_never_both(tmp_path: Path) -> None:
    """A writer moves the view and all terms together; a reader that asks several things sees them together."""
    from openlora.adapters.catalog_reader import CatalogReader
    from openlora.adapters.catalog_rows import BaseFacts

    owner = "0x70997970C51812dc3A010C7d01b50e0d17dc79C8"
    names = [f"{owner}/a", f"{owner}/b"]
    path = tmp_path / "catalog.sqlite"
    catalog = Catalog(path)
    catalog.set_base(BaseFacts("model", "ba" * 32, 64))
    for name in names:
        catalog.put(AdapterRecord(name, 0, "cd" * 32, 8, "ready", "", None, base="ba" * 32, origin=CHAIN_ORIGIN))

    def move(number: int) -> None:
        view = ChainView(1, owner, number, f"{number:064x}", None, None, 0.0)
        catalog.follow_chain(view, [ChainTerms(name, "cd" * 32, {"number": number}) for name in names])

    move(0)
    reader, over = CatalogReader(path), threading.Event()

    def write() -> None:
        for number in count(1):
            if over.is_set():
                return
            writer = Catalog(path)
            with writer:
                view = ChainView(1, owner, number, f"{number:064x}", None, None, 0.0)
                writer.follow_chain(view, [ChainTerms(name, "cd" * 32, {"number": number}) for name in names])

    thread = threading.Thread(target=write)
    thread.start()
    try:
        seen = set()
        while len(seen) < 20:
            with reader.snapshot():
                view = reader.chain_view()
                numbers = {reader.lookup(name).card["number"] for name in names}
            assert numbers == {view.number}
            seen.add(view.number)
    finally:
        over.set()
        thread.join()
        reader.close()
        catalog.__exit__()


def test_one_follower_a_state_directory(tmp_path: Path) -> None:
    with only_sync(tmp_path), pytest.raises(Unavailable, match="follows the chain for .* already"), only_sync(tmp_path):
        pass
    with only_sync(tmp_path):
        pass


def test_settlement_and_catalog_agree_on_what_is_in_force(node: ChainNode, devnet: Devnet) -> None:
    """Two readings of the same events, at every block there is."""
    node.publish("poet")
    facts = read_facts(devnet.web3, devnet.deployment)
    registry = Registry(facts)
    for header in facts.headers.values():
        view = registry_view(facts.events, header)
        parameters = registry.parameters(header)
        assert (view.parameters and view.parameters.digest) == (parameters and parameters.digest)
        listed = {(bytes.fromhex(one.owner[2:]), one.digest): (one.terms.digest, one.base) for one in view.models}
        models = {
            (bytes.fromhex(e.args["owner"][2:]), e.args["digest"])
            for e in facts.of("AdapterRegistry", "ModelRegistered")
        }
        settled = {key: found for key in models if (found := registry.terms(*key, header)) is not None}
        assert listed == {key: (one.terms_hash, one.base) for key, one in settled.items()}


# --- facts ------------------------------------------------------------------------------------------------------------


def test_facts_are_the_same_read_at_once_in_pieces_and_from_a_file(
    devnet: Devnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_facts(devnet.web3, devnet.deployment)
    assert {"ParametersPublished"} <= {event.name for event in whole.events}
    monkeypatch.setattr("openlora.network.chain_facts.SPAN", 3)
    cache = tmp_path / "facts.sqlite"
    steps = []
    pieces = read_facts(devnet.web3, devnet.deployment, whole.head, cache, lambda done, total: steps.append(done))
    assert (pieces.events, len(steps)) == (whole.events, -(-whole.head // 3))
    again = read_facts(devnet.web3, devnet.deployment, whole.head, cache, lambda done, total: steps.append(done))
    assert (again.events, len(steps)) == (whole.events, -(-whole.head // 3))
    half = read_facts(devnet.web3, devnet.deployment, whole.head // 2, cache)
    assert half.events == tuple(event for event in whole.events if event.block <= whole.head // 2)
    assert half.headers[half.head].hash == bytes(devnet.web3.eth.get_block(half.head)["hash"])
    cache.write_bytes(b"not a database at all")
    assert read_facts(devnet.web3, devnet.deployment, whole.head, cache).events == whole.events


def test_facts_follow_a_re_org(tmp_path: Path) -> None:
    own = Devnet(tmp_path / "devnet").start()
    try:
        cache, registry = tmp_path / "facts.sqlite", own.contracts.registry
        own.register("owner-1", "01" * 32, None, "stays", "openlora:x", CARD)
        own.register("owner-1", "02" * 32, None, "goes", "openlora:x", CARD)
        before = read_facts(own.web3, own.deployment, cache=cache)
        own.rpc("anvil_reorg", 1, [])
        own.register("owner-2", "03" * 32, None, "comes", "openlora:x", CARD)
        after = read_facts(own.web3, own.deployment, cache=cache)
        names = [event.args["name"] for event in after.of("AdapterRegistry", "ModelRegistered")]
        assert names == ["stays", "comes"]
        whole = read_facts(own.web3, own.deployment)
        assert after.headers == whole.headers
        assert after == whole
        assert before.head <= after.head
        own.rpc("anvil_rollback", 2)
        names = [
            event.args["name"]
            for event in read_facts(own.web3, own.deployment, cache=cache).of("AdapterRegistry", "ModelRegistered")
        ]
        assert names == ["stays"]
        assert registry.model_of(own.account("owner-2").address, b"\3" * 32).terms_version == 0
    finally:
        own.stop()


def test_only_final_blocks_are_facts(devnet: Devnet) -> None:
    deployment = devnet.deployment.model_copy(update={"confirmations": 3})
    head = devnet.web3.eth.block_number
    assert read_facts(devnet.web3, deployment).head == head - 3
    finalized = devnet.deployment.model_copy(update={"confirmations": "finalized"})
    assert read_facts(devnet.web3, finalized).head == devnet.web3.eth.get_block("finalized")["number"] < head


def test_two_who_read_into_one_file_take_turns(devnet: Devnet, tmp_path: Path) -> None:
    cache, lock = tmp_path / "facts.sqlite", tmp_path / "facts.sqlite.lock"
    found: list[ChainFacts] = []

    def read(web3: Web3) -> None:
        found.append(read_facts(web3, devnet.deployment, cache=cache))

    first, second = devnet.deployment.connect(), devnet.deployment.connect()
    other = threading.Thread(target=read, args=(second,))
    get_logs = first.eth.get_logs

    def while_the_other_one_starts(wanted: Any) -> Any:
        if other.ident is None:
            other.start()
        while other.is_alive() and not _waited_for(lock):
            other.join(0.01)
        return get_logs(wanted)

    first.eth.get_logs = while_the_other_one_starts  # type: ignore[method-assign]
    read(first)
    other.join()
    assert found[0] == found[1] == read_facts(devnet.web3, devnet.deployment, found[0].head)


def _waited_for(lock: Path) -> bool:
    """Whether somebody waits for a lock file, as Linux tells it."""
    inode = f":{lock.stat().st_ino} " if lock.exists() else " no lock "
    return any("->" in line and inode in line for line in Path("/proc/locks").read_text().splitlines())


def test_a_cache_of_another_deployment_is_begun_anew(devnet: Devnet, tmp_path: Path) -> None:
    cache = tmp_path / "facts.sqlite"
    whole = read_facts(devnet.web3, devnet.deployment, cache=cache)
    other = devnet.deployment.model_copy(update={"start_block": whole.head})
    assert read_facts(devnet.web3, other, whole.head, cache).events == tuple(
        event for event in whole.events if event.block == whole.head
    )
    with sqlite3.connect(cache) as connection:
        (facts,) = connection.execute("SELECT facts FROM deployment").fetchone()
    assert json.loads(facts)["start_block"] == whole.head


def test_parameters_must_be_exactly_of_their_form() -> None:
    from openlora.network.parameters import parse_parameters

    right = {
        "schema": 1,
        "platform": "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed",
        "platform_ppm": 1,
        "node_ppm": 999_999,
    }
    right |= {"adapter_ppm": 0, "data_ppm": 0, "base_ppm": 0, "max_age": 60}
    assert json.loads(parse_parameters(right).document) == right
    for change, words in [
        ({"node_ppm": 999_998}, "add up to 999999 ppm"),
        ({"platform": right["platform"].lower()}, "parameters.platform"),
        ({"max_age": 0}, "parameters.max_age"),
        ({"max_age": 1.0}, "parameters.max_age"),
        ({"schema": 2}, "parameters.schema"),
        ({"more": 1}, "parameters.more"),
    ]:
        with pytest.raises(InvalidArgument, match=words):
            parse_parameters({**right, **change})
