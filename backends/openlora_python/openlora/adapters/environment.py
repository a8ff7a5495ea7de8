"""Limits of the adapter jobs that an operator sets by environment variables."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any, TypeVar

import msgspec

from ..errors import InvalidArgument

Limits = TypeVar("Limits")


def limits_from_environment(kind: type[Limits], prefix: str) -> Limits:
    """The dataclass `kind`, each field from the variable of its name in capitals after `prefix`, where there is one.

    Raises:
        InvalidArgument: a value that the field can't have.
    """
    names = {field.name: prefix + field.name.upper() for field in fields(kind)}
    given: dict[str, Any] = {name: os.environ[key] for name, key in names.items() if key in os.environ}
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidArgument(f"{error}", field=prefix + "…") from error
