"""From OpenAI's requests to the ensemble's."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from openlora.errors import InvalidArgument

from .chat import ChatTemplate
from .schemas import ChatBody, CompletionBody, GenerationBody

BASE = "base"
# Fields that mean the same to the ensemble, under the same name.
SAMPLING = {
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "bad_words",
    "ignore_eos",
    "response_format",
    "structured_outputs",
    "priority",
    "routing_key",
}


@dataclass(frozen=True)
class Question:
    """A request as `AsyncOpenLoRAClient` takes it."""

    prompt: str
    adapters: list[dict[str, Any]] | None  # None = the base model
    options: dict[str, Any]  # sampling parameters
    timeout: float | None  # seconds
    label: str  # the id of OpenAI's answer, and the request's name for `stop`
    echo: bool = False

    def arguments(self, api_key: str | None) -> dict[str, Any]:
        """Keyword arguments of the client's `generate` and `stream`."""
        return {
            "prompt": self.prompt,
            "adapters": self.adapters,
            "timeout": self.timeout,
            "request_id": self.label,
            "echo": self.echo,
            "api_key": api_key,
            **self.options,
        }


def completion_question(body: CompletionBody) -> Question:
    """Raises InvalidArgument for fields that contradict each other."""
    options = _options(body)
    if body.logprobs is not None:
        options["logprobs"] = body.logprobs
    if body.echo and body.logprobs is not None:
        raise InvalidArgument("not supported together with echo: prompt tokens have none", field="logprobs")
    label = f"cmpl-{uuid.uuid4().hex}"
    return Question(body.prompt, _adapters(body), options, _timeout(body), label, echo=bool(body.echo))


def chat_question(body: ChatBody, template: ChatTemplate) -> Question:
    """Raises InvalidArgument for fields that contradict each other, and for messages that the template refuses.

    Without `max_tokens` an answer may be as long as the context and the server's limit leave room for, as in vLLM.
    """
    options = _options(body)
    if body.max_completion_tokens is not None:
        if body.max_tokens is not None:
            raise InvalidArgument("given twice, also as max_tokens", field="max_completion_tokens")
        options["max_tokens"] = body.max_completion_tokens
    if body.logprobs:
        options["logprobs"] = body.top_logprobs or 0
    elif body.top_logprobs is not None:
        raise InvalidArgument("wants logprobs to be true", field="top_logprobs")
    prompt = template.render([message.model_dump(exclude_none=True) for message in body.messages])
    options.setdefault("max_tokens", template.room(prompt))
    options["add_special_tokens"] = False  # the template writes them
    return Question(prompt, _adapters(body), options, _timeout(body), f"chatcmpl-{uuid.uuid4().hex}")


def _options(body: GenerationBody) -> dict[str, Any]:
    return body.model_dump(include=SAMPLING, exclude_none=True)


def _timeout(body: GenerationBody) -> float | None:
    return None if body.timeout_ms is None else body.timeout_ms / 1000


def _adapters(body: GenerationBody) -> list[dict[str, Any]] | None:
    if body.model != BASE:
        if body.adapters is not None:
            raise InvalidArgument(f"model names an adapter already, {body.model!r:.140}: use 'base'", field="adapters")
        return [{"name": body.model}]
    return body.adapters and [entry.model_dump(exclude_none=True) for entry in body.adapters]
