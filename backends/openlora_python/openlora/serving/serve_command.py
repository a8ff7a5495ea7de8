"""`openlora serve` and `openlora stop`."""

from __future__ import annotations

import json
import os
import select
import signal
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..config import RunConfig, Settings, load_settings
from ..errors import Unavailable
from ..processes.detached import start_detached
from .state_dir import StateDir

START_SECONDS = 600
STOP_SECONDS = 60


def serve(
    model: Annotated[Path | None, typer.Option(help="Directory of a Hugging Face causal language model.")] = None,
    adapters: Annotated[Path | None, typer.Option(help="Directory of PEFT adapter directories; name = folder.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with any of the settings.")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="Keys, journal, receipt log, caches. Default ./var")] = None,
    host: Annotated[str | None, typer.Option(help="Address to serve on. Default 127.0.0.1")] = None,
    http_port: Annotated[int | None, typer.Option(help="Triton HTTP. Default 8000")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Triton gRPC. Default 8001")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Triton metrics. Default 8002")] = None,
    health_port: Annotated[int | None, typer.Option(help="/readyz and /livez. Default 8003")] = None,
    gateway_port: Annotated[int | None, typer.Option(help="OpenAI-compatible gateway. Default 9000")] = None,
    engine: Annotated[str | None, typer.Option(help="torch (embedded), vllm or tensorrt_llm")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16")] = None,
    quantization: Annotated[
        str | None, typer.Option(help="none, int8 (weights and activations) or int8-weight-only")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return when the server is ready; it goes on.")] = False,
) -> None:
    """Serve a base model and its adapters until stopped."""
    flags = {
        "model": model,
        "adapters": adapters,
        "state_dir": state_dir,
        "host": host,
        "http_port": http_port,
        "grpc_port": grpc_port,
        "metrics_port": metrics_port,
        "health_port": health_port,
        "gateway_port": gateway_port,
        "engine.kind": engine,
        "engine.dtype": dtype,
        "engine.quantization": quantization,
    }
    settings = load_settings(config, **flags)
    if detach:
        _serve_detached(settings)
        return
    from .launcher import Launcher

    Launcher(settings, _announce).run()


def stop(
    state_dir: Annotated[Path, typer.Option(help="The server's state directory.")] = Path("var"),
) -> None:
    """Stop the server of a state directory, and wait until it is gone."""
    pid = StateDir(state_dir.resolve()).running_pid()
    if pid is None:
        raise Unavailable(f"no server runs on {state_dir}")
    pidfd = os.pidfd_open(pid)
    signal.pidfd_send_signal(pidfd, signal.SIGTERM)
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    if not poller.poll(STOP_SECONDS * 1000):
        raise Unavailable(f"the server (pid {pid}) did not end in {STOP_SECONDS} s; its logs are in {state_dir}/logs")
    Console(stderr=True).print(f"stopped (pid {pid})")


def _serve_detached(settings: Settings) -> None:
    """Start the same server in a session of its own, and wait until it is ready or has ended."""
    state = StateDir(settings.state_dir.resolve())
    logs = state.root / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    resolved = logs / "settings.json"  # YAML is a superset of JSON
    resolved.write_text(settings.model_dump_json(exclude_none=True))

    def waits_for(pid: int) -> str:
        # Whoever answers on the port must be the one that was started here.
        return ", ".join(_faults(settings)) if state.running_pid() == pid else "launcher"

    pid = start_detached(["serve", "--config", str(resolved)], logs / "launcher.log", START_SECONDS, waits_for)
    Console(stderr=True).print(f"ready (pid {pid}, state in {state.root})")


def _faults(settings: Settings) -> dict[str, str]:
    try:
        with urllib.request.urlopen(f"http://{settings.host}:{settings.health_port}/readyz", timeout=5) as answer:
            return json.load(answer)["faults"]
    except urllib.error.HTTPError as error:
        return json.load(error)["faults"]
    except OSError:
        return {"launcher": "starting"}


def _announce(run: RunConfig) -> None:
    settings = run.settings
    table = Table(title=f"OpenLoRA is ready: {run.base.name} ({run.base.digest[:12]})", show_header=False)
    for name, port in (
        ("Triton HTTP", settings.http_port),
        ("Triton gRPC", settings.grpc_port),
        ("metrics", settings.metrics_port),
        ("health", settings.health_port),
        ("OpenAI gateway", settings.gateway_port),
    ):
        table.add_row(name, f"{settings.host}:{port}")
    table.add_row("receipt log key", str(run.state_dir / "log.pub"))
    Console(stderr=True).print(table)
