"""What a caller asks for, turned into the ensemble's inputs. The server's resolver is the only judge of values."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from openlora.errors import InvalidArgument

Adapters = str | Sequence[str | tuple[str, float] | Mapping[str, Any]] | Mapping[str, float] | None
"""A name; several names, (name, weight) pairs or {"name", "weight", "version"} objects; {name: weight}; None = base."""

Inputs = dict[str, str | bool]
"""Input tensors of the ensemble by name: every one a single STRING or BOOL."""


class SamplingOptions(TypedDict, total=False):
    """Keyword arguments of `generate` and `stream`: vLLM's names and defaults. None = not given.

    The server refuses names that it does not know, so what is missing here may still be passed.
    """

    max_tokens: int | None  # default 16
    min_tokens: int | None
    temperature: float | None  # default 1.0; 0 = greedy
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    bad_words: Sequence[str] | None
    include_stop_str_in_output: bool | None
    ignore_eos: bool | None
    structured_outputs: Mapping[str, Any] | None  # one of json (a schema), json_object, regex, choice, grammar
    response_format: Mapping[str, Any] | None  # the same in OpenAI's words
    logprobs: int | None  # 0 = of the chosen token; n = and of the n most likely
    skip_special_tokens: bool | None
    add_special_tokens: bool | None
    priority: int | None
    routing_key: str | None  # requests with the same one get the same adapter of a group


@dataclass(frozen=True)
class Call:
    """One request as it goes over the wire."""

    inputs: Inputs
    label: str  # the gRPC request id, which `stop` names
    deadline_seconds: float  # after which this side gives up


SERVER_LONGEST_SECONDS = 600.0  # the server's default cap on a request's deadline
GRACE_SECONDS = 10.0  # the server's own deadline comes first: its answer says more than ours


def generation_call(
    prompt: str,
    adapters: Adapters,
    options: Mapping[str, Any],
    *,
    stream: bool,
    label: str | None,
    timeout: float | None,
    api_key: str | None,
    echo: bool,
) -> Call:
    """A request for an answer, under `label` or one made here.

    `timeout` (seconds) becomes the server's deadline, which is otherwise the one in its settings.

    Raises:
        InvalidArgument: for what can't be written as UTF-8 or JSON.
    """
    sampling = {name: value for name, value in options.items() if value is not None}
    if timeout is not None:
        if timeout <= 0:
            raise InvalidArgument(f"a number of seconds above 0 is wanted, got {timeout}", field="timeout")
        sampling["timeout_ms"] = max(1, round(timeout * 1000))
    inputs: Inputs = {
        "text_input": prompt,
        "stream": stream,
        "return_finish_reason": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
    }
    if sampling:
        inputs["sampling_parameters"] = _json(sampling, "sampling_parameters")
    if "logprobs" in sampling:
        inputs["return_logprobs"] = True
    if adapters is not None:
        inputs["adapters"] = adapters if isinstance(adapters, str) else _json(_entries(adapters), "adapters")
    if echo:
        inputs["exclude_input_in_output"] = False
    if api_key is not None:
        inputs["api_key"] = api_key
    longest = SERVER_LONGEST_SECONDS if timeout is None else timeout
    return Call(inputs, label or uuid.uuid4().hex, longest + GRACE_SECONDS)


def stop_call(label: str, api_key: str | None) -> Call:
    """TensorRT-LLM's convention: the same request id with `stop` ends the request that runs under it."""
    if not label:
        raise InvalidArgument("empty; name the request_id that was given to generate or stream", field="request_id")
    inputs: Inputs = {"text_input": "", "stop": True}
    if api_key is not None:
        inputs["api_key"] = api_key
    return Call(inputs, label, GRACE_SECONDS)


def _entries(adapters: Sequence[Any] | Mapping[str, float]) -> list[dict[str, Any]]:
    if isinstance(adapters, Mapping):
        return [{"name": name, "weight": weight} for name, weight in adapters.items()]
    entries = []
    for item in adapters:
        match item:
            case str():
                entries.append({"name": item})
            case Mapping():
                entries.append(dict(item))
            case (name, weight):
                entries.append({"name": name, "weight": weight})
            case _:
                raise InvalidArgument(f"a name, (name, weight) or an object is wanted, got {item!r}", field="adapters")
    return entries


def _json(value: Any, field: str) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"not JSON: {error}", field=field) from error
