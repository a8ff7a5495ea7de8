"""A remote adapter under a running server: usable at once; evicted, it is fetched by hand or by the next request."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import LiveServer
from scripted_source import ScriptedSource
from typer.testing import CliRunner
from waiting import wait_for

from openlora.adapters.commands import adapters_app
from openlora.adapters.manifest import adapter_manifest
from openlora.adapters.store import AdapterStore
from openlora_client import OpenLoRAClient, Unavailable

PROMPT = "Tell me about the cat."


@pytest.fixture
def http(demo: Path, demo_adapters: list[str]) -> Iterator[ScriptedSource]:
    source = ScriptedSource()
    for file in (demo / "adapters" / demo_adapters[0]).glob("adapter_*"):
        source.files[f"/remote/{file.name}"] = file.read_bytes()
    config = source.files["/remote/adapter_config.json"]
    source.files["/remote/adapter_config.json"] = config + b"\n"  # a digest of its own
    try:
        yield source
    finally:
        source.close()


def run(server: LiveServer, *arguments: str) -> str:
    done = CliRunner().invoke(adapters_app, [*arguments, "--state-dir", str(server.state_dir)])
    assert done.exit_code == 0, done.stderr
    return done.stdout


def evict(store: AdapterStore, digest: str) -> None:
    """As soon as no request has a lease on it: the last one's ends a moment after its answer."""

    def gone() -> bool | None:
        with store.writing():
            return store.evict(digest) or None

    wait_for("the end of its lease", gone)


def test_a_local_adapter_that_was_lost_is_a_clear_error(
    server: LiveServer, demo: Path, demo_adapters: list[str], tmp_path: Path
) -> None:
    shutil.copytree(demo / "adapters" / demo_adapters[0], tmp_path / "lost")
    config = tmp_path / "lost" / "adapter_config.json"
    config.write_bytes(config.read_bytes() + b"\n\n")  # a digest of its own
    run(server, "add", str(tmp_path / "lost"))
    evict(AdapterStore(server.state_dir / "adapters"), adapter_manifest(tmp_path / "lost").digest)
    with OpenLoRAClient(server.grpc_url) as client:
        with pytest.raises(Unavailable, match="adapter lost: its files are not in the cache"):
            client.generate(PROMPT, "lost", max_tokens=8, temperature=0)
        run(server, "fetch", "lost")
        assert len(client.generate(PROMPT, "lost", max_tokens=8, ignore_eos=True).token_ids) == 8
    run(server, "remove", "lost")


def test_added_used_evicted_fetched_evicted_used(
    server: LiveServer, http: ScriptedSource, demo_adapters: list[str], tmp_path: Path
) -> None:
    run(server, "add", f"{http.url}/remote")
    with OpenLoRAClient(server.grpc_url) as client:
        wanted = client.generate(PROMPT, demo_adapters[0], max_tokens=8, temperature=0)
        assert client.generate(PROMPT, "remote", max_tokens=8, temperature=0).token_ids == wanted.token_ids
        store = AdapterStore(server.state_dir / "adapters")
        (tmp_path / "adapter_config.json").write_bytes(http.files["/remote/adapter_config.json"])
        (tmp_path / "adapter_model.safetensors").write_bytes(http.files["/remote/adapter_model.safetensors"])
        digest = adapter_manifest(tmp_path).digest
        evict(store, digest)
        run(server, "fetch", "remote")
        assert store.holds(digest)
        assert client.generate(PROMPT, "remote", max_tokens=8, temperature=0).token_ids == wanted.token_ids
        evict(store, digest)
        assert client.generate(PROMPT, "remote", max_tokens=8, temperature=0).token_ids == wanted.token_ids
        assert len(http.asked("GET", "adapter_model.safetensors")) == 3
    run(server, "remove", "remote")
