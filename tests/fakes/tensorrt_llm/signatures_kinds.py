"""Classes and calls from the recorded signatures: what is not recorded is refused."""

from __future__ import annotations

import inspect
from typing import Any

from pydantic import ConfigDict, create_model


def config_class(name: str, fields: dict[str, Any]) -> type:
    """As their pydantic configs: an unknown field is an error."""
    return create_model(
        name, __config__=ConfigDict(extra="forbid"), **{key: (Any, value) for key, value in fields.items()}
    )


def parameter_class(name: str, fields: dict[str, Any]) -> type:
    """As their dataclasses: keywords only, an unknown one is a TypeError."""

    def __init__(self: Any, **given: Any) -> None:
        if unknown := sorted(given.keys() - fields.keys()):
            raise TypeError(f"{name}.__init__() got an unexpected keyword argument {unknown[0]!r}")
        self.__dict__.update({**fields, **given})

    return type(name, (), {"__init__": __init__})


def signature(recorded: list[list[Any]]) -> inspect.Signature:
    """Parameters in their recorded order, positional or by keyword."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [
            inspect.Parameter(entry[0], kind, default=entry[1] if len(entry) > 1 else inspect.Parameter.empty)
            for entry in recorded
        ]
    )


def bind(recorded: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = recorded.bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)
