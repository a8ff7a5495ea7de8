"""What the gateway refuses, in OpenAI's error shape, and its health routes."""

from __future__ import annotations

import httpx
import openai
import pytest
from conftest import ALICE_KEY
from live_server import LiveServer

PROMPT = "Tell me about the cat."
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PLAIN = {"model": "base", "prompt": PROMPT}
TALK = {"model": "base", "messages": [{"role": "user", "content": PROMPT}]}


@pytest.fixture(scope="module")
def http(server: LiveServer):
    with httpx.Client(base_url=server.gateway_url, timeout=60) as client:
        yield client


def assert_error(answer: httpx.Response, status: int, code: str, param: str | None) -> str:
    """The shape, and nothing else in the body; returns the message."""
    body = answer.json()
    assert answer.status_code == status, body
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert error["message"].startswith(f"[{code}] ")
    return error["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        # unknown fields, by name
        (COMPLETIONS, {**PLAIN, "max_token": 3}, "max_token"),
        (CHAT, {**TALK, "tools": []}, "tools"),
        (COMPLETIONS, {**PLAIN, "adapters": [{"name": "pirate", "wieght": 1}]}, "adapters.0.wieght"),
        (COMPLETIONS, {**PLAIN, "stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        # fields that we know and do not support
        (COMPLETIONS, {**PLAIN, "n": 2}, "n"),
        (COMPLETIONS, {**PLAIN, "n": True}, "n"),
        (COMPLETIONS, {**PLAIN, "best_of": 2}, "best_of"),
        (COMPLETIONS, {**PLAIN, "suffix": "x"}, "suffix"),
        (COMPLETIONS, {**PLAIN, "logit_bias": {"5": 1}}, "logit_bias"),
        (COMPLETIONS, {**PLAIN, "prompt": ["a", "b"]}, "prompt"),
        (COMPLETIONS, {**PLAIN, "prompt": [1, 2]}, "prompt"),
        (CHAT, {**TALK, "response_format": {"type": "structural_tag"}}, "response_format"),
        (CHAT, {**TALK, "messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        # missing, mistyped, contradicting
        (COMPLETIONS, {"prompt": PROMPT}, "model"),
        (COMPLETIONS, {"model": "base"}, "prompt"),
        (COMPLETIONS, {**PLAIN, "max_tokens": "5"}, "max_tokens"),
        (COMPLETIONS, {**PLAIN, "max_tokens": True}, "max_tokens"),
        (COMPLETIONS, {**PLAIN, "stop": [1]}, "stop"),
        (CHAT, {**TALK, "messages": []}, "messages"),
        (CHAT, {**TALK, "top_logprobs": 2}, "top_logprobs"),
        (CHAT, {**TALK, "max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        (COMPLETIONS, {**PLAIN, "model": "pirate", "adapters": [{"name": "shout"}]}, "adapters"),
        (COMPLETIONS, {**PLAIN, "echo": True, "logprobs": 1}, "logprobs"),
        # values that only the resolver judges
        (COMPLETIONS, {**PLAIN, "max_tokens": 0}, "max_tokens"),
        (COMPLETIONS, {**PLAIN, "temperature": -1}, "temperature"),
        (COMPLETIONS, {**PLAIN, "logprobs": 21}, "logprobs"),
        (COMPLETIONS, {**PLAIN, "stop": ["x"] * 17}, "stop"),
        (CHAT, {**TALK, "response_format": {"type": "json_schema"}}, "response_format"),
        # what only the engine judges
        (COMPLETIONS, {**PLAIN, "structured_outputs": {"regex": "a("}}, "structured_outputs"),
        (COMPLETIONS, {**PLAIN, "adapters": [{"name": "pirate", "weight": 11}]}, "adapters"),
        (COMPLETIONS, {**PLAIN, "adapters": [{"name": "pirate"}, {"name": "pirate"}]}, "adapters"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input_is_refused_by_name(http: httpx.Client, path: str, body: dict, param: str, stream: bool) -> None:
    answer = http.post(path, json={"stream": stream, **body})
    assert param.split(".")[-1] in assert_error(answer, 400, "INVALID_ARGUMENT", param)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"model": "base", "prompt": "x", "temperature": NaN}', "temperature"),
        (b'{"model": "base", "prompt": "half \\ud800"}', "prompt"),
        (b'{"model": "\\ud800", "prompt": "x"}', "model"),
        (b'{"model": "base", "prompt": "x", "stop": "\\udfff"}', "stop"),
        (b'{"model": "base", ', "body"),
        (b"[]", "body"),
        (b'{"model": "base", "prompt": "\xff"}', None),
    ],
)
def test_bytes_that_are_no_request(http: httpx.Client, body: bytes, param: str | None) -> None:
    answer = http.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
    assert_error(answer, 400, "INVALID_ARGUMENT", param)


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_adapter_and_a_forbidden_one_look_the_same(http: httpx.Client, stream: bool) -> None:
    words = []
    for name in ("nobody", "secret"):
        answer = http.post(COMPLETIONS, json={**PLAIN, "model": name, "stream": stream})
        words.append(assert_error(answer, 404, "ADAPTER_NOT_FOUND", "model").replace(name, "*"))
    assert words[0] == words[1]
    assert_error(http.get("/v1/models/secret"), 404, "ADAPTER_NOT_FOUND", "model")


def test_a_wrong_key_is_an_authentication_error(server: LiveServer, http: httpx.Client) -> None:
    with openai.OpenAI(base_url=f"{server.gateway_url}/v1", api_key="wrong", max_retries=0) as stranger:
        for ask in (lambda: list(stranger.models.list()), lambda: stranger.completions.create(**PLAIN)):
            with pytest.raises(openai.AuthenticationError) as caught:
                ask()
            assert caught.value.param == "api_key"
    assert http.post(COMPLETIONS, json={**PLAIN, "max_tokens": 1}).status_code == 200  # without a key: anonymous
    allowed = http.post(
        COMPLETIONS,
        json={**PLAIN, "model": "secret", "max_tokens": 1},
        headers={"authorization": f"Bearer {ALICE_KEY}"},
    )
    assert allowed.status_code == 200


def test_the_openai_package_raises_its_own_errors(server: LiveServer) -> None:
    with openai.OpenAI(base_url=f"{server.gateway_url}/v1", api_key=ALICE_KEY, max_retries=0) as client:
        with pytest.raises(openai.NotFoundError) as unknown:
            client.completions.create(model="nobody", prompt=PROMPT)
        assert (unknown.value.code, unknown.value.param) == ("ADAPTER_NOT_FOUND", "model")
        with pytest.raises(openai.BadRequestError) as unsupported:
            client.chat.completions.create(model="base", messages=TALK["messages"], n=3)
        assert unsupported.value.param == "n"


def test_routes_that_do_not_exist(http: httpx.Client) -> None:
    assert_error(http.post("/v1/embeddings", json={}), 404, "ROUTE_NOT_FOUND", None)
    assert_error(http.get(COMPLETIONS), 405, "METHOD_NOT_ALLOWED", None)


def test_health_is_the_gateways_and_readiness_the_nodes(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"live": True}
    ready = http.get("/readyz")
    assert (ready.status_code, ready.json()["ready"]) == (200, True)
