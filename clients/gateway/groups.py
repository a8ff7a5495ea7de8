"""Groups of adapters among `/v1/models`: listed for whoever may use one of their targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from openlora.adapters.routes import Group, RoutesReader
from openlora.config import RunConfig

from .models import NO_OWNER
from .translate import BASE

MayUse = Callable[[str], bool]
"""Whether the caller may use the adapter of that name, and it is ready."""


class GroupList:
    """Follows `openlora routes` on a running server."""

    def __init__(self, run: RunConfig) -> None:
        self._run = run
        self._routes: RoutesReader | None = None  # opened when first asked for: the catalog may be in the making

    def entries(self, may_use: MayUse) -> list[dict[str, Any]]:
        """OpenAI's model objects, by name.

        Raises:
            Unavailable: there is no catalog yet.
        """
        return [self._entry(group) for group in self._reader().groups() if _is_open(group, may_use)]

    def entry(self, name: str, may_use: MayUse) -> dict[str, Any] | None:
        """One of them; None = not among them."""
        group = self._reader().group(name)
        return self._entry(group) if group is not None and _is_open(group, may_use) else None

    def _reader(self) -> RoutesReader:
        if self._routes is None:
            self._routes = RoutesReader(self._run.catalog_path)
        return self._routes

    def _entry(self, group: Group) -> dict[str, Any]:
        return {
            "id": group.name,
            "object": "model",
            "created": group.changed_at,
            "owned_by": NO_OWNER,
            "root": self._run.base.name,
            "parent": BASE,
        }


def _is_open(group: Group, may_use: MayUse) -> bool:
    return any(target.weight and may_use(target.adapter) for target in group.targets)
