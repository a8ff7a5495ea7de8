"""The protocol of engines, by the same checks for each of them: torch, vLLM, TensorRT-LLM in three versions.

vLLM computes for real, on the CPU, in a process of its own; TensorRT-LLM is a strict stand-in (`fakes/`), because it
needs NVIDIA's GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_rig import HostedRig, InProcessRig, Rig
from fake_tensorrt_llm import VERSIONS, fake_tensorrt_llm, make_built_engine
from protocol_checks import CHECKS
from protocol_world import OPTIONS, REFUSES, Store, World
from vllm_environment import SKIP, vllm_python

from openlora.engine.tensorrt_llm_engine import TensorrtLlmEngine
from openlora.engine.torch_engine import TorchEngine

ENGINES = ["torch", *(f"tensorrt_llm-{version}" for version in VERSIONS), "tensorrt_llm-1.2-built", "vllm"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module", params=ENGINES)
def rig(request: pytest.FixtureRequest, store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """One engine for all checks."""
    name, _, version = request.param.partition("-")
    if name == "torch":
        with InProcessRig(
            TorchEngine(store.model_dir, "0" * 64, device="cpu", kv_cache_tokens=4096, **OPTIONS)
        ) as running:
            yield running
    elif name == "tensorrt_llm":
        version, _, built = version.partition("-")
        more = {}
        if built:
            engine_dir = make_built_engine(store.model_dir, tmp_path_factory.mktemp("built") / "engine")
            more = {"backend": "tensorrt", "engine_dir": engine_dir}
        with (
            fake_tensorrt_llm(version),
            InProcessRig(
                TensorrtLlmEngine(store.model_dir, "0" * 64, stats_seconds=0.01, **OPTIONS, **more)
            ) as running,
        ):
            yield running
            assert not running.engine._backend._llm.active, "it still works on what was answered"
    else:
        python = vllm_python()
        if python is None:
            pytest.skip(SKIP)
        options = {**OPTIONS, "enforce_eager": True, "threads": 1, "kv_cache_bytes": 64 << 20, "block_size": 32}
        with HostedRig(python, "vllm", store.model_dir, options) as running:
            yield running


@pytest.mark.timeout(600)
@pytest.mark.parametrize("check", CHECKS)
def test_protocol(check: str, rig: Rig, store: Store, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    refuses = REFUSES.get(request.node.callspec.params["rig"], frozenset())
    CHECKS[check](World(rig, store, tmp_path, refuses))
