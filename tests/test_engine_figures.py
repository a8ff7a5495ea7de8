"""The engine's statistics on their way to the generation step, through a real engine process."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from engine_rig import TIMEOUT_SECONDS
from tiny_models import make_adapter, make_model, make_prompt, use

from openlora.engine.api import EngineOutput, EngineRequest, EngineStats, Sampling
from openlora.engine.client import EngineClient
from openlora.engine.wire import EngineConfig
from openlora.errors import OpenLoRAError


class Ended:
    """A receiver that waits for the end."""

    def __init__(self) -> None:
        self.outcome: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def take(self, output: EngineOutput) -> None:
        if output.finish_reason:
            self.outcome.set_result(output.finish_reason + output.error)

    def abort(self, error: OpenLoRAError) -> None:
        self.outcome.set_exception(error)


@pytest.fixture
def address(tmp_path: Path):
    """The socket of an engine process."""
    model = make_model(tmp_path / "model")
    config = EngineConfig(
        kind="torch",
        model_dir=model,
        base_digest="0" * 64,
        socket=f"ipc://{tmp_path / 'engine'}",
        status_socket=f"ipc://{tmp_path / 'status'}",
        launcher_pid=os.getpid(),
        threads=1,
        options={"dtype": "float32", "device": "cpu", "max_model_len": 96, "kv_cache_tokens": 1024, "max_adapters": 3},
    )
    (tmp_path / "engine.json").write_bytes(msgspec.json.encode(config))
    process = subprocess.Popen([sys.executable, "-m", "openlora.engine.host", str(tmp_path / "engine.json")])
    try:
        yield config.socket
    finally:
        process.kill()
        process.wait()


def test_figures_reach_the_client(address, tmp_path):
    adapter = make_adapter(str(tmp_path / "model"), tmp_path / "adapter", 1, r=4, target_modules=["q_proj"])

    async def ask() -> EngineStats:
        heard: asyncio.Queue[EngineStats] = asyncio.Queue()
        client = EngineClient(address, lambda: None, heard.put_nowait)
        running = asyncio.create_task(client.run())
        try:
            await heard.get()  # so it is connected
            for number in range(2):
                receiver = Ended()
                request = EngineRequest(f"{number}", make_prompt(1, 9), (use(adapter),), Sampling(max_tokens=3))
                await client.submit(request, receiver)
                assert await receiver.outcome == "length"
            while True:
                stats = await heard.get()
                if stats.adapters.hits_device:
                    return stats
        finally:
            running.cancel()

    stats = asyncio.run(asyncio.wait_for(ask(), 2 * TIMEOUT_SECONDS))
    adapters = stats.adapters
    assert (adapters.hits_disk, adapters.hits_host, adapters.hits_device, adapters.loads) == (1, 0, 1, 1)
    assert (adapters.slots, adapters.slots_filled, adapters.host_adapters, stats.adapters_loaded) == (3, 1, 1, 1)
    assert 0 < adapters.host_bytes <= adapters.host_limit_bytes
    assert adapters.read_seconds > 0
