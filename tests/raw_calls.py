"""Calls as other people's clients make them: tritonclient's gRPC stream and plain HTTP, any model, any tensor.

A call that hangs fails by its deadline, and one that ends in anything but exactly one final response fails by `ended`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import tritonclient.grpc as grpcclient
from live_server import LiveServer
from tritonclient.utils import InferenceServerException
from usage_watch import UsageWatch

SECONDS = 60  # reached only when something hangs
# No header `triton_grpc_error: true` anywhere: tritonserver 2.51 crashes under errors and cancels with it, so our
# clients never send it, and errors are read from their text.
INT32 = frozenset(["max_tokens", "min_tokens", "top_k", "end_id", "pad_id", "beam_width", "num_return_sequences"])
FP32 = frozenset(
    ["temperature", "top_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "length_penalty"]
)
LISTS = frozenset({"stop_words", "bad_words"})


@dataclass
class Reply:
    """Everything that one gRPC call got."""

    responses: list[grpcclient.InferResult] = field(default_factory=list)  # those with tensors
    finals: int = 0
    errors: list[InferenceServerException] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        """Exactly one end: a final response, or one error."""
        return self.finals + len(self.errors) == 1

    @property
    def error(self) -> str:
        """Our message, without what Triton puts before it; empty when there is none."""
        text = self.errors[0].message() if self.errors else ""
        return text[text.find("[") :] if "[" in text else text

    def strings(self, output: str) -> list[str]:
        """A STRING output of every response that has it."""
        arrays = [response.as_numpy(output) for response in self.responses]
        return [array.flat[0].decode() for array in arrays if array is not None]

    def numbers(self, output: str) -> list[Any]:
        arrays = [response.as_numpy(output) for response in self.responses]
        return [value for array in arrays if array is not None for value in array.reshape(-1).tolist()]

    @property
    def text(self) -> str:
        return "".join(self.strings("text_output"))

    @property
    def token_ids(self) -> list[int]:
        return self.numbers("token_ids")

    @property
    def finish_reason(self) -> str:
        return self.strings("finish_reason")[-1]

    @property
    def receipt(self) -> dict[str, Any]:
        (text,) = self.strings("receipt")
        return json.loads(text)


def tensors(inputs: Mapping[str, Any]) -> list[grpcclient.InferInput]:
    """Inputs with the types that the ensemble declares; bytes go as they are, an array as itself."""
    made = []
    for name, value in inputs.items():
        array = _array(name, value)
        datatype = {"b": "BOOL", "O": "BYTES", "f": "FP32", "i": "INT32", "u": "UINT64"}[array.dtype.kind]
        tensor = grpcclient.InferInput(name, list(array.shape), datatype)
        tensor.set_data_from_numpy(array)
        made.append(tensor)
    return made


def _array(name: str, value: Any) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    if name in LISTS:
        return np.array([_bytes(item) for item in value], dtype=np.object_)
    if name in INT32:
        return np.array([value], dtype=np.int32)
    if name in FP32:
        return np.array([value], dtype=np.float32)
    if name == "seed":
        return np.array([value], dtype=np.uint64)
    if isinstance(value, bool):
        return np.array([value])
    return np.array([_bytes(value)], dtype=np.object_)


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()


class Stream:
    """A call in flight. `start` sends it; `wait` returns when the server has closed the stream."""

    def __init__(self, server: LiveServer, seconds: float = SECONDS) -> None:
        self.reply = Reply()
        self._arrived = threading.Event()
        self._client = grpcclient.InferenceServerClient(server.grpc_url)
        self._client.start_stream(self._take, stream_timeout=seconds)

    def start(
        self,
        inputs: Mapping[str, Any],
        *,
        model: str = "openlora",
        label: str = "",
        parameters: Mapping[str, Any] | None = None,
    ) -> Stream:
        self._client.async_stream_infer(
            model,
            tensors(inputs),
            request_id=label,
            parameters=dict(parameters) if parameters else None,
            enable_empty_final_response=True,
        )
        return self

    def arrived(self) -> Stream:
        """Wait for the first response."""
        assert self._arrived.wait(SECONDS), "no response"
        return self

    def wait(self) -> Reply:
        self._client.stop_stream()
        self._client.close()
        for error in self.reply.errors:
            assert "DEADLINE_EXCEEDED" not in (error.status() or ""), f"hangs: {self.reply}"
        assert self.reply.ended, f"not exactly one end: {self.reply}"
        return self.reply

    def _take(self, result: grpcclient.InferResult | None, error: InferenceServerException | None) -> None:
        if error is not None:
            self.reply.errors.append(error)
            self._arrived.set()
            return
        response = result.get_response()
        self.reply.finals += response.parameters["triton_final_response"].bool_param
        if response.outputs:
            self.reply.responses.append(result)
            self._arrived.set()


def call(server: LiveServer, inputs: Mapping[str, Any], **how: Any) -> Reply:
    """One request over a gRPC stream of its own, to its end."""
    return Stream(server).start(inputs, **how).wait()


def ask(
    server: LiveServer, prompt: str | bytes = "Hello.", sampling: Any = None, label: str = "", **inputs: Any
) -> Reply:
    """A request to the ensemble; `sampling` becomes the JSON of sampling_parameters."""
    given = {"text_input": prompt, **inputs}
    if sampling is not None:
        given["sampling_parameters"] = sampling if isinstance(sampling, str | bytes) else json.dumps(sampling)
    return call(server, given, label=label)


def post(server: LiveServer, body: Any, *, model: str = "openlora", verb: str = "generate") -> httpx.Response:
    """A body, JSON or bytes, to Triton's generate extension."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{server.http_url}/v2/models/{model}/{verb}", content=content, timeout=SECONDS)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """Server-sent events of a generate_stream answer."""
    return [json.loads(line.removeprefix("data: ")) for line in response.text.splitlines() if line.startswith("data:")]


def http_error(response: httpx.Response) -> str:
    """Our message in an HTTP error."""
    text = response.json()["error"]
    return text[text.find("[") :]


def refusal(server: LiveServer, *arguments: Any, **inputs: Any) -> str:
    """The error of a request that must get nothing else."""
    reply = ask(server, *arguments, **inputs)
    assert not reply.responses
    return reply.error


LONG: dict[str, Any] = {"sampling_parameters": '{"ignore_eos":true,"temperature":0}', "stream": True}


def running(server: LiveServer, label: str, *, tokens: int, **inputs: Any) -> Stream:
    """A request that has given its first token."""
    prompt = {"text_input": "Tell me about the cat.", "max_tokens": tokens, **LONG, **inputs}
    return Stream(server).start(prompt, label=label).arrived()


def stop(server: LiveServer, label: str, **inputs: Any) -> Reply:
    return call(server, {"text_input": "", "stop": True, **inputs}, label=label)


def books(server: LiveServer) -> tuple[int, int]:
    """How many requests have begun and how many have ended, in the journal that receipts are made of."""
    watch = UsageWatch(server.state_dir).read()
    return len(watch.intents), len(watch.completions)
