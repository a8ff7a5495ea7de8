"""A server's start over a directory that it knows: only what changed is read and worked on."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import make_adapter, make_model

from openlora.adapters.catalog import Catalog
from openlora.adapters.catalog_reader import CatalogReader
from openlora.adapters.catalog_rows import BaseFacts
from openlora.adapters.ingest import sync_directory
from openlora.adapters.ingest_worker import IngestResult, Started, known_records
from openlora.adapters.manifest import SETTLED_NS, model_manifest

NAMES = [f"poet-{number}" for number in range(5)]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def synced(base, tmp_path_factory):
    """A directory of adapters, and the state of a server that has read it when its files were old."""
    root = tmp_path_factory.mktemp("synced")
    for number, name in enumerate(NAMES):
        make_adapter(base.path, root / "adapters" / name, number, r=2, target_modules=["q_proj"])
    settle(root / "adapters")
    results = sync_directory(root / "adapters", root / "state", base)
    assert [result.change for result in results] == ["added"] * len(NAMES)
    return root


@pytest.fixture
def adapters(synced):
    """Not to be changed."""
    return synced / "adapters"


@pytest.fixture
def state(synced, tmp_path):
    return shutil.copytree(synced / "state", tmp_path / "state")


@pytest.fixture
def own(synced, base, tmp_path):
    """A directory to change, and a state that knows it."""
    shutil.copytree(synced / "adapters", tmp_path / "adapters")
    shutil.copytree(synced / "state" / "base_modules", tmp_path / "state" / "base_modules")
    settle(tmp_path / "adapters")
    assert sync(tmp_path / "adapters", tmp_path / "state", base)[1] == NAMES
    return tmp_path / "adapters", tmp_path / "state"


def settle(folder):
    """Wait until the youngest file is old enough for its timestamps to be believed."""
    youngest = max(path.stat().st_ctime_ns for path in folder.rglob("*"))
    while time.time_ns() - youngest <= SETTLED_NS:
        time.sleep(0.05)


def sync(adapters, state, base):
    """Results by name, and the names that the worker was given."""
    events = []
    results = sync_directory(adapters, state, base, events.append)
    told = [event for event in events if isinstance(event, IngestResult)]
    assert sorted(told, key=str) == sorted((result for result in results if result.status != "removed"), key=str)
    return {result.name: result for result in results}, [event.name for event in events if isinstance(event, Started)]


def test_nothing_changed_means_no_worker_and_no_write(adapters, state, base):
    before = known_records(state)
    reader = CatalogReader(state / "catalog.sqlite")
    data_version = reader._connection.execute("PRAGMA data_version").fetchone()
    results, worked_on = sync(adapters, state, base)
    assert worked_on == []
    assert [(name, result.change, result.status, result.version) for name, result in results.items()] == [
        (name, "unchanged", "ready", 1) for name in NAMES
    ]
    assert known_records(state) == before
    assert reader._connection.execute("PRAGMA data_version").fetchone() == data_version
    reader.close()


def test_only_what_changed_is_read(own, base):
    mine, state = own
    assert sync(mine, state, base)[1] == []
    (mine / "poet-1" / "openlora.json").write_text("[]")
    shutil.rmtree(mine / "poet-2")
    (mine / "no name!").mkdir()
    (mine / "poet-3").rename(mine / "poet-9")
    results, worked_on = sync(mine, state, base)
    assert worked_on == ["poet-1", "poet-9"]
    assert {name: result.status for name, result in results.items()} == {
        "no name!": "failed",
        "poet-0": "ready",
        "poet-1": "quarantined",
        "poet-2": "removed",
        "poet-3": "removed",
        "poet-4": "ready",
        "poet-9": "ready",
    }


@pytest.mark.parametrize("loss", ["copy", "base", "rank limit", "quarantine"])
def test_what_can_not_be_served_as_it_is_is_read_again(adapters, state, base, tmp_path, loss):
    (lost, *_) = known_records(state)
    if loss == "copy":
        (state / "adapters" / lost.digest / WEIGHTS).unlink()
    elif loss == "base":
        path = make_model(tmp_path / "other", hidden_size=128)
        base = BaseFacts(path, model_manifest(Path(path)).digest, 16)
    elif loss == "rank limit":
        base = BaseFacts(base.path, base.digest, 1)
    else:
        with Catalog(state / "catalog.sqlite") as catalog:
            catalog.put(replace(lost, status="quarantined", reason="holds NaN"))
    results, worked_on = sync(adapters, state, base)
    if loss in ("copy", "quarantine"):
        assert worked_on == [lost.name]
        assert results[lost.name].status == "ready"
    else:
        assert worked_on == NAMES
        assert {result.status for result in results.values()} == {"quarantined"}


def test_a_start_does_not_move_a_name_back(adapters, state, base):
    """Moved by hand, to a version that was added by hand: what comes from the directory is as it was."""
    with Catalog(state / "catalog.sqlite") as catalog:
        mine = catalog.current("poet-0", "")
        other, _ = catalog.put(replace(catalog.current("poet-1", ""), name="poet-0", origin=""))
        assert (mine.version, other.version, other.current) == (1, 2, True)
        sync(adapters, state, base)
        assert catalog.current("poet-0", "").version == 2
        catalog.use("poet-0", 1)
        catalog.use("poet-0", 2)
        catalog.pin("poet-0")
        sync(adapters, state, base)
        assert (catalog.current("poet-0", "").version, catalog.current("poet-0", "").pinned) == (2, True)


def test_a_card_alone_is_a_change(own, base):
    mine, state = own
    card = {"schema": 1, "owner": "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed", "licence": "MIT"}
    card["prices"] = {"version": 1, "input": 1, "output": 2}
    (mine / "poet-4" / "openlora.json").write_text(json.dumps(card))
    results, worked_on = sync(mine, state, base)
    assert worked_on == ["poet-4"]
    assert (results["poet-4"].version, results["poet-4"].change) == (1, "updated")
    assert known_records(state)[-1].card == card
