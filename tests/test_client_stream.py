"""The Python client against a real server: streams, concurrency, cancel, stop, errors."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ALICE_KEY
from live_server import LiveServer
from receipt_watch import (
    CANCELLED,
    COMPLETE,
    generations_taken,
    log_size,
    wait_for_generations,
    wait_for_receipt,
    wait_for_receipt_number,
)
from transformers import AutoTokenizer

from openlora.attribution.log_key import load_log_key
from openlora.attribution.verify import verify_receipt
from openlora_client import (
    AdapterNotFound,
    Answer,
    AsyncOpenLoRAClient,
    Chunk,
    DeadlineExceeded,
    InvalidArgument,
    OpenLoRAClient,
    RequestNotFound,
    Usage,
)
from openlora_client.answer import join

PROMPT = "Tell me about the cat."
GREEDY = {"temperature": 0, "max_tokens": 32}
LONG = {"temperature": 0, "max_tokens": 1900, "ignore_eos": True}  # seconds of work


@pytest.fixture
def client(server: LiveServer):
    with OpenLoRAClient(server.grpc_url) as client:
        yield client


def assert_whole_stream(chunks: list[Chunk], server: LiveServer, prompt: str) -> Answer:
    """Chunks that hang together, and a receipt that verifies against the server's log, prompt and answer."""
    answer = join(chunks)
    assert [bool(chunk.finish_reason) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert [chunk.receipt is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert {chunk.request_id for chunk in chunks} == {answer.request_id}
    assert all(chunk.num_output_tokens == len(chunk.token_ids) for chunk in chunks)
    assert len({chunk.num_input_tokens for chunk in chunks}) == 1
    assert answer.receipt["request_id"] == f"0x{answer.request_id}"
    assert answer.usage == Usage(answer.receipt["in_tokens"], answer.receipt["out_tokens"])
    assert verify_receipt(answer.receipt, load_log_key(server.log_key), prompt, answer.text).known
    return answer


def test_sync_stream_equals_the_whole_answer(server: LiveServer, client: OpenLoRAClient) -> None:
    tokenizer = AutoTokenizer.from_pretrained(server.model_dir)
    chunks = list(client.stream(PROMPT, "pirate", **GREEDY))
    answer = assert_whole_stream(chunks, server, PROMPT)
    assert len(chunks) > 1
    assert answer.usage.input_tokens == len(tokenizer(PROMPT)["input_ids"])
    assert answer.text == tokenizer.decode(answer.token_ids, skip_special_tokens=True)

    whole = client.generate(PROMPT, "pirate", **GREEDY)
    assert (whole.text, whole.token_ids, whole.finish_reason) == (answer.text, answer.token_ids, answer.finish_reason)
    assert whole.request_id != answer.request_id


async def test_async_stream_equals_the_whole_answer(server: LiveServer) -> None:
    async with AsyncOpenLoRAClient(server.grpc_url) as client:
        assert await client.ready()
        chunks = [chunk async for chunk in client.stream(PROMPT, [("pirate", 0.7), ("shout", 0.3)], **GREEDY)]
        answer = assert_whole_stream(chunks, server, PROMPT)
        whole = await client.generate(PROMPT, {"pirate": 0.7, "shout": 0.3}, **GREEDY)
    assert (whole.text, whole.token_ids) == (answer.text, answer.token_ids)
    used = answer.receipt["blobs"]["adapters"]["adapters"]
    assert [one["weight"] for one in used] == [700_000, 300_000]


def test_eight_threads_lose_and_swap_no_token(server: LiveServer, client: OpenLoRAClient, prompts: list[str]) -> None:
    questions = [(prompt, name) for prompt in prompts[:6] for name in (None, *server.adapter_names)]
    expected = [client.generate(prompt, name, **GREEDY) for prompt, name in questions]

    def streamed(question: tuple[str, str | None]) -> Answer:
        prompt, name = question
        return assert_whole_stream(list(client.stream(prompt, name, **GREEDY)), server, prompt)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(streamed, questions))
    assert [(one.text, one.token_ids) for one in answers] == [(one.text, one.token_ids) for one in expected]
    assert len({one.request_id for one in answers}) == len(questions)
    assert len({one.text for one in answers}) > len(server.adapter_names)  # the adapters really answer


def test_closing_a_stream_stops_the_request(server: LiveServer, client: OpenLoRAClient) -> None:
    with client.stream(PROMPT, **LONG) as chunks:
        first = next(chunks)
    assert list(chunks) == []
    receipt = wait_for_receipt(server, first.request_id).receipt
    assert receipt.status == CANCELLED
    assert 1 <= receipt.out_tokens < LONG["max_tokens"]


def test_leaving_a_loop_stops_the_request(server: LiveServer, client: OpenLoRAClient) -> None:
    for chunk in client.stream(PROMPT, **LONG):
        request_id = chunk.request_id
        break
    assert wait_for_receipt(server, request_id).receipt.status == CANCELLED


async def test_leaving_an_async_loop_stops_the_request(server: LiveServer) -> None:
    async with AsyncOpenLoRAClient(server.grpc_url) as client:
        async for chunk in client.stream(PROMPT, **LONG):
            request_id = chunk.request_id
            break
        receipt = await asyncio.to_thread(wait_for_receipt, server, request_id)
    assert receipt.receipt.status == CANCELLED


async def test_cancelling_a_task_stops_its_request_and_no_other(server: LiveServer) -> None:
    started: asyncio.Queue[str] = asyncio.Queue()

    async def read(client: AsyncOpenLoRAClient) -> None:
        async for chunk in client.stream(PROMPT, **LONG):
            started.put_nowait(chunk.request_id)

    async with AsyncOpenLoRAClient(server.grpc_url) as client:
        task = asyncio.create_task(read(client))
        request_id = await started.get()
        other = asyncio.create_task(client.generate(PROMPT, **GREEDY))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        cancelled = await asyncio.to_thread(wait_for_receipt, server, request_id)
        kept = await other
    assert cancelled.receipt.status == CANCELLED
    assert kept.receipt["status"] == COMPLETE


def test_stop_ends_the_request_under_its_label(server: LiveServer, client: OpenLoRAClient) -> None:
    chunks = client.stream(PROMPT, request_id="stop-me", **LONG)
    first = next(chunks)
    client.stop("stop-me")
    answer = assert_whole_stream([first, *chunks], server, PROMPT)
    assert answer.finish_reason == "cancelled"
    assert answer.receipt["status"] == CANCELLED
    with pytest.raises(RequestNotFound):
        client.stop("stop-me")


def test_stop_is_for_the_same_caller(server: LiveServer, client: OpenLoRAClient) -> None:
    with client.stream(PROMPT, request_id="mine", **LONG) as chunks:
        next(chunks)
        with OpenLoRAClient(server.grpc_url, api_key=ALICE_KEY) as alice, pytest.raises(RequestNotFound):
            alice.stop("mine")
        assert next(chunks).finish_reason == ""  # it goes on


def test_an_unknown_adapter_and_a_forbidden_one_are_the_same_to_a_stranger(
    server: LiveServer, client: OpenLoRAClient
) -> None:
    words = []
    for name in ("nobody", "secret"):
        with pytest.raises(AdapterNotFound) as caught:
            client.generate(PROMPT, name, **GREEDY)
        words.append(str(caught.value).replace(name, "*"))
    assert words[0] == words[1]
    with OpenLoRAClient(server.grpc_url, api_key=ALICE_KEY) as alice:
        assert alice.generate(PROMPT, "secret", **GREEDY).receipt["status"] == COMPLETE
    with OpenLoRAClient(server.grpc_url, api_key="wrong") as stranger, pytest.raises(InvalidArgument, match="api_key"):
        stranger.generate(PROMPT)


def test_many_refusals_and_cancels_leave_the_server_standing(client: OpenLoRAClient) -> None:
    """Asking for errors as gRPC statuses would kill this server within a few hundred of these."""

    def disturb(number: int) -> str:
        if number % 3 == 0:
            client.stream(PROMPT, **LONG).close()
            return "closed"
        try:
            client.generate(PROMPT, "nobody")
        except AdapterNotFound:
            return "refused"
        return "answered"

    with ThreadPoolExecutor(6) as pool:
        seen = list(pool.map(disturb, range(300)))
    assert (seen.count("closed"), seen.count("refused")) == (100, 200)
    assert client.generate(PROMPT, **GREEDY).receipt["status"] == COMPLETE


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_option_is_refused_by_name(client: OpenLoRAClient, stream: bool) -> None:
    with pytest.raises(InvalidArgument, match="max_token:"):
        if stream:
            next(client.stream(PROMPT, max_token=3))
        else:
            client.generate(PROMPT, max_token=3)


def test_a_deadline_is_told_as_one(client: OpenLoRAClient) -> None:
    with pytest.raises(DeadlineExceeded):
        client.generate(PROMPT, timeout=0.3, **LONG)


def test_logprobs_come_with_every_token(client: OpenLoRAClient) -> None:
    streamed = join(client.stream(PROMPT, "json", logprobs=3, **GREEDY))
    assert [entry["token_id"] for entry in streamed.logprobs] == list(streamed.token_ids)
    for entry in streamed.logprobs:
        top = [one["logprob"] for one in entry["top"]]
        assert len(top) == 3 and top == sorted(top, reverse=True)
        assert entry["logprob"] == top[0] <= 0  # greedy takes the likeliest
    whole = client.generate(PROMPT, "json", logprobs=3, **GREEDY)
    assert [one["token_id"] for one in whole.logprobs] == list(streamed.token_ids)


def test_a_seed_repeats_an_answer_and_echo_puts_the_prompt_first(client: OpenLoRAClient) -> None:
    sampled = {"temperature": 1.5, "max_tokens": 24, "ignore_eos": True}
    texts = {seed: client.generate(PROMPT, seed=seed, **sampled).text for seed in range(4)}
    assert len(set(texts.values())) > 1
    assert client.generate(PROMPT, seed=2, **sampled).text == texts[2]
    plain = client.generate(PROMPT, **GREEDY)
    assert client.generate(PROMPT, echo=True, **GREEDY).text == PROMPT + plain.text


def test_the_command_streams_and_keeps_the_receipt(server: LiveServer, client: OpenLoRAClient, tmp_path: Path) -> None:
    file = tmp_path / "receipt.json"
    command = [sys.executable, "-m", "openlora.cli"]
    ask = [*command, "generate", PROMPT, "-a", "pirate=0.7", "-a", "shout=0.3", "--url", server.grpc_url]
    done = subprocess.run(
        [*ask, "--temperature", "0", "--max-tokens", "32", "--receipt", str(file)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == client.generate(PROMPT, {"pirate": 0.7, "shout": 0.3}, **GREEDY).text + "\n"
    seq = json.loads(file.read_text())["seq"]
    assert f"receipt {seq}: complete" in done.stderr
    verify = [*command, "receipts", "verify", str(file), "--log", server.log_key]
    assert subprocess.run(verify, capture_output=True).returncode == 0


def test_the_command_tells_an_error_in_one_line(server: LiveServer) -> None:
    command = [sys.executable, "-m", "openlora.cli", "generate", PROMPT, "-a", "nobody", "--url", server.grpc_url]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == AdapterNotFound.exit_code
    assert done.stdout.strip() == ""
    assert done.stderr.count("\n") == 1 and "[ADAPTER_NOT_FOUND]" in done.stderr


def test_a_whole_answer_is_cancelled_too(server: LiveServer, client: OpenLoRAClient) -> None:
    """Nothing has come back when the call ends, so only the server's own probes can notice."""
    size, taken = log_size(server), generations_taken(server)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.generate, PROMPT, **LONG)
        wait_for_generations(server, taken + 1)
        client.close()  # ends what runs on it
        assert waiting.exception() is not None
    assert wait_for_receipt_number(server, size).receipt.status == CANCELLED
