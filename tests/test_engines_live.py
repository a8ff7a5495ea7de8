"""Other engines behind a real Triton server: the same client, receipts and errors as with the embedded one.

vLLM computes for real, on the CPU. The stand-in for TensorRT-LLM shows how an engine that is spent, or whose executor
has died, is replaced, and that an idle one is not.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from fake_tensorrt_llm import DEATH, FAKES
from live_server import LiveServer
from process_watch import server_processes
from raw_calls import Stream
from small_server import small_server
from usage_watch import verify_all
from vllm_environment import SKIP, vllm_python
from waiting import wait_for

from openlora.errors import (
    AdapterNotFound,
    DeadlineExceeded,
    EngineRestarted,
    InvalidArgument,
    OpenLoRAError,
    Overloaded,
)
from openlora_client import OpenLoRAClient

START_SECONDS = 500
ENSEMBLE = [("pirate", 0.7), ("emoji", -0.4)]


def vllm_settings(**engine: Any) -> dict[str, Any]:
    python = vllm_python()
    if python is None:
        pytest.skip(SKIP)
    return {
        "engine": {
            "kind": "vllm",
            "python": str(python),
            "dtype": "float32",
            "threads": 1,
            "max_batch": 16,
            "max_adapters": 4,
            "max_rank": 64,
            "vllm": {"enforce_eager": True, "kv_cache_bytes": 256 << 20, "block_size": 32},
            **engine,
        }
    }


@pytest.fixture(scope="module")
def vllm_server(demo: Path, demo_adapters: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    state = tmp_path_factory.mktemp("vllm") / "state"
    live = LiveServer(demo / "model", demo / "adapters", state, demo_adapters, vllm_settings())
    try:
        yield live.start(START_SECONDS)
    finally:
        live.stop()


def document(live: LiveServer, request_id: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "openlora.cli", "receipts", "show", request_id, "--json"]
    return json.loads(
        subprocess.run([*command, "--state-dir", str(live.state_dir)], check=True, capture_output=True).stdout
    )


@pytest.mark.timeout(900)
def test_vllm_answers_as_the_embedded_engine_does(
    server: LiveServer, vllm_server: LiveServer, prompts: list[str], demo_adapters: list[str]
) -> None:
    choices = [None, *([(name, 1.0)] for name in demo_adapters), ENSEMBLE]
    with OpenLoRAClient(server.grpc_url) as embedded, OpenLoRAClient(vllm_server.grpc_url) as other:
        for adapters, prompt in itertools.product(choices, prompts[:3]):
            call = {"adapters": adapters, "max_tokens": 24, "temperature": 0}
            expected, found = embedded.generate(prompt, **call), other.generate(prompt, **call)
            assert found.token_ids == expected.token_ids, (adapters, prompt)
            assert (found.text, found.finish_reason, found.usage) == (
                expected.text, expected.finish_reason, expected.usage,
            )  # fmt: skip


def test_vllm_streams_and_stops_at_words(vllm_server: LiveServer, prompts: list[str]) -> None:
    with OpenLoRAClient(vllm_server.grpc_url) as client:
        whole = client.generate(prompts[0], [("pirate", 1.0)], max_tokens=24, temperature=0)
        chunks = list(client.stream(prompts[0], [("pirate", 1.0)], max_tokens=24, temperature=0))
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert len(chunks) > 2
        word = whole.text.split()[2]
        cut = client.generate(prompts[0], [("pirate", 1.0)], max_tokens=24, temperature=0, stop=[word])
        assert (cut.finish_reason, cut.text) == ("stop", whole.text[: whole.text.index(word)])
        logged = client.generate(prompts[0], max_tokens=3, temperature=0, logprobs=2)
        assert [len(one["top"]) for one in logged.logprobs] == [2, 2, 2]


def test_vllm_follows_guides(vllm_server: LiveServer) -> None:
    with OpenLoRAClient(vllm_server.grpc_url) as client:
        choice = client.generate(
            "The cat",
            structured_outputs={"choice": ["red apple", "green pear"]},
            temperature=2.0,
            max_tokens=30,
            seed=1,
        )
        assert choice.text in ("red apple", "green pear")
        digits = client.generate(
            "The cat", [("json", 1.0)], structured_outputs={"regex": "[0-9]{4}"}, max_tokens=20, ignore_eos=True
        )
        assert digits.text.isdigit() and len(digits.text) == 4
        with pytest.raises(InvalidArgument, match="structured_outputs: "):
            client.generate("The cat", structured_outputs={"regex": "a("}, max_tokens=5)
        assert client.generate("The cat", max_tokens=2).usage.output_tokens == 2


def test_vllm_errors_are_the_same(vllm_server: LiveServer, demo_adapters: list[str]) -> None:
    with OpenLoRAClient(vllm_server.grpc_url) as client:
        with pytest.raises(AdapterNotFound, match="no adapter 'nobody'"):
            client.generate("The cat", [("nobody", 1.0)])
        with pytest.raises(InvalidArgument, match=r"adapters: ranks .* at most 64 fit into one adapter of this engine"):
            client.generate("The cat", [(name, 0.2) for name in demo_adapters])
        with pytest.raises(InvalidArgument, match="temperature: 3 is too high, vLLM goes up to 2"):
            client.generate("The cat", temperature=3.0)
        with pytest.raises(DeadlineExceeded, match="not finished in 1 ms"):
            client.generate("The cat", max_tokens=2000, timeout_ms=1, ignore_eos=True)
    with openai.OpenAI(base_url=f"{vllm_server.gateway_url}/v1", api_key="none", max_retries=0) as gateway:
        completion = gateway.completions.create(model="pirate", prompt="The cat", max_tokens=4)
        assert completion.usage.completion_tokens <= 4
        with pytest.raises(openai.NotFoundError):
            gateway.completions.create(model="nobody", prompt="The cat", max_tokens=4)


def test_vllm_is_cancelled_by_a_stop_request(vllm_server: LiveServer) -> None:
    call = Stream(vllm_server).start(
        {"text_input": "The cat", "max_tokens": 1500, "stream": True, "sampling_parameters": '{"ignore_eos": true}'},
        label="to stop",
    )
    call.arrived()
    stop = Stream(vllm_server).start({"text_input": "", "stop": True}, label="to stop").wait()
    assert not stop.error
    reply = call.wait()
    assert reply.finish_reason == "cancelled"
    assert 0 < len(reply.token_ids) < 1500
    assert reply.receipt["out_tokens"] == len(reply.token_ids)


def test_receipts_name_vllm(vllm_server: LiveServer) -> None:
    with OpenLoRAClient(vllm_server.grpc_url) as client:
        answer = client.generate("The cat", ENSEMBLE, max_tokens=4, temperature=0)
    runtime = document(vllm_server, answer.request_id)["blobs"]["runtime"]
    assert (runtime["engine"], runtime["dtype"], runtime["quantization"]) == ("vllm", "float32", "none")
    assert "vllm 0.32.0" in runtime["version"]
    verify_all(vllm_server.state_dir)


@pytest.mark.timeout(900)
def test_when_vllm_dies_its_requests_are_told_and_a_new_one_starts(vllm_server: LiveServer) -> None:
    engine = server_processes(vllm_server.launcher_pid)["engine"]
    call = Stream(vllm_server).start(
        {"text_input": "The cat", "max_tokens": 1500, "stream": True, "sampling_parameters": '{"ignore_eos": true}'}
    )
    call.arrived()
    for process in engine.children(recursive=True):
        process.kill()
    assert call.wait().error.startswith("[ENGINE_RESTARTED] ")
    _next_engine(vllm_server, engine)
    with OpenLoRAClient(vllm_server.grpc_url) as client:
        assert _ask_until_served(client, "pirate").usage.output_tokens == 6


@pytest.mark.timeout(900)
def test_nothing_of_vllm_outlives_its_launcher(vllm_server: LiveServer) -> None:
    """Its own processes, two below the engine's, go with a launcher that is killed. Last: it ends the server."""
    engine = server_processes(vllm_server.launcher_pid)["engine"]
    below = [engine, *engine.children(recursive=True)]
    assert len(below) >= 3
    os.kill(vllm_server.launcher_pid, signal.SIGKILL)
    vllm_server.process.wait(60)
    _, alive = psutil.wait_procs(below, timeout=60)
    assert alive == []


def test_a_spent_engine_is_replaced_and_nobody_notices_but_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through Triton: refused as overloaded, then served by a new engine; what ran meanwhile ended as it should."""
    monkeypatch.setenv("PYTHONPATH", str(FAKES))
    monkeypatch.setenv("FAKE_TENSORRT_LLM", "1.2")
    engine = {"kind": "tensorrt_llm", "max_rank": 12, "tensorrt_llm": {"max_ensembles": 1}}
    live = small_server(tmp_path, {"a": ["chat"], "b": ["code"]}, {"engine": engine, "restart": {"attempts": 1}})
    del live.settings["engine"]["kv_cache_tokens"]
    try:
        live.start()
        before = server_processes(live.launcher_pid)["engine"]
        with OpenLoRAClient(live.grpc_url) as client:
            with pytest.raises(InvalidArgument, match=r"adapters: ranks 8 \+ 8 make 16, at most 12 fit"):
                client.generate("hello", [("a", 0.5), ("b", 0.5)])
            first = client.generate("hello", [("a", 0.5)], max_tokens=6, temperature=0, ignore_eos=True)
            for number in range(3):  # three lives, though the launcher gives up a part that dies twice
                with pytest.raises(Overloaded, match="is being replaced") as caught:
                    client.generate("hello", [("a", 0.25 - number / 100)], max_tokens=6, temperature=0)
                assert caught.value.retry_after_ms == 5000
                before = _next_engine(live, before)
                again = _ask_until_served(client, "a")
                assert again.token_ids == first.token_ids
        runtime = document(live, again.request_id)["blobs"]["runtime"]
        assert (runtime["engine"], "tensorrt_llm 1.2.1" in runtime["version"]) == ("tensorrt_llm", True)
        verify_all(live.state_dir)
    finally:
        live.stop()
    assert list((live.state_dir / "staging").glob("*")) == []


def test_an_idle_engine_is_left_alone_and_a_dead_executor_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-LLM tells nothing while it is idle: what it told last must not look like work without a step. What its
    version ignores is refused, a seed only where the client gave it."""
    death, hang_seconds = tmp_path / "death", 4
    for name, value in {"PYTHONPATH": FAKES, "FAKE_TENSORRT_LLM": "1.2", DEATH: death}.items():
        monkeypatch.setenv(name, str(value))
    engine = {"kind": "tensorrt_llm", "hang_seconds": hang_seconds, "tensorrt_llm": {"stats_seconds": 0.1}}
    live = small_server(tmp_path, {"a": ["chat"]}, {"engine": engine})
    del live.settings["engine"]["kv_cache_tokens"]
    try:
        live.start()
        before = server_processes(live.launcher_pid)["engine"]
        with OpenLoRAClient(live.grpc_url) as client:
            call = {"adapters": [("a", 0.5)], "max_tokens": 6, "temperature": 0, "ignore_eos": True}
            first = client.generate("hello", **call)
            for refused in ({"seed": 5}, {"frequency_penalty": 0.5}, {"min_tokens": 2}):
                with pytest.raises(InvalidArgument, match=rf"{next(iter(refused))}: TensorRT-LLM 1\.2\.1 .* got"):
                    client.generate("hello", **{**call, "temperature": 0.9, **refused})
            assert client.generate("hello", **{**call, "temperature": 0.9}).usage.output_tokens == 6
            ended, _ = psutil.wait_procs([before], timeout=2 * hang_seconds)
            assert not ended, live.words()
            assert client.generate("hello", **call).token_ids == first.token_ids
            death.write_text("CUDA error: an illegal memory access was encountered")
            with pytest.raises(EngineRestarted, match="TensorRT-LLM died while this request ran"):
                client.generate("hello", **call)
            death.unlink()
            _next_engine(live, before)
            assert _ask_until_served(client, "a").token_ids == first.token_ids
        verify_all(live.state_dir)
    finally:
        live.stop()


def _next_engine(live: LiveServer, before: psutil.Process) -> psutil.Process:

    def another() -> psutil.Process | None:
        found = server_processes(live.launcher_pid).get("engine", before)
        return None if found == before else found

    found = wait_for("new engine", another)
    live.wait_ready(START_SECONDS)
    return found


def _ask_until_served(client: OpenLoRAClient, adapter: str) -> Any:
    """The stub hears of the new engine a moment after the launcher does."""
    for _ in range(200):
        try:
            return client.generate("hello", [(adapter, 0.5)], max_tokens=6, temperature=0, ignore_eos=True)
        except OpenLoRAError as error:
            assert error.code == "UNAVAILABLE", error
    raise AssertionError("the new engine is not heard of")
