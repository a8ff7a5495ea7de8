"""`openlora adapters list|use|pin|unpin` over a catalog of many names."""

import json
import os
import pty
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from openlora.adapters.catalog import Catalog
from openlora.adapters.catalog_rows import AdapterRecord, BaseFacts
from openlora.adapters.commands import PAGE_NAMES, adapters_app

NAMES = [f"poet-{number:03}" for number in range(PAGE_NAMES + 1)]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A name more than a page; `poet-001` has two versions, `poet-002` is quarantined."""
    state = tmp_path_factory.mktemp("many")
    with Catalog(state / "catalog.sqlite") as catalog:
        for name in NAMES:
            put(catalog, name)
        put(catalog, "poet-001", digest="2" * 64, target_modules=("down_proj",))
        put(catalog, "poet-002", status="quarantined", reason="holds NaN")
    return state


@pytest.fixture
def state(tmp_path):
    """Three versions of `poet`, one of `cook`."""
    with Catalog(tmp_path / "catalog.sqlite") as catalog:
        catalog.set_base(BaseFacts("/models/base", "b" * 64, 64))
        for number in "123":
            put(catalog, "poet", digest=number * 64)
        put(catalog, "cook")
    return tmp_path


def put(catalog, name, digest="1" * 64, status="ready", reason="", target_modules=("q_proj", "v_proj")):
    catalog.put(AdapterRecord(name, 0, digest, 8, status, reason, None, target_modules, base="b" * 64))


def run(state, *arguments):
    return CliRunner().invoke(adapters_app, [*map(str, arguments), "--state-dir", str(state)])


def listed(state, *arguments):
    done = run(state, "list", *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return [(tree["name"], tree["version"]) for tree in json.loads(done.stdout)]


def names_in(text):
    return [line.split()[0] for line in text.splitlines() if line.strip().startswith("poet-")]


def test_a_pipe_and_json_get_everything(many):
    done = run(many, "list")
    assert sorted(set(names_in(done.stdout))) == NAMES
    assert done.stderr == ""
    assert len(listed(many)) == len(NAMES) + 1


def test_a_terminal_gets_a_page_and_is_told_how_to_go_on(many):
    def on_terminal(*arguments):
        master, slave = pty.openpty()
        command = [sys.executable, "-m", "openlora.cli", "adapters", "list", *arguments, "--state-dir", str(many)]
        with subprocess.Popen(
            command, stdout=slave, stderr=subprocess.PIPE, env={**os.environ, "COLUMNS": "120"}
        ) as it:
            os.close(slave)
            shown = b""
            try:
                while piece := os.read(master, 65536):
                    shown += piece
            except OSError:  # the other end is closed
                pass
            complaint = it.stderr.read().decode()
        os.close(master)
        assert it.returncode == 0, complaint
        return names_in(shown.decode()), complaint

    shown, note = on_terminal()
    assert sorted(set(shown)) == NAMES[:-1]
    assert note == f"there are more: repeat this with --after {NAMES[-2]}\n"
    assert on_terminal("--after", NAMES[-2]) == (NAMES[-1:], "")
    assert on_terminal("--limit", "101")[1] == ""


def test_pages_follow_each_other(many):
    done = run(many, "list", "--limit", 2)
    assert names_in(done.stdout) == ["poet-000", "poet-001", "poet-001"]
    assert done.stderr == "there are more: repeat this with --after poet-001\n"
    assert listed(many, "--limit", 2, "--after", "poet-001") == [("poet-002", 1), ("poet-003", 1)]
    assert listed(many, "--after", "poet-098") == [("poet-099", 1), ("poet-100", 1)]
    assert run(many, "list", "--after", "zebra").stdout == "no adapters\n"
    assert run(many, "list", "--limit", 0).exit_code == 2


def test_filters(many):
    assert listed(many, "--name", "*-00[12]") == [("poet-001", 1), ("poet-001", 2), ("poet-002", 1)]
    assert listed(many, "--status", "quarantined") == [("poet-002", 1)]
    assert listed(many, "--target", "down_proj") == [("poet-001", 2)]
    assert listed(many, "--pinned") == []
    assert ("poet-002", 1) not in listed(many, "--status", "ready")
    done = run(many, "list", "--status", "fine")
    assert (done.exit_code, done.stderr) == (
        2,
        "[INVALID_ARGUMENT] status: ready or quarantined is wanted, got 'fine'\n",
    )


def test_use_moves_a_name_and_list_and_show_say_where_it_is(state):
    def current():
        trees = json.loads(run(state, "list", "--name", "poet", "--json").stdout)
        return [tree["version"] for tree in trees if tree["current"]]

    assert current() == [3]
    done = run(state, "use", "poet", 1)
    assert (done.exit_code, done.stdout) == (0, f"poet version 1 is current ({'1' * 16}…)\n")
    assert current() == [1]
    tree = json.loads(run(state, "show", "poet", "--json").stdout)
    assert (tree["version"], tree["current"]) == (1, True)
    assert json.loads(run(state, "show", "poet", "--version", 3, "--json").stdout)["current"] is False
    assert json.loads(run(state, "use", "poet", "2" * 8, "--json").stdout)["version"] == 2
    lines = [line.split() for line in run(state, "list").stdout.splitlines()]
    assert [line[:2] for line in lines if "current" in line] == [["cook", "1"], ["poet", "2"]]
    assert "poet version 3 is current now" in run(state, "remove", "poet", "--version", 2).stdout


def test_use_of_what_is_not_there_changes_nothing(state):
    for arguments, code in ((("poet", 9), 4), (("nobody", 1), 4), (("poet", "newest"), 2)):
        done = run(state, "use", *arguments)
        assert done.exit_code == code
        assert done.stdout == ""
    assert json.loads(run(state, "show", "poet", "--json").stdout)["version"] == 3


def test_pins_come_and_go(state):
    assert run(state, "pin", "poet").stdout == "poet: pinned\n"
    assert listed(state, "--pinned") == [("poet", 1), ("poet", 2), ("poet", 3)]
    assert json.loads(run(state, "show", "poet", "--json").stdout)["pinned"] is True
    assert [line.split()[0] for line in run(state, "list").stdout.splitlines() if "ready, pinned" in line] == ["poet"]
    assert run(state, "unpin", "poet").stdout == "poet: not pinned\n"
    assert listed(state, "--pinned") == []
    for command in ("pin", "unpin"):
        done = run(state, command, "nobody")
        assert (done.exit_code, done.stderr) == (4, "[ADAPTER_NOT_FOUND] no adapter 'nobody'\n")


def test_without_a_catalog_none_is_made(tmp_path):
    for arguments in (("use", "poet", 1), ("pin", "poet"), ("unpin", "poet")):
        assert run(tmp_path, *arguments).exit_code == 4
    assert list(tmp_path.iterdir()) == []
