"""`openlora adapters …`: output, JSON and exit codes."""

import json
from pathlib import Path

import pytest
from tiny_models import make_adapter, make_model
from typer.testing import CliRunner

from openlora.adapters.catalog_reader import CatalogReader
from openlora.adapters.commands import adapters_app
from openlora.adapters.manifest import adapter_manifest


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def poet(model, tmp_path_factory):
    return Path(make_adapter(model, tmp_path_factory.mktemp("source") / "poet", 1, r=4, target_modules=["q_proj"]))


@pytest.fixture(scope="module")
def wide(model, tmp_path_factory):
    return Path(make_adapter(model, tmp_path_factory.mktemp("source") / "wide", 1, r=200, target_modules=["q_proj"]))


@pytest.fixture(scope="module")
def state(model, poet, tmp_path_factory):
    """With version 1 of `poet`."""
    state = tmp_path_factory.mktemp("state")
    done = run(state, "add", poet, "--model", model)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"poet version 1: added ({adapter_manifest(poet).digest[:16]}…)\n"
    return state


def run(state, *arguments):
    return CliRunner().invoke(adapters_app, [*map(str, arguments), "--state-dir", str(state)])


def test_a_base_model_must_be_known(poet, tmp_path):
    done = run(tmp_path, "add", poet)
    assert done.exit_code == 2
    assert done.stderr == ("[INVALID_ARGUMENT] model: no server has run with this state directory: give --model DIR\n")


def test_another_base_than_the_servers_is_refused(state, poet, tmp_path):
    other = make_model(tmp_path / "other", num_hidden_layers=1)
    done = run(state, "add", poet, "--model", other)
    assert done.exit_code == 2
    assert "this state directory serves" in done.stderr


def test_adding_again_says_unchanged_and_json_is_json(state, poet):
    done = run(state, "add", poet, "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout) == {
        "type": "result",
        "name": "poet",
        "status": "ready",
        "version": 1,
        "digest": adapter_manifest(poet).digest,
        "rank": 4,
        "change": "unchanged",
        "reason": "",
    }


def test_a_refused_adapter_is_one_line_and_exit_code_4(state, wide):
    done = run(state, "add", wide, "--json")
    assert done.exit_code == 4
    assert done.stderr == "[ADAPTER_INVALID] adapter wide: rank 200 is over the limit of 128\n"
    assert json.loads(done.stdout)["status"] == "quarantined"
    shown = run(state, "show", "wide", "--json")
    assert shown.exit_code == 0
    tree = json.loads(shown.stdout)
    assert (tree["status"], tree["reason"], tree["path"]) == (
        "quarantined",
        "rank 200 is over the limit of 128",
        None,
    )
    assert run(state, "remove", "wide").exit_code == 0


@pytest.mark.parametrize("name", ["base", "a/b", ".hidden"])
def test_a_bad_name_is_refused(state, poet, name):
    done = run(state, "add", poet, "--name", name)
    assert done.exit_code == 2
    assert "[INVALID_ARGUMENT] name:" in done.stderr


def test_list_and_show(state, poet):
    digest = adapter_manifest(poet).digest
    listed = run(state, "list")
    assert listed.exit_code == 0
    assert all(word in listed.stdout for word in ("poet", "q_proj", "ready", digest[:16]))
    (tree,) = [entry for entry in json.loads(run(state, "list", "--json").stdout) if entry["name"] == "poet"]
    assert tree == json.loads(run(state, "show", "poet", "--version", digest[:8], "--json").stdout)
    assert (tree["version"], tree["rank"], tree["target_modules"]) == (1, 4, ["q_proj"])
    assert Path(tree["path"], "adapter_model.safetensors").is_file()
    assert digest in run(state, "show", "poet").stdout


def test_what_is_not_there(state, tmp_path):
    for command in (("show", "nobody"), ("remove", "nobody"), ("show", "poet", "--version", "9")):
        done = run(state, *command)
        assert done.exit_code == 4
        assert done.stderr.startswith("[ADAPTER_NOT_FOUND] no adapter ")
    assert run(tmp_path, "remove", "poet").exit_code == 4
    assert run(tmp_path, "list").exit_code == 7


def test_remove_and_what_an_open_reader_sees(state, poet):
    assert run(state, "add", poet, "--name", "bard").exit_code == 0
    reader = CatalogReader(state / "catalog.sqlite")
    assert reader.names() == ["bard", "poet"]
    done = run(state, "remove", "bard", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout) == [{"name": "bard", "version": 1}]
    assert reader.names() == ["poet"]
    reader.close()
    assert run(state, "remove", "bard").exit_code == 4
    assert "bard version 2: added" in run(state, "add", poet, "--name", "bard").stdout
    assert run(state, "remove", "bard", "--version", "2").stdout == "bard version 2: removed\n"
