"""Groups and tasks: who gets what, what the file keeps, what the CLI says, what a request's ticket holds."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from live_server import key_digest
from small_server import card
from typer.testing import CliRunner

from openlora.adapters.catalog import Catalog
from openlora.adapters.catalog_reader import CatalogReader
from openlora.adapters.catalog_rows import AdapterRecord, BaseFacts
from openlora.adapters.chain_view import CHAIN_ORIGIN, ChainTerms, ChainView
from openlora.adapters.ingest import ingest, sync_directory
from openlora.adapters.ingest_worker import IngestJob
from openlora.adapters.routes import Group, Routes, RoutesReader, Target
from openlora.adapters.routes_commands import routes_app
from openlora.config import BaseModelFacts, RunConfig, Settings
from openlora.errors import AdapterInvalid, AdapterNotFound, InvalidArgument, OpenLoRAError, Unavailable
from openlora.network.deployment import CONTRACT_NAMES, Deployment
from openlora.serving.resolve import ResolverStep
from openlora.serving.seal import Seal, write_run_key
from openlora.serving.ticket import TicketOffice

TEXT = b"hello"
SECRET = "secret"  # an adapter of alice's
ALICE_KEY = "alice-key"
CHAIN_OWNER = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"  # from EIP-55
KEYS = [f"conversation {number}" for number in range(4000)]
NAMES = st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=6, unique=True)


def group(*weights: int, **changes: Any) -> Group:
    return Group("g", tuple(Target(f"v{number}", weight) for number, weight in enumerate(weights)), **changes)


def first_choices(of: Group) -> dict[str, str]:
    return {key: of.preference(key)[0].adapter for key in KEYS}


# --- who gets what ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(90, 10), (1, 1), (1, 2, 3, 4), (999, 1)])
def test_each_target_gets_its_part_of_all_keys(weights: tuple[int, ...]) -> None:
    counts = Counter(first_choices(group(*weights)).values())
    for number, weight in enumerate(weights):
        part = weight / sum(weights)
        deviation = (part * (1 - part) / len(KEYS)) ** 0.5
        assert counts[f"v{number}"] / len(KEYS) == pytest.approx(part, abs=4 * deviation)


def test_a_heavier_canary_keeps_the_conversations_that_it_has() -> None:
    before, after = first_choices(group(90, 10)), first_choices(group(70, 30))
    moved = {(before[key], after[key]) for key in KEYS if before[key] != after[key]}
    assert moved == {("v0", "v1")}


def test_who_loses_a_target_gets_the_others_by_their_weights_and_nobody_else_moves() -> None:
    whole = group(50, 30, 20)
    orders = {key: [target.adapter for target in whole.preference(key)] for key in KEYS}
    second = Counter(order[1] for order in orders.values() if order[0] == "v0")
    assert second["v1"] / second.total() == pytest.approx(0.6, abs=0.045)
    without = first_choices(replace(whole, targets=whole.targets[1:]))
    assert all(without[key] == next(name for name in order if name != "v0") for key, order in orders.items())


@given(st.text(), st.lists(st.integers(0, 1_000_000), min_size=1, max_size=16).filter(any))
def test_the_order_is_the_keys_and_has_every_target_with_a_weight(key: str, weights: list[int]) -> None:
    order = group(*weights).preference(key)
    assert order == group(*weights).preference(key)
    assert {target.adapter for target in order} == {f"v{n}" for n, weight in enumerate(weights) if weight}


def test_another_group_chooses_by_itself() -> None:
    one, other = first_choices(group(1, 1)), first_choices(replace(group(1, 1), name="h"))
    assert 0.45 < sum(one[key] == other[key] for key in KEYS) / len(KEYS) < 0.55


# --- the file ---------------------------------------------------------------------------------------------------------


def record(name: str, number: int = 1, **changes: Any) -> AdapterRecord:
    made = AdapterRecord(name, 0, f"{number:02x}{name.encode().hex():0<62}"[:64], 8, "ready", "", None)
    return replace(made, **changes)


@pytest.fixture
def catalog_path(tmp_path: Path) -> Path:
    """v1 and v2 (twice), one quarantined, one that only alice may use."""
    path = tmp_path / "catalog.sqlite"
    with Catalog(path) as catalog:
        for one in (record("v1"), record("v2"), record("v2", 2), record(SECRET)):
            catalog.put(one)
        catalog.put(record("bad", status="quarantined", reason="rotten"))
    return path


def set_group(path: Path, name: str, *targets: Target, skip_unready: bool = False) -> Group:
    with Routes(path) as routes:
        return routes.set_group(Group(name, targets, skip_unready))


def test_what_is_written_is_read_and_a_reader_follows(catalog_path: Path) -> None:
    with Routes(catalog_path):
        reader = RoutesReader(catalog_path)
    assert reader.groups() == []
    made = set_group(catalog_path, "canary", Target("v1", 90), Target("v2", 10, 1), skip_unready=True)
    assert reader.groups() == [made] and reader.group("canary") == made
    changed = set_group(catalog_path, "canary", Target("v1", 1))
    assert reader.group("canary") == changed
    with Routes(catalog_path) as routes:
        routes.prefer("sql", "v1")
        assert reader.preferences() == {"sql": "v1"}
        routes.forget("sql")
        routes.remove_group("canary")
        assert (reader.preferences(), reader.groups()) == ({}, [])
        with pytest.raises(AdapterNotFound, match="no group 'canary'"):
            routes.remove_group("canary")
        with pytest.raises(AdapterNotFound, match="'sql'"):
            routes.forget("sql")


@pytest.mark.parametrize(
    ("name", "targets", "words"),
    [
        ("v1", [Target("v2", 1)], "'v1' is an adapter"),
        ("bad", [Target("v2", 1)], "'bad' is an adapter"),
        ("base", [Target("v2", 1)], "reserved"),
        ("a b", [Target("v2", 1)], "is no adapter name"),
        ("g", [], "1 to 16 targets, got 0"),
        ("g", [Target(f"v{n}", 1) for n in range(17)], "1 to 16 targets, got 17"),
        ("g", [Target("v1", -1)], "got -1"),
        ("g", [Target("v1", 1_000_001)], "got 1000001"),
        ("g", [Target("v1", 0), Target("v2", 0)], "all weights are zero"),
        ("g", [Target("v1", 1), Target("v1", 2)], "'v1' comes twice"),
        ("g", [Target("nobody", 1)], "no adapter 'nobody'"),
    ],
)
def test_groups_that_can_not_be(catalog_path: Path, name: str, targets: list[Target], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        set_group(catalog_path, name, *targets)
    assert RoutesReader(catalog_path).groups() == []


def test_no_adapter_takes_the_name_of_a_group_whoever_brings_it(catalog_path: Path, tmp_path: Path) -> None:
    set_group(catalog_path, "canary", Target("v1", 1))
    with Catalog(catalog_path) as catalog:
        with pytest.raises(InvalidArgument, match="'canary' is a group"):
            catalog.put(record("canary"))
        catalog.remove("v2")
    with pytest.raises(InvalidArgument, match="'canary' is a group"):
        ingest(tmp_path, BaseFacts("nowhere", "0" * 64, 64), [IngestJob("canary", "/nowhere")])
    set_group(catalog_path, "v2", Target("v1", 1))  # a name that is free again


# --- what a request gets ----------------------------------------------------------------------------------------------


@pytest.fixture
def ask(catalog_path: Path):
    return asking(catalog_path, None)


def asking(catalog_path: Path, deployment: Path | None):
    """Asks the real resolver of a server without Triton; the names and digests in the ticket."""
    state = catalog_path.parent
    settings = Settings(
        model=state,
        access={"callers": {"alice": key_digest(ALICE_KEY)}, "private": {SECRET: ["alice"]}},
        network={"deployment": deployment},
    )
    base = BaseModelFacts(name="m", path=state, digest="0" * 64, card=None, eos_token_ids=(2,), max_model_len=64)
    run = RunConfig(settings=settings, base=base, state_dir=state, socket_dir=state, shm_prefix="x", launcher_pid=1)
    run.run_dir.mkdir()
    write_run_key(run.run_key_path)
    step = ResolverStep(run)
    reader = CatalogReader(catalog_path)
    office = TicketOffice(Seal(run.run_key_path, "ticket"))

    def resolve(adapters: str, *, key: str | None = None, label: str = "", alice: bool = False) -> dict[str, str]:
        for one in reader.records():  # the resolver looks for their bytes
            (run.adapter_cache / one.digest).mkdir(parents=True, exist_ok=True)
        inputs = {"text_input": TEXT, "adapters": adapters.encode()}
        if key is not None:
            inputs["sampling_parameters"] = json.dumps({"routing_key": key}).encode()
        if alice:
            inputs["api_key"] = ALICE_KEY.encode()
        ticket = office.redeem(step.resolve(inputs, {}, label), TEXT)
        return dict(zip(ticket.adapter_names, [use.digest for use in ticket.adapters], strict=True))

    return resolve


def refusal(ask, *arguments: Any, **options: Any) -> OpenLoRAError:
    with pytest.raises(OpenLoRAError) as caught:
        ask(*arguments, **options)
    return caught.value


def test_a_group_gives_one_target_with_the_exact_version(ask, catalog_path: Path) -> None:
    set_group(catalog_path, "canary", Target("v1", 50), Target("v2", 50, 1))
    answers = [ask("canary", key=key) for key in KEYS[:100]]
    digests = {"v1": record("v1").digest, "v2": record("v2").digest}  # of v2 the first version, though there is a newer
    assert all(digests[name] == digest for answer in answers for name, digest in answer.items())
    assert {name for answer in answers for name in answer} == {"v1", "v2"}
    assert answers == [ask("canary", key=key) for key in KEYS[:100]]
    assert list(ask('[{"name": "canary", "weight": 0.5}, "v1"]', key=_key_of(ask, "v2"))) == ["v2", "v1"]


def _key_of(ask, name: str) -> str:
    return next(key for key in KEYS if name in ask("canary", key=key))


def test_what_the_choice_follows(ask, catalog_path: Path) -> None:
    set_group(catalog_path, "canary", Target("v1", 1), Target("v2", 1))

    def seen(**options: Any) -> set[str]:
        return {name for _ in range(60) for name in ask("canary", **options)}

    assert len(seen(key="k")) == 1
    assert len(seen(label="7")) == 1
    assert seen() == {"v1", "v2"}  # chance alone: once in 2^59 they are all the same
    by_label = [next(iter(ask("canary", key="k", label=str(number)))) for number in range(60)]
    assert len(set(by_label)) == 1  # the key wins
    differ = [ask("canary", key=key) != ask("canary", key=key, alice=True) for key in KEYS[:100]]
    assert 20 < sum(differ) < 80  # callers do not share keys


def test_a_forbidden_or_missing_target_is_like_a_group_that_does_not_exist(ask, catalog_path: Path) -> None:
    nothing = refusal(ask, "nobody")
    assert isinstance(nothing, AdapterNotFound)
    set_group(catalog_path, "canary", Target(SECRET, 1))
    set_group(catalog_path, "lost", Target("v2", 1))
    with Catalog(catalog_path) as catalog:
        catalog.remove("v2")
    for name in ("canary", "lost"):
        assert str(refusal(ask, name)) == str(nothing).replace("nobody", name)
        versioned = refusal(ask, f'[{{"name": "{name}", "version": 1}}]')
        assert str(versioned) == str(refusal(ask, '[{"name": "nobody", "version": 1}]')).replace("nobody", name)
    assert list(ask("canary", alice=True)) == [SECRET]


def test_a_chain_that_is_silent_tells_a_stranger_of_no_group_and_no_task(catalog_path: Path, tmp_path: Path) -> None:
    """An adapter of the chain's is behind both, and nobody can say whether it is still alice's alone."""
    places = {name: {"address": CHAIN_OWNER, "code_hash": "0x" + "1" * 64} for name in CONTRACT_NAMES}
    facts = {"chain_id": 7, "genesis": "0x" + "2" * 64, "rpc_url": "http://127.0.0.1:1", "start_block": 0}
    deployment = tmp_path / "deployment.json"
    Deployment(**facts, confirmations=0, contracts=places).save(deployment)
    name, rule = f"{CHAIN_OWNER}/poet", {"policy": "allow-list", "callers": ["alice"]}
    made = record(name, digest="ab" * 32, origin=CHAIN_ORIGIN, card={**card(["poetry"]), "access": rule})
    with Catalog(catalog_path) as catalog:
        stale = ChainView(7, CHAIN_OWNER, 1, "3" * 64, None, None, time.time() - 3600)
        catalog.follow_chain(stale, [ChainTerms(name, made.digest, made.card)])
        catalog.put(made)
    set_group(catalog_path, "canary", Target(name, 1))
    ask = asking(catalog_path, deployment)
    for asked, unknown in (("canary", "nosuch"), ('[{"task": "poetry"}]', '[{"task": "nosuch"}]')):
        stranger = refusal(ask, asked)
        assert isinstance(stranger, AdapterNotFound)
        wanted = "poetry" if "task" in asked else asked
        assert str(stranger).replace(wanted, "nosuch") == str(refusal(ask, unknown))
        assert isinstance(refusal(ask, asked, alice=True), Unavailable)
    assert isinstance(refusal(ask, name), Unavailable)  # as any name of a chain's


@pytest.mark.parametrize("gone", ["removed", "quarantined", "forbidden"])
def test_unready_targets_are_skipped_only_where_the_group_says_so(ask, catalog_path: Path, gone: str) -> None:
    target = {"removed": "v2", "quarantined": "bad", "forbidden": SECRET}[gone]
    targets = (Target("v1", 1), Target(target, 1))
    set_group(catalog_path, "strict", *targets)
    set_group(catalog_path, "lenient", *targets, skip_unready=True)
    if gone == "removed":
        with Catalog(catalog_path) as catalog:
            catalog.remove("v2")
    outcomes: Counter[str] = Counter()
    for key in KEYS[:100]:
        assert list(ask("lenient", key=key)) == ["v1"]
        try:
            outcomes.update(list(ask("strict", key=key)))
        except OpenLoRAError as error:
            outcomes[type(error).__name__] += 1
    expected = AdapterInvalid if gone == "quarantined" else AdapterNotFound
    assert set(outcomes) == {"v1", expected.__name__}
    assert 20 < outcomes["v1"] < 80


def test_a_group_without_a_ready_target_says_why(ask, catalog_path: Path) -> None:
    set_group(catalog_path, "ill", Target("bad", 1), skip_unready=True)
    assert "'bad': rotten" in str(refusal(ask, "ill"))


def test_weights_apply_from_the_next_request_on(ask, catalog_path: Path) -> None:
    for name in ("v1", "v2", "v1"):
        set_group(catalog_path, "canary", Target(name, 1), *(Target(other, 0) for other in {"v1", "v2"} - {name}))
        assert [list(ask("canary", key=key)) for key in KEYS[:20]] == [[name]] * 20


def test_a_task_is_the_one_ready_adapter_that_declares_it(ask, catalog_path: Path) -> None:
    task = '{"task": "sql"}'
    assert str(refusal(ask, task)) == "[ADAPTER_NOT_FOUND] no adapter for the task 'sql'"
    with Catalog(catalog_path) as catalog:
        catalog.put(record(SECRET, 2, card=card(["sql"])))
        catalog.put(record("bad", 2, status="quarantined", reason="rotten", card=card(["sql"])))
    assert str(refusal(ask, task)) == "[ADAPTER_NOT_FOUND] no adapter for the task 'sql'"
    assert list(ask(task, alice=True)) == [SECRET]
    with Catalog(catalog_path) as catalog:
        catalog.put(record("v1", 2, card=card(["sql", "summarise-en"])))
    assert ask(task) == ask('[{"task": "summarise-en", "weight": 0.5}]') == {"v1": record("v1", 2).digest}
    assert list(ask('["v2", {"task": "sql"}]')) == ["v2", "v1"]
    with Catalog(catalog_path) as catalog:
        catalog.put(record("v1", 3, card=card(["summarise-en"])))  # its newest version can't any more
    assert str(refusal(ask, task)) == "[ADAPTER_NOT_FOUND] no adapter for the task 'sql'"


def test_several_for_a_task_want_a_preference(ask, catalog_path: Path) -> None:
    task = '{"task": "sql"}'
    with Catalog(catalog_path) as catalog:
        for name in ("v1", "v2", SECRET):
            catalog.put(record(name, 3, card=card(["sql"])))
    words = "[INVALID_ARGUMENT] adapters: several adapters are for the task 'sql': {}; name one"
    assert str(refusal(ask, task)) == words.format("v1, v2")
    assert str(refusal(ask, task, alice=True)) == words.format(f"{SECRET}, v1, v2")
    with Routes(catalog_path) as routes:
        routes.prefer("sql", "v2")
        assert list(ask(task)) == list(ask(task, alice=True)) == ["v2"]
        routes.prefer("sql", SECRET)
        assert list(ask(task, alice=True)) == [SECRET]
        assert str(refusal(ask, task)) == words.format("v1, v2")
    with Catalog(catalog_path) as catalog:
        catalog.remove("v1")
    assert list(ask(task)) == ["v2"]  # the only one that it may use
    with Catalog(catalog_path) as catalog:
        for number in range(12):
            catalog.put(record(f"w{number:02}", card=card(["sql"])))
    assert str(refusal(ask, task)) == words.format("v2, w00, w01, w02, w03, w04, w05, w06 and more")


@pytest.mark.parametrize(
    ("adapters", "words"),
    [
        ('{"task": "SQL"}', "'SQL' is no task"),
        ('{"task": "a\\n"}', "is no task"),
        ('{"task": 5}', "5 is no task"),
        ('{"task": "sql", "adapters": ["v1"]}', "unknown key 'adapters'"),
        ('{"task": "sql", "version": 1}', "unknown key 'version'"),
        ('[{"task": "sql", "name": "v1"}]', "unknown key 'name'"),
        ('{"task": "sql", "weight": 0}', "all weights are zero"),
        ('{"task": "sql", "weight": 11}', "at most 10 in size, got 11"),
    ],
)
def test_bad_tasks(ask, adapters: str, words: str) -> None:
    error = refusal(ask, adapters)
    assert isinstance(error, InvalidArgument) and error.field == "adapters"
    assert words in str(error)


@pytest.mark.parametrize("key", ["", "x" * 257, 5])
def test_bad_routing_keys(ask, key: Any) -> None:
    error = refusal(ask, "v1", key=key)
    assert isinstance(error, InvalidArgument) and error.field == "routing_key"


# --- the CLI ----------------------------------------------------------------------------------------------------------


def cli(path: Path, *arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(routes_app, [*arguments, "--state-dir", str(path.parent)])
    return done.exit_code, done.stdout + done.stderr


def test_the_commands(catalog_path: Path) -> None:
    assert cli(catalog_path, "list") == (0, "no groups\n")
    made = cli(catalog_path, "set", "canary", "--to", "v1=90", "--to", "v2@1=10", "--skip-unready")
    assert made == (0, "canary: v1 90.00%, v2@1 10.00%\n")
    with Catalog(catalog_path) as catalog:
        catalog.put(record("v2", 3, card=card(["sql"])))
        catalog.remove("v1")
    assert cli(catalog_path, "prefer", "sql", "v2") == (0, "task sql: v2\n")
    code, text = cli(catalog_path, "list", "--json")
    tree = json.loads(text)
    (listed,) = tree["groups"]
    assert (code, tree["preferences"], listed["name"], listed["skip_unready"]) == (0, {"sql": "v2"}, "canary", True)
    assert listed["targets"] == [
        {"adapter": "v1", "weight": 90, "version": None, "state": "missing"},
        {"adapter": "v2", "weight": 10, "version": 1, "state": "ready"},
    ]
    assert cli(catalog_path, "forget", "sql") == (0, "task sql: no preference\n")
    assert cli(catalog_path, "remove", "canary") == (0, "canary: removed\n")
    assert cli(catalog_path, "list") == (0, "no groups\n")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["set", "g", "--to", "v1=x"], 2, "'v1=x': a whole number is wanted after '='"),
        (["set", "g", "--to", "v1=-1"], 2, "'v1=-1': a whole number is wanted after '='"),
        (["set", "g", "--to", "v1@9=1"], 2, "no adapter 'v1' version '9'"),
        (["set", "g", "--to", "nobody"], 2, "to: no adapter 'nobody'"),
        (["set", "v1", "--to", "v2"], 2, "'v1' is an adapter"),
        (["remove", "g"], 4, "no group 'g'"),
        (["prefer", "sql", "v1"], 2, "the card of 'v1' declares [], not 'sql'"),
        (["prefer", "sql", "nobody"], 4, "no adapter 'nobody'"),
        (["forget", "sql"], 4, "no adapter is preferred for the task 'sql'"),
    ],
)
def test_refused_commands(catalog_path: Path, arguments: list[str], code: int, words: str) -> None:
    done = cli(catalog_path, *arguments)
    assert done[0] == code
    assert words in done[1] and len(done[1].splitlines()) == 1


def test_commands_want_a_catalog(tmp_path: Path) -> None:
    for arguments in (["list"], ["set", "g", "--to", "v1"], ["remove", "g"], ["forget", "sql"]):
        code, words = cli(tmp_path / "catalog.sqlite", *arguments)
        assert code == 7 and "no adapter catalog" in words
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_a_groups_name_fails_alone(catalog_path: Path, tmp_path: Path) -> None:
    adapters = tmp_path / "folders"
    (adapters / "canary").mkdir(parents=True)
    set_group(catalog_path, "canary", Target("v1", 1))
    (result,) = sync_directory(adapters, tmp_path, BaseFacts("nowhere", "0" * 64, 64))
    assert (result.name, result.status) == ("canary", "failed")
    assert "is a group" in result.reason
