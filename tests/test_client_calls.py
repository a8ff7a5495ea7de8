"""What the client sends and how it fails, without a server."""

from __future__ import annotations

import json
import socket
import threading

import pytest
from live_server import free_ports

from openlora_client import (
    Answer,
    AsyncOpenLoRAClient,
    Chunk,
    InvalidArgument,
    OpenLoRAClient,
    Unavailable,
    Usage,
)
from openlora_client.answer import join
from openlora_client.request import generation_call, stop_call
from openlora_client.wire import infer_inputs, infer_message


def call(prompt="p", adapters=None, *, stream=True, label="l", timeout=None, api_key=None, echo=False, **options):
    return generation_call(
        prompt, adapters, options, stream=stream, label=label, timeout=timeout, api_key=api_key, echo=echo
    )


@pytest.mark.parametrize(
    ("adapters", "sent"),
    [
        ("pirate", "pirate"),
        (["pirate", ("shout", 0.5)], [{"name": "pirate"}, {"name": "shout", "weight": 0.5}]),
        ({"pirate": 1, "shout": -0.25}, [{"name": "pirate", "weight": 1}, {"name": "shout", "weight": -0.25}]),
        ([{"name": "pirate", "version": 2}], [{"name": "pirate", "version": 2}]),
    ],
)
def test_adapters_are_sent_as_a_name_or_as_json(adapters, sent) -> None:
    tensor = call(adapters=adapters).inputs["adapters"]
    assert (tensor if isinstance(sent, str) else json.loads(tensor)) == sent


def test_only_what_was_given_is_sent() -> None:
    plain = call()
    assert not {"adapters", "sampling_parameters", "api_key", "return_logprobs"} & plain.inputs.keys()
    full = call(timeout=1.5, api_key="k", echo=True, temperature=0, seed=None, stop=["x"], logprobs=2)
    assert json.loads(full.inputs["sampling_parameters"]) == {
        "temperature": 0,
        "stop": ["x"],
        "logprobs": 2,
        "timeout_ms": 1500,
    }
    assert full.inputs["return_logprobs"] is True
    assert full.inputs["exclude_input_in_output"] is False
    assert full.inputs["api_key"] == "k"
    assert full.deadline_seconds > 1.5  # the server's answer to a deadline says more than ours, so it comes first


def test_a_request_without_a_label_gets_one_of_its_own() -> None:
    labels = {call(label=None).label for _ in range(100)}
    assert len(labels) == 100 and all(labels)


def test_both_encodings_are_the_same_tensors() -> None:
    one = call("Grüße 🐱", "pirate", seed=7)
    message = infer_message(one)
    tensors = infer_inputs(one)
    assert [(tensor.name(), tensor.datatype(), tensor.shape()) for tensor in tensors] == [
        (tensor.name, tensor.datatype, list(tensor.shape)) for tensor in message.inputs
    ]
    # A STRING tensor is its length in 4 bytes, little end first, and its UTF-8; a BOOL is one byte.
    raw = dict(zip([tensor.name for tensor in message.inputs], message.raw_input_contents, strict=True))
    text = "Grüße 🐱".encode()
    assert raw["text_input"] == len(text).to_bytes(4, "little") + text
    assert raw["stream"] == b"\x01"


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"prompt": "half \ud800 pair"}, "text_input"),
        ({"prompt": b"bytes"}, "text_input"),
        ({"temperature": float("nan")}, "sampling_parameters"),
        ({"stop": {1, 2}}, "sampling_parameters"),
        ({"adapters": [3]}, "adapters"),
        ({"adapters": {"pirate": float("inf")}}, "adapters"),
        ({"timeout": 0}, "timeout"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_name(arguments, field) -> None:
    with pytest.raises(InvalidArgument) as caught:
        infer_message(call(**arguments))
    assert caught.value.field == field


def test_stop_wants_a_label() -> None:
    with pytest.raises(InvalidArgument):
        stop_call("", None)


def chunk(text: str, tokens: tuple[int, ...], finish_reason: str = "", receipt: dict | None = None) -> Chunk:
    return Chunk(text, tokens, finish_reason, 5, len(tokens), "id", receipt)


def test_chunks_add_up() -> None:
    parts = [chunk("a", (1,)), chunk("", (2, 3)), chunk("bc", (4,), "stop", {"seq": 0})]
    assert join(parts) == Answer("abc", (1, 2, 3, 4), "stop", {"seq": 0}, "id", Usage(5, 4))


@pytest.mark.parametrize("parts", [[], [chunk("a", (1,))], [chunk("a", (1,), "stop")]])
def test_a_cut_off_answer_is_no_answer(parts) -> None:
    with pytest.raises(Unavailable):
        join(parts)


def test_no_server_is_unavailable() -> None:
    (port,) = free_ports(1)
    with OpenLoRAClient(f"127.0.0.1:{port}") as client:
        with pytest.raises(Unavailable, match=str(port)):
            client.generate("hello")
        with pytest.raises(Unavailable, match=str(port)):
            next(client.stream("hello"))
        with pytest.raises(Unavailable):
            client.stop("label")
        assert client.ready() is False


async def test_no_server_is_unavailable_async() -> None:
    (port,) = free_ports(1)
    async with AsyncOpenLoRAClient(f"127.0.0.1:{port}") as client:
        with pytest.raises(Unavailable, match=str(port)):
            await client.generate("hello")
        with pytest.raises(Unavailable, match=str(port)):
            await anext(client.stream("hello"))
        assert await client.ready() is False


def test_a_server_that_says_nothing_is_not_waited_for_for_ever() -> None:
    silent = socket.create_server(("127.0.0.1", 0))  # the kernel accepts, nobody answers
    with silent, OpenLoRAClient(f"127.0.0.1:{silent.getsockname()[1]}") as client:
        assert client.ready(timeout=0.5) is False


def test_a_connection_that_breaks_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]

        def hang_up() -> None:
            connection, _ = listening.accept()
            connection.recv(1)
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        with OpenLoRAClient(f"127.0.0.1:{port}") as client, pytest.raises(Unavailable):
            client.generate("hello")
        thread.join()
