"""Receipts of a real server: proven against its checkpoint, and what a copy of its directory does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
from attribution_cases import python_environment
from live_server import LiveServer
from waiting import wait_for

from openlora.attribution.checkpoint import verify_checkpoint
from openlora.attribution.log import ReceiptLog
from openlora.attribution.log_key import LogKey
from openlora.attribution.prove import prove
from openlora.attribution.rotation import closed_directory
from openlora.errors import Unavailable

PROMPT = "Tell me about the cat."


def receipts(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "openlora.cli", "receipts", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=python_environment())


def ask(live: LiveServer) -> dict[str, Any]:
    """One answer's receipt."""
    body = {"text_input": PROMPT, "adapters": "pirate", "max_tokens": 4}
    answer = httpx.post(f"{live.http_url}/v2/models/openlora/generate", json=body, timeout=60)
    answer.raise_for_status()
    return json.loads(answer.json()["receipt"])


def wait_for_proof(state: Path, seq: int) -> str:
    """A proof as soon as the server's checkpoint covers the receipt."""

    def look() -> str | None:
        with closing(ReceiptLog.open(state, read_only=True)) as log:
            try:
                return str(prove(log, seq))
            except Unavailable:
                return None

    return wait_for(f"checkpoint over receipt {seq}", look)


def test_a_served_request_is_proven_and_a_copy_of_the_server_goes_on_in_another_log(
    demo: Path, demo_adapters: list[str], tmp_path: Path
) -> None:
    state = tmp_path / "state"
    live = LiveServer(demo / "model", demo / "adapters", state, demo_adapters).start()
    file, pin = tmp_path / "proof", ("--log", state / "log.pub")
    try:
        receipt = ask(live)
        file.write_text(wait_for_proof(state, receipt["seq"]))
        assert json.loads(receipts("verify", file, "--json", *pin).stdout)["result"] == "valid"
        assert receipts("verify", file).returncode == 3
        proven = receipts("prove", receipt["request_id"], "--salts", "--out", file, "--state-dir", state)
        assert proven.returncode == 0, proven.stderr
        prompt = tmp_path / "prompt"
        prompt.write_text(PROMPT)
        assert receipts("verify", file, *pin, "--prompt-file", prompt).returncode == 0
        last = [ask(live)["seq"] for _ in range(3)][-1]
        assert receipts("rotate", "--state-dir", state).returncode == 7  # the server has it
        assert receipts("fsck", "--state-dir", state).returncode == 0
    finally:
        live.stop()
    key = LogKey.parse((state / "log.pub").read_text().strip())
    assert verify_checkpoint((state / "log" / "checkpoint").read_bytes(), key).size == last + 1  # at the stop
    exported = receipts("export", tmp_path / "export", "--state-dir", state)
    assert exported.returncode == 0, exported.stderr
    assert receipts("fsck", "--export", tmp_path / "export").returncode == 0

    copy = LiveServer(
        demo / "model", demo / "adapters", shutil.copytree(state, tmp_path / "copy"), demo_adapters
    ).start()
    try:
        new = LogKey.parse(copy.log_key)
        assert new.predecessor == key.log_id
        receipt = ask(copy)
        assert receipt["log"] == new.line and receipt["seq"] == 0
        file.write_text(wait_for_proof(copy.state_dir, 0))
        assert receipts("verify", file, "--log", new.line).returncode == 0
    finally:
        copy.stop()
    assert receipts("verify", "--all", *pin, "--state-dir", closed_directory(copy.state_dir, key)).returncode == 0
    assert "was copied or restored" in (copy.state_dir / "launcher.log").read_text()
