"""What tests share: the demo model, made once, and one real server over it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from chain import Devnet
from hypothesis import HealthCheck, settings
from live_server import LiveServer, key_digest
from make_demo import ensure_demo

from openlora.adapters.base_modules import base_modules
from openlora.adapters.catalog_rows import BaseFacts
from openlora.adapters.ingest_worker import MODULES_DIRECTORY
from openlora.adapters.manifest import model_manifest

DEMO = Path(__file__).resolve().parents[1] / "var" / "demo"
ALICE_KEY = "alice-key-for-tests"

# How long a busy machine takes says nothing about what is tested.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def demo() -> Path:
    """`var/demo`: model, adapters, data sets, prompts."""
    return ensure_demo(DEMO)


@pytest.fixture(scope="session")
def demo_adapters(demo: Path) -> list[str]:
    return sorted(folder.name for folder in (demo / "adapters").iterdir())


@pytest.fixture(scope="session")
def prompts(demo: Path) -> list[str]:
    return json.loads((demo / "prompts.json").read_text())


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseFacts:
    """A tiny random model, as adapters are checked against it. Not to be changed."""
    from tiny_models import make_model  # torch, which few tests need

    path = make_model(tmp_path_factory.mktemp("base"))
    return BaseFacts(path, model_manifest(Path(path)).digest, 16)


@pytest.fixture(scope="session")
def known_modules(base: BaseFacts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ingest keeps of that model, so that no worker has to import torch."""
    directory = tmp_path_factory.mktemp("known") / MODULES_DIRECTORY
    base_modules(Path(base.path), base.digest, directory)
    return directory


@pytest.fixture
def state(known_modules: Path, tmp_path: Path) -> Path:
    """A state directory without adapters."""
    shutil.copytree(known_modules, tmp_path / "state" / MODULES_DIRECTORY)
    return tmp_path / "state"


@pytest.fixture(scope="session")
def server(demo: Path, demo_adapters: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server over the demo model in fp32. `secret` is an adapter that only the caller `alice` may use."""
    root = tmp_path_factory.mktemp("server")
    adapters = root / "adapters"
    shutil.copytree(demo / "adapters", adapters)
    shutil.copytree(demo / "adapters" / demo_adapters[0], adapters / "secret")
    live = LiveServer(
        demo / "model",
        adapters,
        root / "state",
        demo_adapters,
        {
            "engine": {"dtype": "float32"},
            "access": {"callers": {"alice": key_digest(ALICE_KEY)}, "private": {"secret": ["alice"]}},
        },
    )
    try:
        yield live.start()
    finally:
        live.stop()


@pytest.fixture(scope="session")
def devnet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Devnet]:
    """One chain for many tests: each registers models of its own."""
    with Devnet(tmp_path_factory.mktemp("devnet")) as chain:
        yield chain
