"""`sampling_parameters` of a request: vLLM's names, strict about everything it does not know."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from ..errors import InvalidArgument
from ..strict_json import parse_field

MAX_STOPS = 16
MAX_STOP_BYTES = 256
MAX_LOGPROBS = 20


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is wanted, not a truth value")
    return value


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Integer = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Words = Annotated[tuple[str, ...], BeforeValidator(_one_or_many)]


class SamplingParameters(BaseModel):
    """Defaults are vLLM's. Numeric strings are accepted, unknown names are not."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_tokens: Integer = Field(default=16, ge=1)
    min_tokens: Integer = Field(default=0, ge=0)
    temperature: Number = Field(default=1.0, ge=0.0, le=100.0)
    top_p: Number = Field(default=1.0, gt=0.0, le=1.0)
    top_k: Integer = Field(default=0, ge=-1, lt=2**31)  # 0 and -1: all
    min_p: Number = Field(default=0.0, ge=0.0, le=1.0)
    repetition_penalty: Number = Field(default=1.0, gt=0.0, le=10.0)
    presence_penalty: Number = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: Number = Field(default=0.0, ge=-2.0, le=2.0)
    seed: Annotated[int | None, BeforeValidator(_no_bool)] = Field(default=None, ge=0, lt=2**64)
    stop: Words | None = None
    stop_token_ids: tuple[Annotated[Integer, Field(ge=0)], ...] | None = Field(default=None, max_length=64)
    bad_words: Words | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    structured_outputs: dict[str, Any] | None = None  # both judged by `guides`
    response_format: dict[str, Any] | None = None
    logprobs: Annotated[int | None, BeforeValidator(_no_bool)] = Field(default=None, ge=0, le=MAX_LOGPROBS)
    skip_special_tokens: bool = True
    add_special_tokens: bool = True
    lora_name: str | None = None
    routing_key: str | None = Field(default=None, min_length=1, max_length=256)  # keeps a group's choice the same
    priority: Integer = Field(default=0, ge=-(2**31), lt=2**31)
    timeout_ms: Annotated[int | None, BeforeValidator(_no_bool)] = Field(default=None, ge=1)
    n: Integer = Field(default=1, ge=1, le=1)
    best_of: Annotated[int | None, BeforeValidator(_no_bool)] = Field(default=None, ge=1, le=1)

    @field_validator("stop", "bad_words")
    @classmethod
    def _bounded_words(cls, words: tuple[str, ...] | None) -> tuple[str, ...]:
        kept = tuple(word for word in words or () if word)
        if len(kept) > MAX_STOPS:
            raise ValueError(f"at most {MAX_STOPS} entries, got {len(kept)}")
        for word in kept:
            if len(word.encode()) > MAX_STOP_BYTES:
                raise ValueError(f"at most {MAX_STOP_BYTES} bytes each, got {len(word.encode())}")
        return kept


def merge_sampling(
    tensors: dict[str, Any], sampling_json: str | None, parameters: dict[str, Any]
) -> SamplingParameters:
    """One set of parameters from the three places where a client may put them.

    Tensors (TensorRT-LLM's names, already renamed to vLLM's) win over the JSON; request parameters are read as keys
    of the JSON, and a setting given twice otherwise is an error.

    Raises:
        InvalidArgument: naming the setting.
    """
    given = parse_field(sampling_json, "sampling_parameters") if sampling_json else {}
    if not isinstance(given, dict):
        raise InvalidArgument("a JSON object is wanted", field="sampling_parameters")
    for name, value in parameters.items():
        if name in given or name in tensors:
            raise InvalidArgument("given twice with this request", field=name)
        given[name] = value
    try:
        return SamplingParameters.model_validate({**given, **tensors})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])[:80] if first["loc"] else "sampling_parameters"
        if first["type"] == "extra_forbidden":
            raise InvalidArgument("no such parameter", field=name) from error
        message = first["msg"].removeprefix("Value error, ")
        raise InvalidArgument(f"{message}, got {_shown(first['input'])}", field=name) from error


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
