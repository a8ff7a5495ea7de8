"""`/v1/models`: the base model, and the adapters and groups of adapters that a caller may use."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from openlora.adapters.catalog import AdapterFilter, AdapterRecord, CatalogReader
from openlora.adapters.routes import Group, RoutesReader
from openlora.config import RunConfig
from openlora.errors import AdapterNotFound
from openlora.serving.access import AccessPolicy

from .translate import BASE

NO_OWNER = "openlora"  # of models without a card


class ModelList:
    """Reads the catalog, which a running server's adapters come from."""

    def __init__(self, run: RunConfig, policy: AccessPolicy) -> None:
        self._run = run
        self._policy = policy
        self._started = int(time.time())
        self._catalog: CatalogReader | None = None  # opened when first asked for: it may still be in the making
        self._routes: RoutesReader | None = None  # so are these

    def entries(self, caller: str) -> list[dict[str, Any]]:
        """OpenAI's model objects: base first, then every adapter whose current version is ready, by name, then groups.

        A group is listed for those who may use one of its targets.

        Raises:
            Unavailable: there is no catalog yet.
        """
        ready = self._reader().page(AdapterFilter(status="ready", current=True)).records
        allowed = [record for record in ready if self._policy.allows(caller, record)]
        adapters = [self._adapter(record) for record in allowed]
        usable = {record.name for record in allowed}
        return [self._base(), *adapters, *(self._group(group) for group in self._groups(usable))]

    def entry(self, caller: str, name: str) -> dict[str, Any]:
        """One of them.

        Raises:
            AdapterNotFound: not among them.
        """
        if name == BASE:
            return self._base()
        with contextlib.suppress(AdapterNotFound):  # what is forbidden and what is unknown get the same words
            record = self._reader().find(name)
            if record.status == "ready" and self._policy.allows(caller, record):
                return self._adapter(record)
        for entry in self.entries(caller):  # a group is among them for those who may use a target of it
            if entry["id"] == name:
                return entry
        raise AdapterNotFound(f"no adapter {name!r:.140}")

    def _reader(self) -> CatalogReader:
        if self._catalog is None:
            self._catalog = CatalogReader(self._run.catalog_path)
        return self._catalog

    def _groups(self, usable: set[str]) -> list[Group]:
        if self._routes is None:
            self._routes = RoutesReader(self._run.catalog_path)
        groups = self._routes.groups()
        return [group for group in groups if any(one.weight and one.adapter in usable for one in group.targets)]

    def _base(self) -> dict[str, Any]:
        base = self._run.base
        return _entry(BASE, self._started, base.card, base.name, None)

    def _adapter(self, record: AdapterRecord) -> dict[str, Any]:
        return _entry(record.name, record.added_at, record.card, self._run.base.name, BASE)

    def _group(self, group: Group) -> dict[str, Any]:
        return _entry(group.name, group.changed_at, None, self._run.base.name, BASE)


def _entry(name: str, created: int, card: dict[str, Any] | None, root: str, parent: str | None) -> dict[str, Any]:
    owner = card["owner"] if card else NO_OWNER
    return {"id": name, "object": "model", "created": created, "owned_by": owner, "root": root, "parent": parent}
