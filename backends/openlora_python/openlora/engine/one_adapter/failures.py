"""What engines say when something goes wrong, and what a client is told of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from ...errors import Internal, NotFinite, OpenLoRAError, Overloaded

RETRY_AFTER_MS = 1000


class Meaning(NamedTuple):
    """An error whose `type: message` contains `pattern` (any case) means `kind`."""

    pattern: str
    kind: type[OpenLoRAError]
    field: str | None = None
    retry_after_ms: int | None = None
    words: str = ""  # to tell instead of the engine's own


COMMON = (
    Meaning(r"out of memory|OutOfMemory", Overloaded, None, RETRY_AFTER_MS),
    Meaning(r"\bnan\b|non-finite|not finite", NotFinite),
)


def told(error: BaseException, meanings: Sequence[Meaning]) -> OpenLoRAError:
    """The typed error for what an engine raised: its own where it is one, else by the first meaning that fits."""
    if isinstance(error, OpenLoRAError):
        return error
    cause = error if str(error) or error.__cause__ is None else error.__cause__  # engines wrap errors in empty ones
    words = " ".join(str(cause).split())
    name = type(cause).__name__
    for meaning in (*meanings, *COMMON):
        if re.search(meaning.pattern, f"{name}: {words}", re.IGNORECASE):
            return meaning.kind(
                meaning.words or words[:400], field=meaning.field, retry_after_ms=meaning.retry_after_ms
            )
    return Internal(f"{name}: {words[:400]}")
