"""What tests share: the demo model, made once, and one real server over it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from chain import Devnet
from live_server import LiveServer, key_digest
from make_demo import ensure_demo

DEMO = Path(__file__).resolve().parents[1] / "var" / "demo"
ALICE_KEY = "alice-key-for-tests"


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
    chain = Devnet(tmp_path_factory.mktemp("devnet"))
    try:
        yield chain.start()
    finally:
        chain.stop()
