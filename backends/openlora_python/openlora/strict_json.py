"""JSON from strangers as RFC 8259 wants it, so that no two readers can see different documents in one text."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from .errors import InvalidArgument

MAX_DEPTH = 32  # of lists and objects within each other
MAX_FIELD_BYTES = 64 * 1024
MAX_FIELD_DEPTH = 256  # schemas of answers are nested deeper than documents are

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)  # one without an end goes on to the end
_AS_LISTS = bytes.maketrans(b"{}", b"[]")
_NO_BRACKET = bytes(set(range(256)) - set(b"[]{}"))


def parse_strict(text: str | bytes, deepest: int = MAX_DEPTH) -> Any:
    """What a JSON text says; bytes are UTF-8.

    ValueError: it is no JSON, nested more than `deepest` levels, a key comes twice, or a number is none (NaN, Infinity)
    or beyond a float.
    """
    if isinstance(text, bytes):
        text = text.decode()  # json.loads guesses encodings, and who guesses otherwise reads another document
    refuse_depth(text, deepest)
    return json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_constant, parse_float=_finite)


def refuse_depth(text: str, deepest: int = MAX_DEPTH) -> None:
    """ValueError: the JSON is nested deeper than this. No parser may see it: some libraries raise Python's recursion
    limit, and then it would end the process."""
    if text.count("[") + text.count("{") <= deepest:
        return
    brackets = _STRING.sub(b"", text.encode(errors="replace")).translate(_AS_LISTS, _NO_BRACKET)
    for _ in range(deepest):
        brackets = brackets.replace(b"[]", b"")  # takes the innermost level away
    if b"[]" in brackets or brackets.count(b"[") > deepest:
        raise ValueError(f"nested deeper than {deepest} levels")


def parse_field(text: str, field: str) -> Any:
    """`parse_strict` of a request's field, at most 64 KiB. InvalidArgument: naming `field` and the fault."""
    if (size := len(text.encode())) > MAX_FIELD_BYTES:
        raise InvalidArgument(f"at most {MAX_FIELD_BYTES} bytes of JSON, got {size}", field=field)
    try:
        return parse_strict(text, MAX_FIELD_DEPTH)
    except ValueError as error:
        raise InvalidArgument(f"not JSON: {error}", field=field) from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen = set()
        repeated = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key {repeated!r:.80} comes twice")
    return members


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits:.40} is out of range")
    return number
