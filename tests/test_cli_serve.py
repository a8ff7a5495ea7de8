"""`openlora serve`, `stop` and `generate` as a user types them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

from live_server import PORTS, free_ports

ENVIRONMENT = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}


def openlora(*arguments: object, seconds: float = 150) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "openlora.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=ENVIRONMENT)


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    """The error as one clear line, without a traceback."""
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    (line,) = result.stderr.strip().splitlines()
    return line


def test_detach_ask_and_stop(demo: Path, tmp_path: Path) -> None:
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    flags = [f"--{name.replace('_', '-')}={port}" for name, port in ports.items()]
    state = ["--state-dir", tmp_path / "state"]
    serve = ["serve", "--model", demo / "model", "--adapters", demo / "adapters", *state, *flags, "--detach"]
    started = openlora(*serve)
    try:
        assert started.returncode == 0, started.stderr
        assert "ready (pid " in started.stderr
        with urllib.request.urlopen(f"http://127.0.0.1:{ports['health_port']}/readyz") as answer:
            assert json.load(answer) == {"ready": True, "faults": {}}

        assert "runs on" in openlora(*serve).stderr  # a second one on the same directory

        receipt = tmp_path / "receipt.json"
        ask = ["generate", "-a", "pirate", "--url", f"127.0.0.1:{ports['grpc_port']}", "--temperature", "0"]
        asked = openlora(*ask, "--receipt", receipt, "Tell me about the cat.")
        assert asked.stdout.startswith(" Arr"), asked.stderr
        assert openlora("receipts", "verify", receipt, "--log", tmp_path / "state" / "log.pub").returncode == 0
        assert openlora("receipts", "verify", receipt).returncode == 3
        unknown = openlora("generate", "-a", "nobody", "--url", f"127.0.0.1:{ports['grpc_port']}", "Hello.")
        assert "[ADAPTER_NOT_FOUND] no adapter 'nobody'" in one_line(unknown)
        assert unknown.returncode == 4
    finally:
        stopped = openlora("stop", *state)
    assert stopped.returncode == 0, stopped.stderr
    assert "no server runs on" in one_line(openlora("stop", *state))
    assert not (tmp_path / "state" / "run").exists()


def test_what_cannot_be_served(demo: Path, tmp_path: Path) -> None:
    state = ["--state-dir", tmp_path / "state"]
    assert "model: Field required" in one_line(openlora("serve", *state))
    assert "is no model directory" in one_line(openlora("serve", "--model", tmp_path, *state))
    bad_port = openlora("serve", "--model", demo / "model", *state, "--http-port", "70000")
    assert "[INVALID_ARGUMENT] http_port" in one_line(bad_port)
    assert "no such file" in one_line(openlora("serve", "--config", tmp_path / "none.yaml"))
    assert "engine.dtype" in one_line(openlora("serve", "--model", demo / "model", *state, "--dtype", "int3"))


def test_a_taken_port_is_named(demo: Path, tmp_path: Path) -> None:
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    flags = [f"--{name.replace('_', '-')}={port}" for name, port in ports.items()]
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", ports["grpc_port"]))
        squatter.listen()
        refused = openlora("serve", "--model", demo / "model", "--state-dir", tmp_path / "state", *flags)
    assert f"port {ports['grpc_port']} on 127.0.0.1 is taken by another program" in one_line(refused)
