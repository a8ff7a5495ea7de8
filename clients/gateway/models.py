"""`/v1/models`: the base model, and the adapters that a caller may use."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from openlora.adapters.catalog_reader import CatalogReader
from openlora.adapters.catalog_rows import AdapterFilter, AdapterRecord
from openlora.adapters.chain_view import CHAIN_ORIGIN
from openlora.config import RunConfig
from openlora.errors import AdapterNotFound
from openlora.serving.access.policy import AccessPolicy
from openlora.serving.chain import ServedChain

from .translate import BASE

NO_OWNER = "openlora"  # of models without a card


class ModelList:
    """Reads the catalog, which a running server's adapters come from."""

    def __init__(self, run: RunConfig, policy: AccessPolicy, chain: ServedChain | None = None) -> None:
        self._run = run
        self._chain = chain
        self._policy = policy
        self._started = int(time.time())
        self._catalog: CatalogReader | None = None  # opened when first asked for: it may still be in the making

    def entries(self, caller: str) -> list[dict[str, Any]]:
        """OpenAI's model objects: base first, then every adapter whose current version is ready, by name.

        Raises:
            Unavailable: there is no catalog yet.
        """
        ready = self._reader().page(AdapterFilter(status="ready", current=True)).records
        allowed = [record for record in ready if self._may_use(caller, record)]
        return [self._base(), *(self._adapter(record) for record in allowed)]

    def entry(self, caller: str, name: str) -> dict[str, Any]:
        """One of them.

        Raises:
            AdapterNotFound: not among them.
        """
        if name == BASE:
            return self._base()
        with contextlib.suppress(AdapterNotFound):  # what is forbidden and what is unknown get the same words
            record = self._reader().find(name)
            if record.status == "ready" and self._may_use(caller, record):
                return self._adapter(record)
        raise AdapterNotFound(f"no adapter {name!r:.140}")

    def _may_use(self, caller: str, record: AdapterRecord) -> bool:
        if record.origin == CHAIN_ORIGIN:
            reader = self._reader()
            if self._chain is None or not self._chain.grants(self._chain.view(reader)):
                return False
        return self._policy.allows(caller, record)

    def _reader(self) -> CatalogReader:
        if self._catalog is None:
            self._catalog = CatalogReader(self._run.catalog_path)
        return self._catalog

    def _base(self) -> dict[str, Any]:
        base = self._run.base
        return _entry(BASE, self._started, base.card, base.name, None)

    def _adapter(self, record: AdapterRecord) -> dict[str, Any]:
        return _entry(record.name, record.added_at, record.card, self._run.base.name, BASE)


def _entry(name: str, created: int, card: dict[str, Any] | None, root: str, parent: str | None) -> dict[str, Any]:
    owner = card["owner"] if card else NO_OWNER
    return {"id": name, "object": "model", "created": created, "owned_by": owner, "root": root, "parent": parent}
