"""`openlora adapters merge`: from the command line to tokens of the engine."""

import fcntl
import json
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from tiny_models import Engine, make_adapter, make_model, make_prompt, use
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner
from waiting import wait_for

from openlora.adapters.adapter_spec import parse_adapters
from openlora.adapters.catalog import Catalog
from openlora.adapters.commands import adapters_app
from openlora.adapters.manifest import adapter_manifest
from openlora.adapters.merge import merge, merge_record, source_of
from openlora.adapters.merge_plan import MergeLimits, MergeSource
from openlora.adapters.store import AdapterStore
from openlora.errors import Unavailable

ADDRESS = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"  # from EIP-55
CARD = {"schema": 1, "owner": ADDRESS, "licence": "MIT", "prices": {"version": 1, "input": 1, "output": 2}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def first_state(model, tmp_path_factory):
    """Two adapters that differ in rank, scaling and targets."""
    root = tmp_path_factory.mktemp("merge")
    make_adapter(model, root / "poet", 1, r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"])
    make_adapter(
        model,
        root / "cook",
        2,
        r=3,
        lora_alpha=4,
        use_rslora=True,
        target_modules=["q_proj", "o_proj"],
        rank_pattern={"layers.1.self_attn.o_proj": 7},
    )
    for name in ("poet", "cook"):
        assert run(root / "state", "add", root / name, "--model", model).exit_code == 0
    return root / "state"


@pytest.fixture
def state(first_state, tmp_path):
    return Path(shutil.copytree(first_state, tmp_path / "state"))


@pytest.fixture(scope="module")
def merged_state(first_state, tmp_path_factory):
    """With `both`, poet × 0.7 + cook × −0.4, merged by `cat`."""
    state = Path(shutil.copytree(first_state, tmp_path_factory.mktemp("merged") / "state"))
    done = run(state, "merge", "poet=0.7", "cook=-0.4", "--name", "both")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("both version 1: added (")
    return state


def run(state, *arguments, environment=None):
    return CliRunner().invoke(adapters_app, [*map(str, arguments), "--state-dir", str(state)], env=environment)


def shown(state, name):
    return json.loads(run(state, "show", name, "--json").stdout)


def test_the_merged_adapter_is_what_the_ensemble_computes(model, merged_state):
    paths = {name: shown(merged_state, name)["path"] for name in ("poet", "cook", "both")}
    with Engine(model) as engine:
        for seed in range(3):
            prompt = make_prompt(seed, 20)
            ensemble = engine.ask(prompt, [use(paths["poet"], 0.7), use(paths["cook"], -0.4)], logprobs=1)
            merged = engine.ask(prompt, [use(paths["both"])], logprobs=1)
            assert merged.finish_reason == "length", merged.error
            assert merged.ids == ensemble.ids != engine.ask(prompt).ids
            ours, theirs = ([one.logprob for one in answer.logprobs] for answer in (merged, ensemble))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_peft_loads_it_and_gives_the_same_logits(model, merged_state):
    prompt = torch.tensor([make_prompt(5, 16)])
    poet, cook, both = (shown(merged_state, name)["path"] for name in ("poet", "cook", "both"))
    with torch.no_grad():
        merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), both)
        logits = merged(prompt).logits
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), poet, adapter_name="poet")
        peft.load_adapter(cook, adapter_name="cook")
        for layer in peft.modules():
            for name, weight in (("poet", 0.7), ("cook", -0.4)):
                if isinstance(layer, LoraLayer) and name in layer.scaling:
                    layer.scaling[name] *= weight
        peft.base_model.set_adapter(["poet", "cook"])
        torch.testing.assert_close(logits, peft(prompt).logits, rtol=1e-4, atol=1e-4)


def test_what_is_recorded(merged_state):
    tree = shown(merged_state, "both")
    path = Path(tree["path"])
    assert adapter_manifest(path).digest == tree["digest"]
    assert tree["merge"] == {
        "schema": 1,
        "sources": [
            {"digest": shown(merged_state, "poet")["digest"], "weight": 700_000},
            {"digest": shown(merged_state, "cook")["digest"], "weight": -400_000},
        ],
        "method": "cat",
        "density": None,
        "majority_sign": None,
        "seed": None,
        "rank": None,
    }
    assert tree["source"] == source_of(merge_record(path))
    assert (tree["rank"], tree["target_modules"]) == (7, ["down_proj", "o_proj", "q_proj", "v_proj"])
    assert {tensor.dtype for tensor in load_file(path / "adapter_model.safetensors").values()} == {torch.float32}
    assert shown(merged_state, "poet")["merge"] is None
    assert (path.stat().st_mode & 0o777, list((merged_state / "merging").iterdir())) == (
        0o700,
        [merged_state / "merging" / ".lock"],
    )


def test_the_same_again_is_found_and_elsewhere_gives_the_same_digest(merged_state, state):
    digest = shown(merged_state, "both")["digest"]
    again = json.loads(run(merged_state, "merge", "poet=0.7", "cook=-0.4", "--name", "both", "--json").stdout)
    assert (again["change"], again["computed"], again["version"]) == ("unchanged", False, 1)
    renamed = run(merged_state, "merge", "poet=0.7", "cook@1=-0.4", "--name", "second")
    assert renamed.stdout == f"second version 1: added ({digest[:16]}…, rank 7, merged before)\n"
    elsewhere = json.loads(run(state, "merge", "poet=0.7", "cook=-0.4", "--name", "other", "--json").stdout)
    assert (elsewhere["digest"], elsewhere["computed"]) == (digest, True)


def test_a_merge_whose_files_are_lost_is_computed_again(merged_state, tmp_path):
    state = Path(shutil.copytree(merged_state, tmp_path / "state"))
    digest = shown(state, "both")["digest"]
    shutil.rmtree(state / "adapters" / digest)
    (state / "merging" / "half").mkdir()  # of a merge that was killed
    again = json.loads(run(state, "merge", "poet=0.7", "cook=-0.4", "--name", "both", "--json").stdout)
    assert (again["digest"], again["computed"], again["change"]) == (digest, True, "unchanged")
    assert not (state / "merging" / "half").exists()


def test_a_merged_adapter_can_be_merged(merged_state, tmp_path):
    state = Path(shutil.copytree(merged_state, tmp_path / "state"))
    done = run(state, "merge", "both", "poet=0.5", "--name", "third", "--method", "ties_svd", "--density", "0.5")
    assert done.exit_code == 0, done.stderr
    plan = merge_record(Path(shown(state, "third")["path"]))
    assert plan.sources[0] == MergeSource(shown(state, "both")["digest"], 1_000_000)
    assert (plan.method, plan.density, plan.majority_sign) == ("ties_svd", 500_000, "total")


def test_terms_are_given_by_a_card(merged_state, tmp_path):
    state = Path(shutil.copytree(merged_state, tmp_path / "state"))
    card = tmp_path / "card.json"
    arguments = ("merge", "poet=0.7", "cook=-0.4", "--name", "both")
    card.write_text(json.dumps({**CARD, "base": Catalog(state / "catalog.sqlite").base().digest}))
    assert run(state, *arguments, "--card", card).stdout.startswith("both version 1: updated (")
    assert shown(state, "both")["card"] == CARD
    assert "unchanged" in run(state, *arguments).stdout
    assert shown(state, "both")["card"] == CARD
    card.write_text(json.dumps({**CARD, "base": "1" * 64}))
    assert "is not this base model" in run(state, *arguments, "--card", card).stderr
    card.write_text(json.dumps({**CARD, "owner": "me"}))
    assert "[INVALID_ARGUMENT] card.owner:" in run(state, *arguments, "--card", card).stderr


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["poet=much", "--name", "x"], 2, "a number is wanted after '='"),
        (["poet=11", "cook", "--name", "x"], 2, "adapters: weight of 'poet': at most 10 in size"),
        (["poet=nan", "cook", "--name", "x"], 2, "adapters: "),
        (["poet", "poet", "--name", "x"], 2, "adapters: 'poet' comes twice"),
        (["poet=0", "cook", "--name", "x"], 2, "is zero: leave it out"),
        (["poet", "nobody", "--name", "x"], 4, "[ADAPTER_NOT_FOUND] no adapter 'nobody'"),
        (["poet", "cook@7", "--name", "x"], 4, "[ADAPTER_NOT_FOUND] no adapter 'cook' version '7'"),
        (["poet", "base", "--name", "x"], 2, "is the base model"),
        (["poet", "cook", "--name", "base"], 2, "name: 'base' is reserved"),
        (["poet", "cook", "--name", "poet"], 2, "name: 'poet' is one of the sources"),
        (["poet", "cook", "--name", "x", "--method", "mean"], 2, "method: 'mean' is none of cat, linear"),
        (["poet", "cook", "--name", "x", "--density", "0.5"], 2, "density: has no meaning for method 'cat'"),
        (["poet", "cook", "--name", "x", "--method", "linear"], 2, "q_proj poet has 4, cook has 3"),
    ],
)
def test_what_is_wrong_is_one_line(first_state, arguments, exit_code, message):
    done = run(first_state, "merge", *arguments)
    assert (done.exit_code, done.stdout) == (exit_code, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert run(first_state, "show", "x").exit_code == 4


@pytest.mark.parametrize(
    ("limit", "value", "exit_code", "message"),
    [
        ("MAX_ADAPTERS", "1", 7, "[OVERLOADED] 1 merged adapters are in the catalog, 1 are allowed"),
        ("MAX_BYTES", "1000", 7, "[OVERLOADED] merged adapters take 0 MiB"),
        ("MAX_MEMORY_BYTES", "1000", 2, "[INVALID_ARGUMENT] method: this merge would hold"),
        ("MAX_BYTES", "many", 2, "[INVALID_ARGUMENT] merge.max_bytes: Input should be a valid integer"),
    ],
)
def test_limits_of_the_node(merged_state, limit, value, exit_code, message):
    arguments = ("merge", "poet", "cook=0.25", "--name", "more")
    done = run(merged_state, *arguments, environment={f"OPENLORA_MERGE__{limit}": value})
    assert (done.exit_code, done.stdout) == (exit_code, "")
    assert message in done.stderr
    assert run(merged_state, "show", "more").exit_code == 4


def test_limits_from_the_servers_file(merged_state, tmp_path):
    (tmp_path / "server.yaml").write_text("merge: {max_adapters: 1}\n")
    done = run(merged_state, "merge", "poet", "cook=0.25", "--name", "more", "--config", tmp_path / "server.yaml")
    assert (done.exit_code, "1 are allowed" in done.stderr) == (7, True)


def test_a_source_whose_files_are_gone(state):
    shutil.rmtree(state / "adapters" / shown(state, "cook")["digest"])
    done = run(state, "merge", "poet", "cook", "--name", "x")
    words = "the files of cook are gone from the adapter cache: `openlora adapters fetch cook` brings them back"
    assert (done.exit_code, words in done.stderr) == (7, True)
    assert run(state, "fetch", "cook").exit_code == 0
    assert run(state, "merge", "poet", "cook", "--name", "x").exit_code == 0


def test_a_merge_whose_files_are_gone_is_not_fetched_but_made_again(merged_state, tmp_path):
    """What could be fetched beside it is, and every name is told of."""
    state = Path(shutil.copytree(merged_state, tmp_path / "state"))
    digests = {name: shown(state, name)["digest"] for name in ("both", "cook", "poet")}
    shutil.rmtree(state / "adapters" / digests["both"])
    words = "came from no URI; `openlora adapters merge` makes the same ones again"
    done = run(state, "merge", "poet", "both", "--name", "more")
    assert (done.exit_code, "`openlora adapters merge` makes the same ones again" in done.stderr) == (7, True)
    shutil.rmtree(state / "adapters" / digests["cook"])
    done = run(state, "fetch")
    assert done.exit_code == 7
    assert f"cook version 1: fetched ({digests['cook'][:16]}…)\n" in done.stdout
    assert f"both: failed: its files are not in the cache and {words}\n" in done.stdout
    assert words in done.stderr
    assert run(state, "merge", "poet=0.7", "cook=-0.4", "--name", "both").exit_code == 0
    assert run(state, "fetch").stdout == ""


def test_a_merge_makes_room_in_the_cache_or_is_refused(state):
    with Catalog(state / "catalog.sqlite") as catalog:
        local = catalog.current("poet", "")
        for name, digest in (("old", "ab" * 32), ("older", "cd" * 32)):
            catalog.put(replace(local, name=name, digest=digest, source=f"https://host/{name}"))
    store = AdapterStore(state / "adapters")
    for age, digest in ((9000, "ab" * 32), (10000, "cd" * 32)):
        store.path(digest).mkdir()
        (store.path(digest) / "adapter_model.safetensors").write_bytes(bytes(1 << 20))
        os.utime(store.path(digest), (time.time() - age,) * 2)
    size = sum(copy.size for copy in store.copies())
    done = run(state, "merge", "poet", "cook", "--name", "x", environment={"OPENLORA_SOURCES__CACHE_BYTES": str(size)})
    assert done.exit_code == 0, done.stderr
    assert sum(copy.size for copy in store.copies()) <= size
    assert store.path("ab" * 32).exists() and not store.path("cd" * 32).exists()
    full = {"OPENLORA_SOURCES__CACHE_BYTES": str(size - (2 << 20))}
    done = run(state, "merge", "poet", "cook=0.5", "--name", "y", environment=full)
    assert (done.exit_code, "[OVERLOADED] the adapter cache may hold" in done.stderr) == (7, True)
    assert run(state, "show", "y").exit_code == 4


def test_the_sources_of_a_merge_stay_while_it_runs(state):
    store = AdapterStore(state / "adapters")
    digests = [shown(state, name)["digest"] for name in ("poet", "cook")]
    computed = threading.Event()

    def follow(event):
        if event.done == event.total:
            computed.set()

    with Catalog(state / "catalog.sqlite") as catalog, ThreadPoolExecutor() as threads:
        with store.writing():  # the worker waits for this at its end
            sources = parse_adapters('["poet", "cook"]')
            merging = threads.submit(merge, state, catalog.base(), "x", sources, progress=follow)
            assert computed.wait(60)
            assert not any(store.evict(digest) for digest in digests)
        assert merging.result().computed
    assert not any(store.is_leased(digest) for digest in digests)


@pytest.mark.parametrize(
    ("number", "message"), [(signal.SIGXCPU, "more than 77 s of CPU time"), (signal.SIGKILL, "was killed")]
)
def test_a_merge_that_is_ended_changes_nothing(state, number, message):
    (state / "merging").mkdir()
    with (
        Catalog(state / "catalog.sqlite") as catalog,
        ThreadPoolExecutor() as threads,
        open(state / "merging" / ".lock", "wb") as lock,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)  # as another merge would: the worker waits
        sources = parse_adapters('["poet", "cook"]')
        limits = MergeLimits(max_cpu_seconds=77)
        merging = threads.submit(merge, state, catalog.base(), "x", sources, limits=limits)
        os.kill(limited_worker(77), number)
        with pytest.raises(Unavailable, match=message):
            merging.result()
    assert run(state, "show", "x").exit_code == 4


def limited_worker(seconds: int) -> int:
    """The process that merges for us, when its limits are in force."""

    def limited() -> int | None:
        for child in psutil.Process().children():
            with suppress(psutil.Error):
                if child.rlimit(psutil.RLIMIT_CPU)[0] == seconds:
                    return child.pid
        return None

    return wait_for("worker", limited)
