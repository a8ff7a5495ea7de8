"""Request bodies. Types only: the ensemble's resolver judges values, and unknown fields are refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _neutral(*values: Any) -> BeforeValidator:
    """Takes only values that change nothing: what the field asks for otherwise is not supported."""

    def check(value: Any) -> Any:
        if not any(type(value) is type(one) and value == one for one in values):
            raise ValueError(f"not supported, only {values[0]!r} is taken, got {value!r:.80}")
        return value

    return BeforeValidator(check)


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise ValueError(f"not UTF-8: {error.reason} at {error.start}") from error
    return text


Text = Annotated[str, AfterValidator(_utf8)]


def _one_prompt(prompt: Any) -> Any:
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise ValueError("one string is wanted: lists of prompts and of token ids are not supported")
    return prompt


class AdapterEntry(Body):
    """One adapter of a weighted ensemble."""

    name: Text
    weight: float = 1.0
    version: int | Text | None = None


class StreamOptions(Body):
    include_usage: bool = False


class GenerationBody(Body):
    """What completions and chat have in common: OpenAI's fields, and vLLM's names for the rest."""

    model: Text  # an adapter, a group of them, or `base`
    adapters: Annotated[list[AdapterEntry], Field(min_length=1)] | None = None  # with model `base`: an ensemble
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: Text | list[Text] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[Text] | None = None
    ignore_eos: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None  # the same in vLLM's words
    priority: int | None = None
    routing_key: Text | None = None  # requests with the same one get the same adapter of a group
    timeout_ms: int | None = Field(default=None, ge=1)
    user: Text | None = None  # OpenAI's end-user label: has no effect on the answer and is not stored
    n: Annotated[int | None, _neutral(1, None)] = None
    logit_bias: Annotated[dict[str, float] | None, _neutral(None, {})] = None


class CompletionBody(GenerationBody):
    """`POST /v1/completions`"""

    prompt: Annotated[Text, BeforeValidator(_one_prompt)]
    echo: bool | None = None
    logprobs: int | None = None
    suffix: Annotated[str | None, _neutral(None, "")] = None
    best_of: Annotated[int | None, _neutral(1, None)] = None


class TextPart(Body):
    type: Literal["text"]
    text: Text


def _joined(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


class Message(Body):
    role: Literal["system", "user", "assistant"]
    content: Annotated[Text | list[TextPart], AfterValidator(_joined)]
    name: Text | None = None


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`"""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
