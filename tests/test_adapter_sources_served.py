"""A remote adapter under a running server: usable at once; evicted, it is a clear error until it is fetched again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import LiveServer
from scripted_source import ScriptedSource
from typer.testing import CliRunner

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


def test_added_used_evicted_refused_fetched_used(
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
        with store.writing():
            store.evict(digest)
        with pytest.raises(Unavailable, match="adapter remote: its files are not in the cache"):
            client.generate(PROMPT, "remote", max_tokens=8, temperature=0)
        assert client.generate(PROMPT, demo_adapters[0], max_tokens=8, temperature=0).token_ids == wanted.token_ids
        run(server, "fetch", "remote")
        assert client.generate(PROMPT, "remote", max_tokens=8, temperature=0).token_ids == wanted.token_ids
    run(server, "remove", "remote")
