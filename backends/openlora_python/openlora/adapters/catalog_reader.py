"""The catalog as its readers see it: resolver, gateway, page and commands."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import AdapterInvalid
from .catalog_file import open_to_read
from .catalog_rows import AdapterFilter, AdapterRecord, Page, find, select_irreplaceable, select_page
from .chain_view import ChainView, read_view


class CatalogReader:
    """Thread-safe; every call sees what is committed at that moment, by whichever process."""

    def __init__(self, path: Path) -> None:
        """Raises Unavailable: there is no catalog, or it is of a newer format."""
        self._connection = open_to_read(path)
        self._lock = threading.RLock()

    def __enter__(self) -> CatalogReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """`find`, `lookup` and `chain_view` of this thread see one state of the catalog; other threads wait."""
        with self._lock:
            self._connection.execute("BEGIN")
            try:
                yield
            finally:
                self._connection.execute("COMMIT")

    def chain_view(self) -> ChainView | None:
        """The block that requests go by; None: no chain was ever followed."""
        with self._lock:
            return read_view(self._connection)

    def close(self) -> None:
        self._connection.close()

    def lookup(self, name: str, version: int | str | None = None) -> AdapterRecord:
        """The version of `name` that a request means.

        Args:
            version: a number, the first 8 or more hex digits of a digest, or None for the current one.

        Raises:
            AdapterNotFound: no such name or version, or removed.
            AdapterInvalid: quarantined; the message is the reason.
            InvalidArgument: `version` is no version, or a digest prefix that fits several versions' bytes.
        """
        record = self.find(name, version)
        if record.status != "ready":
            raise AdapterInvalid(record.reason, field=f"adapter {name}")
        return record

    def find(self, name: str, version: int | str | None = None) -> AdapterRecord:
        """As `lookup`, but quarantined ones as well."""
        with self._lock:
            return find(self._connection, name, version)

    def names(self) -> list[str]:
        """Names that answer: those whose current version is ready."""
        return [record.name for record in self.page(AdapterFilter(status="ready", current=True)).records]

    def records(self) -> list[AdapterRecord]:
        """All versions that aren't removed, by name and version."""
        return self.page().records

    def irreplaceable(self) -> set[str]:
        """Digests that a version needs and no remote source could bring again (local ones, merges, URIs
        with a login), and pinned ones.

        Quarantined ones too: another base model may make them ready.
        """
        with self._lock:
            return select_irreplaceable(self._connection)

    def page(self, wanted: AdapterFilter | None = None, after: str = "", limit: int | None = None) -> Page:
        """The versions that are `wanted` (None: all) of at most `limit` names (None: all) that sort after `after`."""
        with self._lock, self._connection:
            self._connection.execute("BEGIN")  # both queries of a page see the same
            return select_page(self._connection, wanted or AdapterFilter(), after, limit)
