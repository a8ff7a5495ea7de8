"""From what a request names to one adapter version: groups and task tags.

Nothing here judges access or readiness: `Pin` does, for each target as if the request had named it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..adapters.adapter_spec import FIELD, AdapterSpec
from ..adapters.catalog_rows import AdapterRecord
from ..adapters.routes import Group, RoutesReader
from ..errors import AdapterInvalid, AdapterNotFound, InvalidArgument, Unavailable

Pin = Callable[[AdapterSpec], AdapterRecord]
"""The version that a name means for this caller; AdapterNotFound, in the same words, if it may not know of it.
Unavailable, whoever asks and whatever there is, when that can't be told now."""
Knows = Callable[[AdapterSpec], bool]
"""Whether the caller may know of an adapter by what was known of it last."""

LISTED_NAMES = 8


class Router:
    """Follows the routes of the catalog file, as the CLI changes them."""

    def __init__(self, catalog_path: Path) -> None:
        self._routes = RoutesReader(catalog_path)

    def pin(self, spec: AdapterSpec, key: str, pin: Pin, knows: Knows) -> AdapterRecord:
        """The one adapter version that `spec` gets.

        Args:
            key: decides among a group's targets; requests with the same one get the same.

        Raises:
            AdapterNotFound: nothing by that name or for that task that this caller may use.
            AdapterInvalid: quarantined.
            InvalidArgument: several adapters are for that task.
            Unavailable: it can't be told now; of what is behind a group or a task, only to who may know of it.
        """
        if spec.task is not None:
            return self._for_task(spec.task, spec.weight, pin, knows)
        group = None if spec.version is not None else self._routes.group(spec.name)
        return pin(spec) if group is None else self._from_group(group, spec, key, pin, knows)

    def _from_group(self, group: Group, spec: AdapterSpec, key: str, pin: Pin, knows: Knows) -> AdapterRecord:
        invalid: AdapterInvalid | Unavailable | None = None
        for target in group.preference(key):
            meant = AdapterSpec(target.adapter, spec.weight, target.version)
            try:
                return pin(meant)
            except AdapterNotFound:
                pass
            except AdapterInvalid as error:
                invalid = error
            except Unavailable as error:
                invalid = error if knows(meant) else invalid
            if not group.skip_unready:
                break
        if invalid is not None:
            raise invalid
        return pin(spec)  # no adapter has a group's name: the very words for a name that doesn't exist

    def _for_task(self, task: str, weight: int, pin: Pin, knows: Knows) -> AdapterRecord:
        preferred, names = self._routes.for_task(task)
        found: list[AdapterRecord] = []
        for name in names:
            meant = AdapterSpec(name, weight, None)
            try:
                record = pin(meant)
            except (AdapterNotFound, AdapterInvalid):
                continue
            except Unavailable:
                if knows(meant):
                    raise
                continue
            if task in (record.card or {}).get("tasks", ()):
                found.append(record)
                if name == preferred or len(found) > LISTED_NAMES:
                    break
        if not found:
            raise AdapterNotFound(f"no adapter for the task {task!r}")
        if len(found) > 1:
            listed = ", ".join(record.name for record in found[:LISTED_NAMES])
            more = " and more" if len(found) > LISTED_NAMES else ""
            raise InvalidArgument(f"several adapters are for the task {task!r}: {listed}{more}; name one", field=FIELD)
        return found[0]
