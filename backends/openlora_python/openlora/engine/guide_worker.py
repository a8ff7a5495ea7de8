"""The process that reads guides: a stranger's schema, expression or grammar becomes llguidance's own form, or a reason.

`python -m openlora.engine.guide_worker` takes one `Guide` as JSON on standard input and answers with one JSON line.
What is hostile costs this process its time and memory, and the engine nothing: neither its steps nor Python's lock.
"""

from __future__ import annotations

import json
import os
import resource
import signal

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from ..processes.worker_process import take_request
from .api import Guide

CPU_SECONDS = 2
WALL_SECONDS = 10
MEMORY_BYTES = 1 << 30
NICENESS = 10  # running requests come first

LIMITS = LLParserLimits(
    max_items_in_row=1000,
    step_max_items=20_000,
    step_lexer_fuel=50_000,
    max_lexer_states=20_000,
    verbose_errors=False,  # they are for clients
)
"""What one guide may take of the engine: a few milliseconds for a mask at worst, some 40 MB."""

ANY_OBJECT = '{"type": "object"}'
# Between tokens of JSON, any white space but an endless run of it: a model that gets nowhere must not stay there.
JSON_OPTIONS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,20}"}


class Readable(msgspec.Struct, frozen=True, tag="readable"):
    grammar: str  # llguidance's own form


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    reason: str


def read_guide(guide: Guide) -> Readable | Refused:
    """llguidance's form of a guide, tried on the bytes of text; what needs a tokenizer comes later."""
    try:
        grammar = _grammar(guide)
    except (ValueError, RecursionError, MemoryError) as error:
        return Refused(one_line(str(error)) or "too large")
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return Refused(one_line(matcher.get_error())) if matcher.is_error() else Readable(grammar)


def one_line(message: str) -> str:
    return " ".join(message.removesuffix("<non-verbose/>").split())[:300]


def _grammar(guide: Guide) -> str:
    match guide.kind:
        case "json":
            return LLMatcher.grammar_from_json_schema(ANY_OBJECT, overrides=JSON_OPTIONS)
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(guide.text, overrides=JSON_OPTIONS)
        case "choice":
            choices = json.loads(guide.text)
            if not choices or not all(isinstance(choice, str) for choice in choices):
                raise ValueError("a JSON list of at least one string is wanted")
    return grammar_from(guide.kind, guide.text)


def main() -> None:
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(WALL_SECONDS)
    guide, report = take_request(Guide)
    report(read_guide(guide))


if __name__ == "__main__":
    main()
