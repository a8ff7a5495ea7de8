"""Settings: what wins over what, what is refused in which words, and what a run's file holds."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from openlora.adapters.merge_plan import MergeLimits
from openlora.adapters.sources import SourceLimits
from openlora.cli import app
from openlora.config import RUN_DIR_VARIABLE, BaseModelFacts, RunConfig, load_section, load_settings
from openlora.errors import InvalidArgument


@pytest.fixture(autouse=True)
def _no_settings_around(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("OPENLORA_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def yaml_file(tmp_path: Path):
    def write(text: str | bytes) -> Path:
        file = tmp_path / "settings.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    return write


def refusal(file: Path | None = None, **flags: object) -> str:
    with pytest.raises(InvalidArgument) as caught:
        load_settings(file, **flags)
    return str(caught.value).removeprefix("[INVALID_ARGUMENT] ")


def test_flags_win_over_environment_over_file_over_defaults(yaml_file, monkeypatch: pytest.MonkeyPatch) -> None:
    file = yaml_file(
        "model: from-file\nhttp_port: 11\ngrpc_port: 12\nmetrics_port: 13\nengine: {dtype: bfloat16, threads: 3}\n"
    )
    monkeypatch.setenv("OPENLORA_GRPC_PORT", "22")
    monkeypatch.setenv("OPENLORA_METRICS_PORT", "23")
    monkeypatch.setenv("OPENLORA_ENGINE__THREADS", "4")
    flags = {"metrics_port": 33, "gateway_port": None, "engine.max_batch": 5}
    settings = load_settings(file, **flags)
    assert settings.model == Path("from-file")
    assert (settings.http_port, settings.grpc_port, settings.metrics_port) == (11, 22, 33)
    assert (settings.engine.dtype, settings.engine.threads, settings.engine.max_batch) == ("bfloat16", 4, 5)
    assert (settings.gateway_port, settings.host, settings.engine.max_waiting) == (9000, "127.0.0.1", 1024)


def test_defaults_are_the_documented_ones() -> None:
    settings = load_settings(model=Path("m"))
    assert (settings.http_port, settings.grpc_port, settings.metrics_port, settings.gateway_port) == (
        8000,
        8001,
        8002,
        9000,
    )
    assert (settings.host, settings.state_dir, settings.adapters) == ("127.0.0.1", Path("var"), None)
    assert (settings.engine.kind, settings.engine.dtype, settings.engine.quantization) == ("torch", "auto", "none")
    assert settings.limits.timeout_ms == 120_000
    assert (settings.restart.attempts, settings.restart.window_seconds) == (5, 300.0)
    assert not settings.access.require_key


REFUSED_FILES = {
    "": "model: Field required",
    "model: m\nhttp_prt: 1": "http_prt: Extra inputs are not permitted, got 1",
    "model: m\nengine: {dtyp: auto}": "engine.dtyp: Extra inputs are not permitted, got 'auto'",
    "model: m\nengine: {dtype: int4}": (
        "engine.dtype: Input should be 'auto', 'float32', 'bfloat16' or 'float16', got 'int4'"
    ),
    "model: m\nhttp_port: 0": "http_port: Input should be greater than or equal to 1, got 0",
    "model: m\nhttp_port: 65536": "http_port: Input should be less than or equal to 65535, got 65536",
    "model: m\nhttp_port: 8001": "settings: the five ports must differ, got [8001, 8001, 8002, 8003, 9000]",
    "model: m\nlimits: 5": "limits: Input should be a valid dictionary or instance of Limits, got 5",
    "model: m\naccess: {callers: {alice: my-plain-key}}": (
        "access.callers.alice: String should match pattern '^[0-9a-fA-F]{64}$'"
    ),
}


@pytest.mark.parametrize("text", REFUSED_FILES)
def test_refuses(yaml_file, text: str) -> None:
    assert refusal(yaml_file(text)) == REFUSED_FILES[text]


def test_a_file_that_is_none(yaml_file, tmp_path: Path) -> None:
    assert refusal(tmp_path / "missing.yaml") == f"config: no such file: {tmp_path / 'missing.yaml'}"
    assert refusal(tmp_path) == f"config: no such file: {tmp_path}"
    file = yaml_file("model: [")
    assert refusal(file).startswith(f"config: {file} is not YAML: while parsing a flow node")
    assert refusal(yaml_file(b"\xff")).startswith(f"config: {file} is not YAML: 'utf-8' codec can't decode byte 0xff")
    assert refusal(yaml_file("- model")) == f"config: {file} holds a list, names and values are wanted"


def test_bad_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENLORA_ACCESS", "{nope")
    assert refusal(model="m") == (
        'settings: error parsing value for field "access" from source "EnvSettingsSource": '
        "JSON is wanted in this variable"
    )
    monkeypatch.setenv("OPENLORA_ACCESS", "{}")
    monkeypatch.setenv("OPENLORA_HTTP_PORT", "many")
    assert refusal(model="m").startswith("http_port: Input should be a valid integer")


def test_limits_of_sources_and_merges_are_settings_like_others(yaml_file, monkeypatch: pytest.MonkeyPatch) -> None:
    file = yaml_file("model: m\nsources: {cache_bytes: 5, attempts: 2}\nmerge: {max_adapters: 3}\n")
    monkeypatch.setenv("OPENLORA_SOURCES__ATTEMPTS", "7")
    settings = load_settings(file)
    assert settings.sources == load_section(SourceLimits, file) == SourceLimits(cache_bytes=5, attempts=7)
    assert settings.merge == load_section(MergeLimits, file) == MergeLimits(max_adapters=3)
    assert load_section(SourceLimits) == SourceLimits(attempts=7)
    monkeypatch.setenv("OPENLORA_SOURCES__ATTEMPTS", "0")
    assert refusal(file) == "sources.attempts: Input should be greater than or equal to 1, got '0'"
    monkeypatch.delenv("OPENLORA_SOURCES__ATTEMPTS")
    misspelt = yaml_file("model: m\nmerge: {max_adaptors: 3}")
    assert refusal(misspelt) == "merge.max_adaptors: Unexpected keyword argument, got 3"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("network", "sync"), "can't read the deployment file /nowhere/d.json"),
        (("receipts", "cosign"), "'nobody' is not"),
    ],
)
def test_a_command_takes_its_section_of_the_servers_file(yaml_file, tmp_path: Path, command, message: str) -> None:
    """Whose model came by flag."""
    sections = "network: {deployment: /nowhere/d.json}\nattribution: {witnesses: [nobody]}\nhttp_port: 81\n"
    done = CliRunner().invoke(app, [*command, "--config", str(yaml_file(sections)), "--state-dir", str(tmp_path)])
    assert (done.exit_code, message in done.stderr) == (2, True), done.stderr
    misspelt = yaml_file("network: {deploiment: d}\nattribution: {witneses: []}")
    done = CliRunner().invoke(app, [*command, "--config", str(misspelt), "--state-dir", str(tmp_path)])
    assert (done.exit_code, "Extra inputs are not permitted" in done.stderr) == (2, True), done.stderr


def make_run(root: Path) -> RunConfig:
    facts = BaseModelFacts(
        name="m", path=root / "m", digest="ab" * 32, card={"price": 3}, eos_token_ids=(1, 2), max_model_len=64
    )
    return RunConfig(
        settings=load_settings(model=root / "m", **{"engine.dtype": "float16"}),
        base=facts,
        state_dir=root,
        socket_dir=root / "sockets",
        shm_prefix="openlora_x_",
        launcher_pid=7,
    )


def test_a_run_is_read_back_as_it_was_written_whatever_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    run.run_dir.mkdir()
    run.save()
    file = run.run_dir / "run.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    monkeypatch.setenv("OPENLORA_ENGINE__DTYPE", "float32")
    assert RunConfig.load(run.run_dir) == run
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(run.run_dir))
    assert RunConfig.load() == run
    run.run_key_path.write_bytes(b"the key")
    assert "key" not in {name for name in json.loads(file.read_text()) if name != "run_key_path"}
    assert b"the key" not in file.read_bytes()


def test_a_process_that_belongs_to_no_run_is_told_how_to_start_one() -> None:
    with pytest.raises(InvalidArgument, match="OPENLORA_RUN_DIR is not set: start the server with `openlora serve`"):
        RunConfig.load()


def test_paths_of_a_run_are_inside_its_state_directory(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for path in (run.catalog_path, run.adapter_cache, run.journal_dir, run.run_key_path, run.log_dir):
        assert path.is_relative_to(tmp_path)
    assert run.socket("engine") == f"ipc://{tmp_path}/sockets/engine"
