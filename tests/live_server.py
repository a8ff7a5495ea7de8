"""A real server for tests: `openlora serve` in a process of its own, on free ports, over its own state directory."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from waiting import wait_for

READY_SECONDS = 120
PORTS = ("http_port", "grpc_port", "metrics_port", "health_port", "gateway_port")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@dataclass
class LiveServer:
    """One server. `settings` are what its YAML file holds beside paths and ports."""

    model_dir: Path
    adapters_dir: Path | None
    state_dir: Path
    adapter_names: list[str]
    settings: dict[str, Any] = field(default_factory=dict)
    host: str = "127.0.0.1"
    ports: dict[str, int] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))

    http_port = property(lambda self: self.ports["http_port"])
    grpc_port = property(lambda self: self.ports["grpc_port"])
    metrics_port = property(lambda self: self.ports["metrics_port"])
    health_port = property(lambda self: self.ports["health_port"])
    gateway_port = property(lambda self: self.ports["gateway_port"])

    @property
    def grpc_url(self) -> str:
        return f"{self.host}:{self.grpc_port}"

    @property
    def http_url(self) -> str:
        return f"http://{self.host}:{self.http_port}"

    @property
    def gateway_url(self) -> str:
        return f"http://{self.host}:{self.gateway_port}"

    @property
    def log_key(self) -> str:
        return (self.state_dir / "log.pub").read_text().strip()

    @property
    def launcher_pid(self) -> int:
        return self.process.pid

    def start(self, ready_seconds: float = READY_SECONDS) -> LiveServer:
        """Start and wait until `/readyz` says yes."""
        self.state_dir.mkdir(parents=True, exist_ok=True)
        config = self.state_dir / "test.yaml"
        tree = {**self.settings, **self.ports, "model": str(self.model_dir), "state_dir": str(self.state_dir)}
        if self.adapters_dir is not None:
            tree["adapters"] = str(self.adapters_dir)
        config.write_text(yaml.safe_dump(tree))
        log = (self.state_dir / "launcher.log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "openlora.cli", "serve", "--config", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()
        self.wait_ready(ready_seconds)
        return self

    def readiness(self) -> dict[str, Any]:
        """The body of `/readyz`; not ready while the launcher does not answer."""
        try:
            with urllib.request.urlopen(f"http://{self.host}:{self.health_port}/readyz", timeout=5) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return json.load(error)
        except OSError as error:
            return {"ready": False, "faults": {"launcher": str(error)}}

    def wait_ready(self, seconds: float = READY_SECONDS) -> None:
        def is_ready() -> bool:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended:\n{self.words()}")
            return self.readiness()["ready"]

        wait_for("server that is ready", is_ready, seconds, lambda: f"{self.readiness()}\n{self.words()}")

    def words(self) -> str:
        """The ends of the logs, for a failing test to show."""
        files = [self.state_dir / "launcher.log", *sorted((self.state_dir / "logs").glob("*.log"))]
        return "\n".join(f"--- {file.name}\n{file.read_text()[-3000:]}" for file in files if file.is_file())

    def stop(self) -> None:
        """SIGTERM, as `openlora stop` does; raises when it does not end."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(60)

    def receipts(self) -> list[dict[str, Any]]:
        """All receipts in the log, by `openlora receipts list --json`."""
        output = subprocess.run(
            [sys.executable, "-m", "openlora.cli", "receipts", "list", "--state-dir", str(self.state_dir)]
            + ["--limit", "1000000", "--json"],
            check=True,
            capture_output=True,
            env={**os.environ, "COLUMNS": "200"},
        ).stdout
        return [json.loads(line) for line in output.splitlines()]


def key_digest(api_key: str) -> str:
    return hashlib.sha256(api_key.encode()).hexdigest()
