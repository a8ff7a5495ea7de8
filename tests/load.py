"""Streams over `tritonclient.grpc.aio`, and what each of them got: one at a time, or as a load of many at once."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
import numpy as np
from tritonclient.grpc import InferInput, InferResult
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

# A server that came back is found again at once; gRPC's own back-off grows to two minutes.
CHANNEL_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 500),
]
_DATATYPE = {str: "BYTES", bool: "BOOL"}


@dataclass(frozen=True)
class Question:
    """One request. `label` is the client's own id."""

    prompt: str
    adapters: str | None = None  # a name, or JSON
    stream: bool = True
    sampling: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""


@dataclass
class Outcome:
    """What a client saw of one request. Times are on the monotonic clock."""

    question: Question
    started_at: float = 0.0
    ended_at: float = 0.0  # when the last word came
    request_id: str = ""  # the server's, on its first response
    chunks: int = 0  # responses with outputs
    first_tokens: int = 0  # in the first of them
    tokens: int = 0
    text: str = ""
    finish_reason: str = ""
    receipt: dict[str, Any] | None = None
    error: str = ""  # what the server said, or how the connection ended
    cancelled: bool = False  # by us

    @property
    def delivered(self) -> bool:
        """The last response came, and its receipt."""
        return self.receipt is not None

    def read(self, result: InferResult) -> None:
        """Add one response."""
        if not result.get_response().outputs:
            return
        self.chunks += 1
        self.request_id = _text(result, "request_id") or self.request_id
        tokens = len(result.as_numpy("token_ids").reshape(-1))
        if self.chunks == 1:
            self.first_tokens = tokens
        self.tokens += tokens
        self.text += _text(result, "text_output")
        self.finish_reason = _text(result, "finish_reason")
        if receipt := _text(result, "receipt"):
            self.receipt = json.loads(receipt)


class Stream:
    """One request on its way; iterate to see its outcome grow, response by response."""

    def __init__(self, client: InferenceServerClient, question: Question) -> None:
        self.outcome = Outcome(question, started_at=time.monotonic())
        self._responses = client.stream_infer(_only(question))

    async def __aiter__(self) -> AsyncIterator[Outcome]:
        try:
            async for result, error in self._responses:
                if error is not None:
                    self.outcome.error = str(error.message())
                    break
                self.outcome.read(result)
                yield self.outcome
        except grpc.RpcError as error:
            self.outcome.error = f"{error.code().name}: {error.details()}"
        except InferenceServerException as error:
            self.outcome.error = f"{error.status()}: {error.message()}"
        except asyncio.CancelledError:
            if not self.outcome.cancelled:
                raise
        finally:
            self.outcome.ended_at = time.monotonic()

    async def drain(self) -> Outcome:
        """Everything that is still to come."""
        async for _ in self:
            pass
        return self.outcome

    def cancel(self) -> None:
        self.outcome.cancelled = True
        self._responses.cancel()


def connect(url: str) -> InferenceServerClient:
    return InferenceServerClient(url, channel_args=CHANNEL_OPTIONS)


async def ask(client: InferenceServerClient, question: Question) -> Outcome:
    """Ask and wait for the end, whatever it is."""
    return await Stream(client, question).drain()


async def ask_over_http(http: httpx.AsyncClient, question: Question) -> Outcome:
    """The same, not streamed, by a POST to `/generate`."""
    outcome = Outcome(question, started_at=time.monotonic())
    body = {"text_input": question.prompt, "id": question.label, **question.sampling}
    if question.adapters is not None:
        body["adapters"] = question.adapters
    try:
        answer = await http.post("/v2/models/openlora/generate", json=body)
    except httpx.TransportError as error:
        outcome.error = f"{type(error).__name__}: {error}"
    else:
        content = answer.json()
        if answer.status_code == 200:
            outcome.chunks, outcome.tokens = 1, content["num_output_tokens"]
            outcome.request_id, outcome.text = content["request_id"], content["text_output"]
            outcome.finish_reason, outcome.receipt = content["finish_reason"], json.loads(content["receipt"])
        else:
            outcome.error = content["error"]
    outcome.ended_at = time.monotonic()
    return outcome


def infer_inputs(question: Question) -> list[InferInput]:
    """The question as tensors, each of shape [1]."""
    values: dict[str, str | bool] = {"text_input": question.prompt, "stream": question.stream}
    if question.adapters is not None:
        values["adapters"] = question.adapters
    if question.sampling:
        values["sampling_parameters"] = json.dumps(dict(question.sampling))
    inputs = []
    for name, value in values.items():
        tensor = InferInput(name, [1], _DATATYPE[type(value)])
        encoded = [value.encode()] if isinstance(value, str) else [value]
        tensor.set_data_from_numpy(np.array(encoded, dtype=np.object_ if isinstance(value, str) else bool))
        inputs.append(tensor)
    return inputs


class Load:
    """Workers that ask one question after another; `outcomes` is complete when `finish` has returned.

    `interval` paces them: question n is not asked before n intervals have passed. A worker that got an error waits a
    moment before the next question, as a client that tries again would.
    """

    RETRY_SECONDS = 0.2

    def __init__(
        self,
        url: str,
        questions: Callable[[int], Question],
        concurrency: int,
        *,
        total: int | None = None,
        interval: float = 0.0,
        asking: Callable[[InferenceServerClient, Question], Awaitable[Outcome]] = ask,
    ) -> None:
        self.outcomes: list[Outcome] = []
        self.running = 0
        self._url = url
        self._questions = questions
        self._concurrency = concurrency
        self._total = total
        self._interval = interval
        self._asking = asking
        self._numbers = itertools.count()
        self._stopping = False
        self._workers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Load:
        self._client = connect(self._url)
        self._started_at = time.monotonic()
        self._workers = [asyncio.create_task(self._work()) for _ in range(self._concurrency)]
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.finish()
        await self._client.close()

    async def finish(self) -> list[Outcome]:
        """Ask nothing new, and wait for what runs."""
        self._stopping = True
        await asyncio.gather(*self._workers)
        return self.outcomes

    async def complete(self) -> list[Outcome]:
        """Wait until all questions of a bounded load are answered."""
        await asyncio.gather(*self._workers)
        return self.outcomes

    async def _work(self) -> None:
        while not self._stopping:
            number = next(self._numbers)
            if self._total is not None and number >= self._total:
                return
            await asyncio.sleep(max(0.0, self._started_at + number * self._interval - time.monotonic()))
            self.running += 1
            try:
                outcome = await self._asking(self._client, self._questions(number))
            finally:
                self.running -= 1
            self.outcomes.append(outcome)
            if outcome.error:
                await asyncio.sleep(self.RETRY_SECONDS)


def mixed_questions(
    prompts: Sequence[str], adapters: Sequence[str], *, seed: int = 0, max_tokens: tuple[int, int] = (8, 48)
) -> Callable[[int], Question]:
    """Base, single adapters and ensembles of two or three in turn, most of them streamed; the same for every run."""
    choices: list[str | None] = [None, *adapters]
    for count, weights in ((2, (0.7, 0.4)), (3, (0.5, -0.3, 0.8))):
        for names in itertools.combinations(adapters, count):
            entries = [{"name": name, "weight": weight} for name, weight in zip(names, weights, strict=True)]
            choices.append(json.dumps(entries))
            if len(choices) % 4 == 0:
                choices.append(None)

    def question(number: int) -> Question:
        draw = random.Random(seed * 1_000_003 + number)
        sampling = {"max_tokens": draw.randint(*max_tokens), "temperature": draw.choice([0, 0.8]), "seed": number}
        return Question(
            draw.choice(prompts), choices[number % len(choices)], draw.random() < 0.7, sampling, f"load-{seed}-{number}"
        )

    return question


async def _only(question: Question) -> AsyncIterator[dict[str, Any]]:
    yield {"model_name": "openlora", "inputs": infer_inputs(question), "request_id": question.label}


def _text(result: InferResult, name: str) -> str:
    array = result.as_numpy(name)
    return "" if array is None or not array.size else array.reshape(-1)[0].decode()
