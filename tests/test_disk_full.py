"""A disk that takes no more: nothing is acknowledged, the node says so, and goes on when there is room again.

The kernel is made to refuse writes beyond a size (RLIMIT_FSIZE) to one process of a live server.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from live_server import LiveServer
from process_watch import server_processes
from waiting import wait_for

from openlora_client import OpenLoRAClient, OpenLoRAError, Unavailable

PROMPT = "Tell me about the cat."


@pytest.fixture(scope="module")
def own_server(demo: Path, demo_adapters: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    state = tmp_path_factory.mktemp("full") / "state"
    server = LiveServer(demo / "model", demo / "adapters", state, demo_adapters, {"engine": {"threads": 1}})
    try:
        yield server.start()
    finally:
        server.stop()


@contextmanager
def no_room(server: LiveServer, part: str) -> Iterator[None]:
    """No file of one process may grow past a few bytes."""
    pid = server_processes(server.launcher_pid)[part].pid
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (16, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))


def wait_for_fault(server: LiveServer, part: str, word: str) -> None:
    wait_for(
        f"fault of {part} with {word!r}",
        lambda: word in server.readiness()["faults"].get(part, ""),
        words=server.readiness,
    )


@pytest.mark.parametrize(("part", "word"), [("generation", "journal"), ("attribution", "Error")])
def test_no_room(own_server: LiveServer, part: str, word: str) -> None:
    with OpenLoRAClient(own_server.grpc_url) as client:
        before = client.generate(PROMPT, "pirate", max_tokens=40, temperature=0)
        with no_room(own_server, part):
            with pytest.raises(Unavailable):
                client.generate(PROMPT, "pirate", max_tokens=40, temperature=0, timeout=20)
            wait_for_fault(own_server, part, word)
            with pytest.raises(Unavailable, match="journal|receipt log") as refused:
                client.generate(PROMPT, max_tokens=4)
            assert refused.value.retry_after_ms
        own_server.wait_ready(60)
        after = client.generate(PROMPT, "pirate", max_tokens=40, temperature=0)
    assert after.token_ids == before.token_ids
    receipts = own_server.receipts()
    assert [receipt["seq"] for receipt in receipts] == list(range(len(receipts)))
    assert {before.receipt["seq"], after.receipt["seq"]} <= {receipt["seq"] for receipt in receipts}
    assert len({receipt["request_id"] for receipt in receipts}) == len(receipts)
    verify = [sys.executable, "-m", "openlora.cli", "receipts", "verify", "--all", "--log", own_server.log_key]
    subprocess.run([*verify, "--state-dir", str(own_server.state_dir)], check=True, capture_output=True)


def test_serves_on(own_server: LiveServer) -> None:
    with OpenLoRAClient(own_server.grpc_url) as client:
        try:
            answer = client.generate(PROMPT, max_tokens=8)
        except OpenLoRAError as error:
            pytest.fail(f"{error}\n{own_server.words()}")
    assert answer.receipt["status"] == 1
