"""Serving and anchoring together: a chain that is gone stops no answer and no receipt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from anchor_cases import check_history, register_log
from anvil_chain import SUBMITTER, FaultyRpc, anvil, deploy_contracts
from live_server import LiveServer
from receipt_watch import log_size
from small_server import small_server
from test_anchor_process import Running
from waiting import wait_for

from openlora.network.signer import write_key
from openlora_client import OpenLoRAClient


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LiveServer]:
    live = small_server(tmp_path, {"cat": ()}, {})
    try:
        yield live.start()
    finally:
        live.stop()


def test_serving_never_waits_for_the_chain(server: LiveServer, tmp_path: Path) -> None:
    with anvil() as chain, OpenLoRAClient(server.grpc_url) as client:
        faulty = FaultyRpc(chain.url)
        deployment = deploy_contracts(chain, tmp_path / "direct.json")
        deployment.model_copy(update={"rpc_url": faulty.url}).save(tmp_path / "deployment.json")
        write_key(tmp_path / "keys" / "submitter.key", SUBMITTER)
        register_log(chain, deployment, server.state_dir)
        served = 0
        worker = Running(server.state_dir, "--every", "0")
        for mode in ("500", "garbage", "hang"):
            faulty.mode = mode
            for _ in range(3):
                client.generate("Tell me about the cat.", "cat", max_tokens=4)
            served += 3
            wait_for(f"{served} receipts", lambda wanted=served: log_size(server) >= wanted or None)
            worker.wait_for(lambda report: report["phase"] == "unreachable")  # each in other words
        faulty.mode = "pass"
        worker.wait_for(lambda report, all_of_them=served: report["final_size"] == all_of_them)
        assert worker.stop() == 0
        check_history(chain, deployment, server.state_dir, served)
        faulty.close()
