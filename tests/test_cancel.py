"""A client that leaves stops its request, in every phase and over every transport, and what was made has a receipt.

The engine runs one row at a time, so that what waits behind a request shows when it is gone. Facts come from the
server's own journal and log, and the time from the client's leaving to the journal's completion is printed.
"""

from __future__ import annotations

import asyncio
import json
import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tritonclient.grpc
from live_server import LiveServer
from load import Outcome, Question, Stream, ask, connect, infer_inputs
from process_watch import server_processes
from usage_watch import UsageWatch, check_outcomes, settled_receipts, verify_all

from openlora.attribution.journal import STATUS_CANCELLED, CompletionFrame
from openlora.serving.text import TextCodec

PHASES = ("waiting", "prefill", "streaming", "coalescing", "not streamed")
LONG = 1900
COALESCE_SECONDS = 0.5  # two such deltas are read before the client leaves, and 1,900 tokens last 2 s here


class Bench:
    """One server, its journal, and what was measured."""

    def __init__(self, live: LiveServer, model_dir: Path) -> None:
        self.live = live
        self.watch = UsageWatch(live.state_dir)
        self.measured: list[tuple[str, str, float, int]] = []
        self.outcomes: list[Outcome] = []
        self._names = iter(range(1_000_000))
        self._engine = server_processes(live.launcher_pid)["engine"]
        codec = TextCodec(model_dir)
        sentence = "Tell me about the cat. "
        self.short, self.long = sentence, sentence * (1000 // len(codec.encode(sentence)))

    def question(self, phase: str) -> Question:
        """A request that is still in its phase when its client leaves. No prefix of a long prompt is in the cache."""
        name = next(self._names)
        prompt, tokens = (f"{name}. {self.long}", 1000) if phase == "prefill" else (self.short, LONG)
        sampling = {"ignore_eos": True, "temperature": 0, "max_tokens": tokens}
        return Question(prompt, None, phase != "not streamed", sampling, f"victim-{name}")

    def other(self, *, stream: bool, tokens: int = 2) -> Question:
        sampling = {"ignore_eos": True, "temperature": 0, "max_tokens": tokens}
        return Question(self.short, None, stream, sampling, f"other-{next(self._names)}")

    async def engine_at_work(self, phase: str) -> None:
        """Wait until the engine has computed for a while: a part of a long prompt, or some tokens."""
        cpu_seconds = {"prefill": 0.05, "not streamed": 0.3}.get(phase, 0.0)
        before = sum(self._engine.cpu_times()[:2])
        await self.watch.until(
            lambda: sum(self._engine.cpu_times()[:2]) >= before + cpu_seconds, 20, f"work of the engine on {phase}"
        )

    def note(self, transport: str, phase: str, left_at: float, completion: CompletionFrame) -> None:
        self.measured.append((transport, phase, time.monotonic() - left_at, completion.out_tokens))

    def print_measured(self) -> None:
        print("\ncancel: from the client's leaving to the journal's completion")
        for transport, phase, seconds, tokens in self.measured:
            print(f"  {transport:32} {phase:14} {seconds:6.3f} s   {tokens:5} tokens made")


@pytest.fixture(scope="module")
def bench(demo: Path, demo_adapters: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    live = LiveServer(
        demo / "model",
        demo / "adapters",
        tmp_path_factory.mktemp("cancel") / "state",
        demo_adapters,
        {
            "engine": {"dtype": "float32", "max_batch": 1, "max_step_tokens": 16},
            "limits": {"coalesce_above": 1, "coalesce_ms": int(COALESCE_SECONDS * 1000)},
        },
    )
    try:
        bench = Bench(live.start(), demo / "model")
        yield bench
        bench.print_measured()
    finally:
        live.stop()


class Neighbours:
    """The requests around a victim: one that holds the only row while it waits, and one that waits behind it."""

    def __init__(self, bench: Bench, client: Any, phase: str) -> None:
        self._bench = bench
        self._client = client
        self._occupant: asyncio.Task[Outcome] | None = None
        self._occupying: Stream | None = None
        self._next: asyncio.Task[Outcome] | None = None
        self._phase = phase

    async def occupy(self) -> None:
        """Before the victim comes."""
        if self._phase == "waiting":
            question = self._bench.other(stream=False, tokens=LONG)
            self._occupying = Stream(self._client, question)
            self._occupant = asyncio.create_task(self._occupying.drain())
            await self._bench.watch.begun(question.label)

    async def queue_up(self) -> None:
        """Behind the victim. Two live streams make the tokens of both travel together."""
        question = self._bench.other(stream=self._phase == "coalescing")
        self._next = asyncio.create_task(ask(self._client, question))
        await self._bench.watch.begun(question.label)

    async def go_on(self) -> None:
        """The row is free again: what waited behind the victim is answered."""
        if self._occupying is not None:
            assert not self._occupant.done(), "the victim was not waiting"
            self._occupying.cancel()
            self._bench.outcomes.append(await self._occupant)
        outcome = await asyncio.wait_for(self._next, 20)
        assert (outcome.error, outcome.finish_reason, outcome.tokens) == ("", "length", 2)
        self._bench.outcomes.append(outcome)


def check_completion(phase: str, completion: CompletionFrame, question: Question, seen: int) -> None:
    """It was stopped: what is made after the client has left is not the whole answer, however slow this machine is."""
    assert completion.status == STATUS_CANCELLED
    assert seen <= completion.out_tokens < question.sampling["max_tokens"]
    if phase == "waiting":
        assert completion.out_tokens == 0
    elif phase != "prefill":  # whose end may come before the client's leaving is noticed: either is right
        assert completion.out_tokens > 0


@pytest.mark.parametrize("phase", PHASES)
async def test_grpc_aio_cancel(bench: Bench, phase: str) -> None:
    client = connect(bench.live.grpc_url)
    question, neighbours = bench.question(phase), Neighbours(bench, client, phase)
    await neighbours.occupy()
    victim = Stream(client, question)
    reading = asyncio.create_task(victim.drain())
    request_id = await bench.watch.begun(question.label)
    await bench.engine_at_work(phase)
    if phase in ("streaming", "coalescing"):
        await bench.watch.until(lambda: victim.outcome.tokens >= 3, 20, "the first tokens")
    await neighbours.queue_up()
    if phase == "coalescing":
        seen = victim.outcome.chunks
        await bench.watch.until(lambda: victim.outcome.chunks > seen + 1, 20, "a delta of many tokens")

    victim.cancel()
    left_at = time.monotonic()
    completion = await bench.watch.ended(request_id, 20)

    bench.note("gRPC aio cancel", phase, left_at, completion)
    outcome = await reading
    check_completion(phase, completion, question, outcome.tokens)
    await neighbours.go_on()
    bench.outcomes.append(outcome)
    await client.close()


@pytest.mark.parametrize("phase", PHASES)
async def test_grpc_sync_stop_stream(bench: Bench, phase: str) -> None:
    aio_client = connect(bench.live.grpc_url)
    question, neighbours = bench.question(phase), Neighbours(bench, aio_client, phase)
    await neighbours.occupy()
    answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    outcome = Outcome(question)

    def take_new() -> Outcome:
        while not answers.empty():
            result, error = answers.get()
            if error is None:
                outcome.read(result)
        return outcome

    with tritonclient.grpc.InferenceServerClient(bench.live.grpc_url) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer("openlora", infer_inputs(question), request_id=question.label)
        request_id = await bench.watch.begun(question.label)
        await bench.engine_at_work(phase)
        if phase in ("streaming", "coalescing"):
            await bench.watch.until(lambda: take_new().tokens >= 3, 20, "the first tokens")
        await neighbours.queue_up()
        if phase == "coalescing":
            seen = take_new().chunks
            await bench.watch.until(lambda: take_new().chunks > seen + 1, 20, "a delta of many tokens")

        left_at = time.monotonic()
        client.stop_stream(cancel_requests=True)
        completion = await bench.watch.ended(request_id, 20)

    bench.note("gRPC sync stop_stream", phase, left_at, completion)
    check_completion(phase, completion, question, take_new().tokens)
    await neighbours.go_on()
    bench.outcomes.append(outcome)
    await aio_client.close()


@pytest.mark.parametrize("phase", ["waiting", "prefill", "streaming", "coalescing"])
async def test_http_generate_stream_disconnect(bench: Bench, phase: str) -> None:
    """Over HTTP a disconnect shows when bytes are written: within two responses, and one flows each second."""
    client = connect(bench.live.grpc_url)
    question, neighbours = bench.question(phase), Neighbours(bench, client, phase)
    await neighbours.occupy()
    seen = 0
    async with httpx.AsyncClient(base_url=bench.live.http_url, timeout=60) as http:
        async with http.stream("POST", "/v2/models/openlora/generate_stream", json=http_body(question)) as answer:
            lines = answer.aiter_lines()
            request_id = await bench.watch.begun(question.label)
            await bench.engine_at_work(phase)
            if phase in ("streaming", "coalescing"):
                while seen < 3:
                    seen += tokens_in(await anext(lines))
            await neighbours.queue_up()
            while phase == "coalescing" and not (new := tokens_in(await anext(lines))) > 3:
                seen += new
        left_at = time.monotonic()
        completion = await bench.watch.ended(request_id, 20)

    bench.note("HTTP generate_stream disconnect", phase, left_at, completion)
    assert completion.status == STATUS_CANCELLED
    assert seen <= completion.out_tokens < question.sampling["max_tokens"]
    if phase == "waiting":
        assert completion.out_tokens == 0
    await neighbours.go_on()
    await client.close()


@pytest.mark.parametrize("phase", ["waiting", "prefill", "not streamed"])
async def test_http_generate_is_ended_by_stop(bench: Bench, phase: str) -> None:
    client = connect(bench.live.grpc_url)
    question, neighbours = bench.question(phase), Neighbours(bench, client, phase)
    await neighbours.occupy()
    async with httpx.AsyncClient(base_url=bench.live.http_url, timeout=60) as http:
        body = {**http_body(question), "stream": False}
        asking = asyncio.create_task(http.post("/v2/models/openlora/generate", json=body))
        request_id = await bench.watch.begun(question.label)
        await bench.engine_at_work(phase)
        await neighbours.queue_up()

        left_at = time.monotonic()
        stopped = await http.post(
            "/v2/models/openlora/generate", json={"text_input": "", "stop": True, "id": question.label}
        )
        completion = await bench.watch.ended(request_id, 20)

        bench.note("HTTP generate, stop", phase, left_at, completion)
        answer = await asking
    assert stopped.status_code == 200, stopped.text
    assert (stopped.json()["text_output"], stopped.json().get("receipt", "")) == ("", "")
    assert answer.status_code == 200, answer.text
    assert answer.json()["finish_reason"] == "cancelled"
    receipt = json.loads(answer.json()["receipt"])
    assert (receipt["request_id"], receipt["status"]) == (f"0x{request_id}", STATUS_CANCELLED)
    assert receipt["out_tokens"] == completion.out_tokens == answer.json()["num_output_tokens"]
    check_completion(phase, completion, question, 0)
    await neighbours.go_on()
    await client.close()


async def test_grpc_stream_is_ended_by_stop(bench: Bench) -> None:
    client = connect(bench.live.grpc_url)
    question = bench.question("streaming")
    victim = Stream(client, question)
    reading = asyncio.create_task(victim.drain())
    request_id = await bench.watch.begun(question.label)
    await bench.watch.until(lambda: victim.outcome.tokens >= 3, 20, "the first tokens")

    left_at = time.monotonic()
    async with httpx.AsyncClient(base_url=bench.live.http_url, timeout=60) as http:
        stopped = await http.post(
            "/v2/models/openlora/generate", json={"text_input": "", "stop": True, "id": question.label}
        )
    completion = await bench.watch.ended(request_id, 20)

    bench.note("gRPC stream, stop", "streaming", left_at, completion)
    outcome = await reading
    assert stopped.status_code == 200, stopped.text
    assert (outcome.error, outcome.finish_reason) == ("", "cancelled")
    assert outcome.tokens == completion.out_tokens == outcome.receipt["out_tokens"]
    check_completion("streaming", completion, question, outcome.tokens)
    bench.outcomes.append(outcome)
    await client.close()


@pytest.mark.parametrize("leaves", [False, True], ids=["stays", "disconnects"])
async def test_http_generate_ends_at_its_deadline(bench: Bench, leaves: bool) -> None:
    """Nothing is written before the one response, so a client that left shows nowhere else."""
    question, deadline = bench.question("not streamed"), 1.0
    body = http_body(question) | {"timeout_ms": int(deadline * 1000)}
    async with httpx.AsyncClient(base_url=bench.live.http_url, timeout=60) as http:
        asking = asyncio.create_task(http.post("/v2/models/openlora/generate", json=body))
        request_id = await bench.watch.begun(question.label)
        begun_at = time.monotonic()
        if leaves:
            asking.cancel()
        completion = await bench.watch.ended(request_id, 20)
        bench.note("HTTP generate, deadline 1 s", "disconnects" if leaves else "stays", begun_at, completion)
        if not leaves:
            answer = await asking
            assert answer.status_code == 400
            assert "[DEADLINE_EXCEEDED]" in answer.json()["error"]
    check_completion("not streamed", completion, question, 0)


async def test_every_request_has_one_receipt(bench: Bench) -> None:
    """Of all the tests above."""
    client = connect(bench.live.grpc_url)
    bench.outcomes.append(await ask(client, bench.other(stream=True)))
    await client.close()
    receipts = await settled_receipts(bench.watch)
    check_outcomes(bench.outcomes, receipts)
    verify_all(bench.live.state_dir)


def http_body(question: Question) -> dict[str, Any]:
    return {"text_input": question.prompt, "stream": question.stream, "id": question.label, **question.sampling}


def tokens_in(line: str) -> int:
    """Tokens in one line of a server-sent event stream."""
    if not line.startswith("data:"):
        return 0
    response = json.loads(line.removeprefix("data:"))
    assert "error" not in response, response
    return response["num_output_tokens"]
