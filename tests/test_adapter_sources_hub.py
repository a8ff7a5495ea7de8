"""Adapters from `hf://`: the real driver against a server on loopback that answers like a hub."""

import hashlib
import json
from dataclasses import replace

import pytest
from scripted_source import Fault, ScriptedSource
from tiny_models import make_adapter

from openlora.adapters.ingest import ingest
from openlora.adapters.ingest_jobs import job_of
from openlora.adapters.manifest import adapter_manifest
from openlora.adapters.sources import SourceLimits

QUICK = SourceLimits(attempts=3, first_wait_seconds=0.005, longest_wait_seconds=0.02)
FILES = ("adapter_config.json", "adapter_model.safetensors")
TREE = "/api/models/org/poet/tree/main"


@pytest.fixture(scope="module")
def poet(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "poet"
    make_adapter(base.path, folder, 1, r=4, target_modules=["q_proj", "v_proj"])
    return folder


@pytest.fixture
def hub(poet, monkeypatch):
    """`org/poet`, revision main."""
    source = ScriptedSource()
    tree = []
    for name in FILES:
        content = (poet / name).read_bytes()
        source.files[f"/org/poet/resolve/main/{name}"] = content
        tree.append({"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()})
    source.files[TREE] = json.dumps(tree).encode()
    facts = {"_id": "1", "id": "org/poet", "private": False, "sha": "a" * 40, "tags": [], "siblings": []}
    source.files["/api/models/org/poet/revision/main"] = json.dumps(facts).encode()
    source.files["/api/models/org/poet"] = json.dumps(facts).encode()
    monkeypatch.setenv("HF_ENDPOINT", source.url)
    monkeypatch.setenv("HF_TOKEN", "hf_s3cr3t")
    try:
        yield source
    finally:
        source.close()


def add(state, base, uri, limits=QUICK):
    (result,) = ingest(state, base, [job_of(uri, None)], limits=limits)
    return result


def test_an_adapter_arrives_from_a_repository(tmp_path, base, poet, hub):
    result = add(tmp_path, base, "hf://org/poet")
    assert (result.status, result.digest, result.reason) == ("ready", adapter_manifest(poet).digest, "")
    assert add(tmp_path, base, "hf://org/poet").change == "unchanged"
    assert len(hub.asked("GET", FILES[1])) == 1
    assert any(headers.get("authorization") == "Bearer hf_s3cr3t" for _, _, headers in hub.requests)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"hf://org/poet" in written
    assert b"hf_s3cr3t" not in written


@pytest.mark.parametrize("status", [401, 403])
def test_without_rights_there_is_no_retry_and_no_adapter(tmp_path, base, hub, status):
    hub.fail(TREE, Fault(status=status), for_ever=True)
    result = add(tmp_path, base, "hf://org/poet")
    assert result.status == "failed"
    assert "access denied" in result.reason
    assert list((tmp_path / "adapters" / ".fetching").iterdir()) == []


def test_what_is_not_there_is_missing(tmp_path, base, hub):
    result = add(tmp_path, base, "hf://org/nobody")
    assert (result.status, result.version) == ("quarantined", 0)
    assert result.reason == "adapter_config.json is missing at hf://org/nobody"


def test_a_hub_that_drips_is_given_up(tmp_path, base, poet, hub):
    size = len((poet / FILES[1]).read_bytes())
    dripping = f"HTTP/1.1 206 Partial Content\r\nContent-Length: {size}\r\n\r\n".encode()
    hub.fail(f"/org/poet/resolve/main/{FILES[1]}", Fault(drip=dripping), for_ever=True)
    result = add(tmp_path, base, "hf://org/poet", replace(QUICK, stall_seconds=1.0, connect_seconds=1.0))
    assert result.status == "failed"
    assert result.reason == f"hf://org/poet/{FILES[1]}: no answer for too long, 3 times"
    hub.faults.clear()
    assert add(tmp_path, base, "hf://org/poet").digest == adapter_manifest(poet).digest
