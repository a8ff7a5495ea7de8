"""What pydantic finds wrong with something from outside."""

from __future__ import annotations

from pydantic import ValidationError


def first_fault(error: ValidationError, *root: str) -> tuple[str, str]:
    """The place of the first thing that is wrong, dotted and below `root`, and what is wrong with it."""
    first = error.errors(include_url=False)[0]
    return ".".join(str(part) for part in (*root, *first["loc"])), first["msg"].removeprefix("Value error, ")
