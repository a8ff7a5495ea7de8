"""The gateway with the official `openai` package, over a real server."""

from __future__ import annotations

import socket

import httpx
import openai
import pytest
from conftest import ALICE_KEY
from live_server import LiveServer
from receipt_watch import (
    CANCELLED,
    generations_taken,
    log_size,
    wait_for_generations,
    wait_for_receipt,
    wait_for_receipt_number,
)
from transformers import AutoTokenizer

from openlora.attribution.log_key import load_log_key
from openlora.attribution.verify import verify_receipt
from openlora_client import Answer, OpenLoRAClient

PROMPT = "Tell me about the cat."
GREEDY = {"temperature": 0, "max_tokens": 24}
LONG = {"temperature": 0, "max_tokens": 1900, "extra_body": {"ignore_eos": True}}
REQUEST_ID = "x-openlora-request-id"


@pytest.fixture(scope="module")
def gateway(server: LiveServer):
    with openai.OpenAI(base_url=f"{server.gateway_url}/v1", api_key=ALICE_KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def direct(server: LiveServer):
    """The same node by gRPC: what the gateway's answers must equal."""
    with OpenLoRAClient(server.grpc_url) as client:
        yield client


def assert_receipt(body: object, server: LiveServer, prompt: str, text: str) -> dict:
    receipt = body.openlora_receipt
    assert verify_receipt(receipt, load_log_key(server.log_key), prompt, text).known
    return receipt


def test_models_are_the_base_and_what_the_caller_may_use(server: LiveServer, gateway: openai.OpenAI) -> None:
    listed = {model.id: model for model in gateway.models.list()}
    assert set(listed) == {"base", "secret", *server.adapter_names}
    assert listed["base"].parent is None
    assert {listed[name].parent for name in server.adapter_names} == {"base"}
    assert {model.root for model in listed.values()} == {server.model_dir.name}
    assert all(model.owned_by.startswith("0x") for model in listed.values())  # their cards name an owner
    assert gateway.models.retrieve("pirate") == listed["pirate"]

    stranger = httpx.get(f"{server.gateway_url}/v1/models").json()["data"]
    assert {model["id"] for model in stranger} == {"base", *server.adapter_names}
    assert httpx.get(f"{server.gateway_url}/v1/models/secret").status_code == 404


@pytest.mark.parametrize("model", ["base", "pirate", "sql"])
def test_a_completion_is_the_ensembles_answer(
    server: LiveServer, gateway: openai.OpenAI, direct: OpenLoRAClient, model: str
) -> None:
    expected = direct.generate(PROMPT, None if model == "base" else model, **GREEDY)
    raw = gateway.completions.with_raw_response.create(model=model, prompt=PROMPT, **GREEDY)
    body = raw.parse()
    assert (body.choices[0].text, body.choices[0].finish_reason) == (expected.text, expected.finish_reason)
    assert (body.usage.prompt_tokens, body.usage.completion_tokens) == (
        expected.usage.input_tokens,
        expected.usage.output_tokens,
    )
    assert body.model == model
    receipt = assert_receipt(body, server, PROMPT, body.choices[0].text)
    assert receipt["request_id"] == f"0x{raw.headers[REQUEST_ID]}"


@pytest.mark.parametrize("model", ["base", "emoji"])
def test_a_streamed_completion_is_the_same(
    server: LiveServer, gateway: openai.OpenAI, direct: OpenLoRAClient, model: str
) -> None:
    expected = direct.generate(PROMPT, None if model == "base" else model, **GREEDY)
    raw = gateway.completions.with_raw_response.create(
        model=model, prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    *chunks, last, usage = list(raw.parse())
    assert len(chunks) > 1
    assert "".join(chunk.choices[0].text for chunk in [*chunks, last]) == expected.text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * len(chunks)
    assert last.choices[0].finish_reason == expected.finish_reason
    assert usage.choices == [] and usage.usage.completion_tokens == expected.usage.output_tokens
    assert len({chunk.id for chunk in [*chunks, last, usage]}) == 1
    receipt = assert_receipt(last, server, PROMPT, expected.text)
    assert receipt["request_id"] == f"0x{raw.headers[REQUEST_ID]}"


def test_a_stream_ends_with_done(server: LiveServer) -> None:
    body = {"model": "base", "prompt": PROMPT, "stream": True, **GREEDY}
    answer = httpx.post(f"{server.gateway_url}/v1/completions", json=body, timeout=60)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])


def rendered(server: LiveServer, direct: OpenLoRAClient, messages: list[dict[str, str]], adapters=None) -> Answer:
    """What the base's own template makes of a chat, answered without the gateway."""
    tokenizer = AutoTokenizer.from_pretrained(server.model_dir)
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return direct.generate(prompt, adapters, add_special_tokens=False, **GREEDY)


def test_chat_uses_the_models_template(server: LiveServer, gateway: openai.OpenAI, direct: OpenLoRAClient) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    expected = rendered(server, direct, messages, "pirate")
    whole = gateway.chat.completions.create(model="pirate", messages=messages, **GREEDY)
    assert whole.choices[0].message.content == expected.text
    assert whole.usage.prompt_tokens == expected.usage.input_tokens

    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    opening, *chunks = list(gateway.chat.completions.create(model="pirate", messages=parts, stream=True, **GREEDY))
    assert opening.choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    assert chunks[-1].choices[0].finish_reason == expected.finish_reason
    assert chunks[-1].openlora_receipt["status"] == 1


def test_a_chat_without_a_limit_goes_to_the_end_of_the_context(server: LiveServer, gateway: openai.OpenAI) -> None:
    """The whole context of the demo model takes long, so the room is narrowed by a long prompt."""
    tokenizer = AutoTokenizer.from_pretrained(server.model_dir)
    words = "cat " * 1990
    answer = gateway.chat.completions.create(
        model="base", messages=[{"role": "user", "content": words}], temperature=0, extra_body={"ignore_eos": True}
    )
    used = len(tokenizer(words, add_special_tokens=False)["input_ids"])
    assert answer.usage.prompt_tokens == used
    assert answer.usage.total_tokens == 2048
    assert answer.choices[0].finish_reason == "length"


def test_an_ensemble_goes_through_extra_body(
    server: LiveServer, gateway: openai.OpenAI, direct: OpenLoRAClient
) -> None:
    expected = direct.generate(PROMPT, [("pirate", 0.7), ("shout", 0.6)], **GREEDY)
    entries = [{"name": "pirate", "weight": 0.7}, {"name": "shout", "weight": 0.6}]
    body = gateway.completions.create(model="base", prompt=PROMPT, extra_body={"adapters": entries}, **GREEDY)
    assert body.choices[0].text == expected.text
    used = assert_receipt(body, server, PROMPT, expected.text)["blobs"]["adapters"]["adapters"]
    assert [one["weight"] for one in used] == [700_000, 600_000]


def test_sampling_fields_reach_the_engine(gateway: openai.OpenAI, direct: OpenLoRAClient) -> None:
    full = direct.generate(PROMPT, **GREEDY).text
    stop = full[len(full) // 2 :][:3]
    body = gateway.completions.create(model="base", prompt=PROMPT, stop=[stop], **GREEDY)
    assert (body.choices[0].text, body.choices[0].finish_reason) == (full[: full.index(stop)], "stop")
    assert gateway.completions.create(model="base", prompt=PROMPT, echo=True, **GREEDY).choices[0].text == PROMPT + full

    sampled = {"temperature": 1.3, "top_p": 0.9, "seed": 11, "max_tokens": 16, "presence_penalty": 0.5}
    expected = direct.generate(PROMPT, frequency_penalty=0.25, top_k=50, **sampled)
    body = gateway.completions.create(
        model="base", prompt=PROMPT, frequency_penalty=0.25, extra_body={"top_k": 50}, **sampled
    )
    assert body.choices[0].text == expected.text


def test_logprobs_in_both_shapes(gateway: openai.OpenAI, direct: OpenLoRAClient) -> None:
    expected = direct.generate(PROMPT, logprobs=2, **GREEDY).logprobs
    tokens = [entry["token"] for entry in expected]
    body = gateway.completions.create(model="base", prompt=PROMPT, logprobs=2, **GREEDY)
    assert body.choices[0].logprobs.tokens == tokens
    assert body.choices[0].logprobs.token_logprobs == pytest.approx([entry["logprob"] for entry in expected], abs=1e-4)
    assert body.choices[0].logprobs.text_offset[:2] == [0, len(tokens[0])]
    assert all(len(top) <= 2 for top in body.choices[0].logprobs.top_logprobs)

    messages = [{"role": "user", "content": PROMPT}]
    chunks = gateway.chat.completions.create(
        model="base", messages=messages, logprobs=True, top_logprobs=2, stream=True, **GREEDY
    )
    content = [
        entry
        for chunk in chunks
        if chunk.choices and chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert 1 <= len(content) <= GREEDY["max_tokens"]
    assert all(len(entry.top_logprobs) == 2 for entry in content)
    assert all(entry.logprob == pytest.approx(entry.top_logprobs[0].logprob) for entry in content)


def test_a_closed_stream_stops_the_generation(server: LiveServer, gateway: openai.OpenAI) -> None:
    raw = gateway.completions.with_raw_response.create(model="base", prompt=PROMPT, stream=True, **LONG)
    stream = raw.parse()
    next(iter(stream))
    stream.close()
    receipt = wait_for_receipt(server, raw.headers[REQUEST_ID]).receipt
    assert receipt.status == CANCELLED
    assert 1 <= receipt.out_tokens < LONG["max_tokens"]


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_a_disconnect_before_any_byte_stops_the_generation(server: LiveServer, route: str) -> None:
    """A whole answer: nothing is written until the end, so the gateway itself must notice."""
    question = {"prompt": PROMPT} if route == "completions" else {"messages": [{"role": "user", "content": PROMPT}]}
    body = {"model": "base", "max_tokens": 1900, "temperature": 0, "ignore_eos": True, **question}
    size, taken = log_size(server), generations_taken(server)
    with _send_only(server, httpx.Request("POST", f"{server.gateway_url}/v1/{route}", json=body)):
        wait_for_generations(server, taken + 1)
    receipt = wait_for_receipt_number(server, size).receipt
    assert receipt.status == CANCELLED
    assert receipt.out_tokens < 1900


def _send_only(server: LiveServer, request: httpx.Request) -> socket.socket:
    """Send a request and do not read: leaving what this returns is a client that goes away."""
    connection = socket.create_connection((server.host, server.gateway_port))
    head = f"{request.method} {request.url.path} HTTP/1.1\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    connection.sendall(head.encode() + b"\r\n" + request.content)
    return connection
