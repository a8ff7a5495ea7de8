"""What a client says its answer must look like, in one form: TensorRT-LLM's tensors, vLLM's and OpenAI's JSON."""

from __future__ import annotations

import json
from typing import Any

from ..engine.api import MAX_GUIDE_BYTES, Guide
from ..errors import InvalidArgument
from ..strict_json import parse_field
from .sampling_parameters import SamplingParameters

TYPE_TENSOR, GUIDE_TENSOR = "guided_decoding_guide_type", "guided_decoding_guide"
_TENSOR_TYPES = {"json": "json", "json_schema": "json_schema", "regex": "regex", "ebnf_grammar": "grammar"}
_STRUCTURED_OUTPUTS = ("json", "json_object", "regex", "choice", "grammar")
_RESPONSE_FORMATS = ("text", "json_object", "json_schema")
_JSON_SCHEMA_KEYS = {"name", "description", "schema", "strict"}


def guide_of(guide_type: str | None, guide: str | None, sampling: SamplingParameters) -> Guide | None:
    """The guide of a request: of its tensors, which win, or of `structured_outputs` or `response_format`.

    Whether a schema, an expression or a grammar is right is the engine's to say.

    Raises:
        InvalidArgument: naming the setting.
    """
    if sampling.structured_outputs is not None and sampling.response_format is not None:
        raise InvalidArgument("given twice with this request, also as structured_outputs", field="response_format")
    if guide_type or guide:
        return _of_tensors(guide_type or "", guide or "")
    if sampling.structured_outputs is not None:
        return _of_structured_outputs(sampling.structured_outputs)
    if sampling.response_format is not None:
        return _of_response_format(sampling.response_format)
    return None


def _of_tensors(guide_type: str, guide: str) -> Guide:
    if guide_type not in _TENSOR_TYPES:
        known = ", ".join(_TENSOR_TYPES)
        raise InvalidArgument(f"{guide_type!r:.80} is unknown, one of {known} is right", field=TYPE_TENSOR)
    if (guide_type == "json") != (not guide):
        wanted = "nothing is wanted with the type json" if guide else f"missing, the type is {guide_type}"
        raise InvalidArgument(wanted, field=GUIDE_TENSOR)
    return _checked(_TENSOR_TYPES[guide_type], guide, GUIDE_TENSOR)


def _of_structured_outputs(given: dict[str, Any]) -> Guide:
    field = "structured_outputs"
    _refuse_unknown(given, set(_STRUCTURED_OUTPUTS), field)
    named = {name: value for name, value in given.items() if value is not None and value is not False}
    if len(named) != 1:
        raise InvalidArgument(f"one of {', '.join(_STRUCTURED_OUTPUTS)} is wanted, got {len(named)}", field=field)
    ((name, value),) = named.items()
    match name, value:
        case "json_object", True:
            return Guide("json", field=field)
        case "json", str():
            return _checked("json_schema", value, field)
        case "json", dict():
            return _checked("json_schema", _text(value, field), field)
        case "choice", list() if value and all(isinstance(one, str) for one in value):
            return _checked("choice", _text(value, field), field)
        case "regex" | "grammar", str() if value:
            return _checked(name, value, field)
    wanted = {
        "json_object": "true",
        "json": "a schema, as an object or as its text,",
        "choice": "a list of strings",
        "regex": "an expression",
        "grammar": "its text",
    }
    raise InvalidArgument(f"{name}: {wanted[name]} is wanted, got {value!r:.80}", field=field)


def _of_response_format(given: dict[str, Any]) -> Guide | None:
    field = "response_format"
    _refuse_unknown(given, {"type", "json_schema"}, field)
    kind = given.get("type")
    if kind not in _RESPONSE_FORMATS:
        raise InvalidArgument(f"type: one of {', '.join(_RESPONSE_FORMATS)} is wanted, got {kind!r:.80}", field=field)
    if kind != "json_schema":
        if given.get("json_schema") is not None:
            raise InvalidArgument(f"json_schema: nothing is wanted with the type {kind}", field=field)
        return Guide("json", field=field) if kind == "json_object" else None
    description = given.get("json_schema")
    if not isinstance(description, dict) or not isinstance(description.get("schema"), dict):
        raise InvalidArgument("json_schema: an object with a schema is wanted", field=field)
    _refuse_unknown(description, _JSON_SCHEMA_KEYS, field)
    return _checked("json_schema", _text(description["schema"], field), field)


def _refuse_unknown(given: dict[str, Any], known: set[str], field: str) -> None:
    if unknown := sorted(given.keys() - known):
        raise InvalidArgument(f"{unknown[0]!r:.80}: not supported, one of {', '.join(sorted(known))} is", field=field)


def _text(value: Any, field: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError as error:
        raise InvalidArgument("nested too deep", field=field) from error


def _checked(kind: str, text: str, field: str) -> Guide:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise InvalidArgument(f"not UTF-8: {error.reason} at {error.start}", field=field) from error
    if size > MAX_GUIDE_BYTES:
        raise InvalidArgument(f"at most {MAX_GUIDE_BYTES} bytes, got {size}", field=field)
    if kind == "json_schema" and not isinstance(parse_field(text, field), dict):
        raise InvalidArgument("a JSON Schema is wanted, which is an object", field=field)
    return Guide(kind, text, field)
