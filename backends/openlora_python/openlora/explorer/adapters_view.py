"""What the page shows of the catalog: adapters that anybody may know of. The name of any other is not told.

Who may know of an adapter is said by its card and by the settings of the server that runs on the state directory. While
none runs, nobody can say, and no names are told.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters.catalog_reader import CatalogReader
from ..adapters.catalog_rows import AdapterRecord
from ..config import RunConfig
from ..serving.access.policy import ANONYMOUS, AccessPolicy


@dataclass(frozen=True)
class _Known:
    versions: tuple[int, int]  # of the catalog's content, and of the run
    adapters: tuple[dict[str, Any], ...]  # by name, the current version first
    names: Mapping[str, str]  # by digest


_NOTHING = _Known((-1, 0), (), {})


class AdaptersView:
    """The catalog of one state directory, read again when it has changed. Thread-safe."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._path = state_dir / "catalog.sqlite"
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._known = _NOTHING

    def page(self, wanted: str, after: int, limit: int) -> dict[str, Any]:
        """Up to `limit` versions from place `after` on whose name or digest has `wanted` in it."""
        wanted = wanted.lower()
        adapters = self._read().adapters
        found = [one for one in adapters if wanted in one["name"].lower() or wanted in one["digest"]]
        more = after + limit if after + limit < len(found) else None
        page = {"adapters": found[after : after + limit], "count": len(found), "after": more}
        return page | {"running": self._run() > 0}

    def names(self) -> Mapping[str, str]:
        """The name of each digest that has one that may be told."""
        return self._read().names

    def _run(self) -> int:
        """When the run of the server that lives here began, in ns; 0 = none runs."""
        try:
            return (self._state_dir / "run" / "run.json").stat().st_mtime_ns
        except OSError:
            return 0

    def _read(self) -> _Known:
        run = self._run()
        if not run or not self._path.is_file():
            return _NOTHING
        with self._lock:
            if self._connection is None:
                self._connection = sqlite3.connect(self._path, timeout=10.0, check_same_thread=False)
                self._connection.execute("PRAGMA query_only = ON")
            (content,) = self._connection.execute("PRAGMA data_version").fetchone()
            if (content, run) != self._known.versions:
                self._known = self._load((content, run))
            return self._known

    def _load(self, versions: tuple[int, int]) -> _Known:
        try:
            policy = AccessPolicy(RunConfig.load(self._state_dir / "run"))
        except (OSError, ValueError):  # it is being written, or was just removed
            return _NOTHING
        with closing(policy), CatalogReader(self._path) as reader:
            told = [record for record in reader.records() if policy.allows(ANONYMOUS, record)]
        told.sort(key=lambda record: (record.name, not record.current, -record.version))
        names = {record.digest: record.name for record in reversed(told) if record.digest}
        return _Known(versions, tuple(_shown(record) for record in told), names)


def _shown(record: AdapterRecord) -> dict[str, Any]:
    card = record.card or {}
    prices = card.get("prices") or {}
    return {
        "name": record.name,
        "version": record.version,
        "current": record.current,
        "digest": record.digest,
        "status": record.status,
        "rank": record.rank,
        "owner": card.get("owner"),
        "licence": card.get("licence"),
        "description": card.get("description", ""),
        "price_input": str(prices.get("input", 0)),
        "price_output": str(prices.get("output", 0)),
        "datasets": [
            {"id": one["id"], "licence": one["licence"], "ppm": one["share_ppm"]} for one in card.get("datasets", ())
        ],
    }
