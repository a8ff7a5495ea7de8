"""The `adapters` input: a name, or JSON with several weighted ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..access_rule import canonical_adapter
from ..attribution.card import TASK
from ..engine.api import WEIGHT_ONE
from ..errors import InvalidArgument
from ..strict_json import parse_field
from .catalog import RESERVED_NAMES
from .catalog_rows import NAME, is_adapter_name

MAX_ADAPTERS = 8
MAX_WEIGHT = 10
FIELD = "adapters"


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter as asked for: by its name, by a group's, or by what it is to do."""

    name: str  # empty with a task
    weight: int  # 1e-6 units
    version: int | str | None  # number, or the first digits of its digest; None = the current one
    task: str | None = None


def parse_adapters(text: str) -> tuple[AdapterSpec, ...]:
    """What an `adapters` string asks for: 1–8 adapters, weights rounded to 1e-6.

    Raises:
        InvalidArgument: for anything that is not exactly one of the documented forms.
    """
    if not text.strip():
        raise InvalidArgument("empty; leave it out to ask the base model", field=FIELD)
    if text.lstrip()[0] not in "[{":
        return (_one(text.strip(), 1, None),)
    tree = parse_field(text, FIELD)
    if isinstance(tree, dict) and "task" in tree:
        tree = [tree]
    elif isinstance(tree, dict):
        _only(tree, {"adapters", "method", "density"})
        method = tree.get("method", "cat")
        if method != "cat":
            raise InvalidArgument(
                f"method {method!r:.80} makes new weights: only 'cat' is computed per request, "
                "make an adapter of the others with `openlora adapters merge`",
                field=FIELD,
            )
        if "density" in tree:
            raise InvalidArgument("density has no meaning for method 'cat'", field=FIELD)
        tree = tree.get("adapters")
    if not isinstance(tree, list) or not tree:
        raise InvalidArgument("a list of 1 to 8 adapters is wanted", field=FIELD)
    if len(tree) > MAX_ADAPTERS:
        raise InvalidArgument(f"at most {MAX_ADAPTERS} adapters, got {len(tree)}", field=FIELD)
    specs = tuple(_entry(item) for item in tree)
    names = [spec.name for spec in specs]
    if repeated := next((name for name in names if name and names.count(name) > 1), None):
        raise InvalidArgument(f"{repeated!r} comes twice", field=FIELD)
    if not any(spec.weight for spec in specs):
        raise InvalidArgument("all weights are zero; leave adapters out to ask the base model", field=FIELD)
    return specs


def _entry(item: Any) -> AdapterSpec:
    if isinstance(item, str):
        return _one(item, 1, None)
    if not isinstance(item, dict):
        raise InvalidArgument(f"an adapter is a name or an object, got {item!r:.80}", field=FIELD)
    if "task" in item:
        _only(item, {"task", "weight"})
        return _for_task(item["task"], item.get("weight", 1))
    _only(item, {"name", "weight", "version"})
    if "name" not in item:
        raise InvalidArgument("an adapter without a name", field=FIELD)
    return _one(item["name"], item.get("weight", 1), item.get("version"))


def _for_task(task: Any, weight: Any) -> AdapterSpec:
    if not isinstance(task, str) or not TASK.fullmatch(task):
        raise InvalidArgument(f"{task!r:.80} is no task ({TASK.pattern})", field=FIELD)
    return AdapterSpec("", _weight(weight, task), None, task)


def _one(name: Any, weight: Any, version: Any) -> AdapterSpec:
    if not isinstance(name, str) or not is_adapter_name(name):
        raise InvalidArgument(f"{name!r:.140} is no adapter name ({NAME.pattern})", field=FIELD)
    if name in RESERVED_NAMES:
        raise InvalidArgument(f"{name!r} is the base model: leave adapters out to ask it", field=FIELD)
    name = canonical_adapter(name)
    units = _weight(weight, name)
    if version is not None and (isinstance(version, bool) or not isinstance(version, int | str)):
        raise InvalidArgument(f"version of {name!r}: a number or a digest is wanted, got {version!r:.80}", field=FIELD)
    return AdapterSpec(name, units, version)


def _weight(weight: Any, of: str) -> int:
    """In 1e-6 units."""
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise InvalidArgument(f"weight of {of!r}: a number is wanted, got {weight!r:.80}", field=FIELD)
    if not abs(weight) < MAX_WEIGHT + 1 or abs(round(weight * WEIGHT_ONE)) > MAX_WEIGHT * WEIGHT_ONE:
        raise InvalidArgument(f"weight of {of!r}: at most {MAX_WEIGHT} in size, got {weight!r:.80}", field=FIELD)
    return round(weight * WEIGHT_ONE)


def _only(tree: dict[str, Any], known: set[str]) -> None:
    if unknown := next((key for key in tree if key not in known), None):
        raise InvalidArgument(f"unknown key {unknown!r:.80}, known are {sorted(known)}", field=FIELD)
