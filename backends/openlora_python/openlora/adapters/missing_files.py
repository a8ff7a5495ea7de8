"""Versions whose files are not in the cache: how they come back."""

from __future__ import annotations

from .catalog_rows import AdapterRecord

MERGE_PREFIX = "merge:"  # of a merge's source in the catalog, where other adapters have what they were read from


def way_back(record: AdapterRecord) -> str:
    """What a person can do to have its files again."""
    if record.source.startswith(MERGE_PREFIX):
        return "`openlora adapters merge` makes the same ones again"
    if record.login:
        return f"they came from {record.source} by a login that isn't stored: add it again"
    return f"`openlora adapters fetch {record.name}` brings them back"


def not_fetchable(record: AdapterRecord) -> str:
    """Why no server brings back the files of an adapter that has no URI, and what a person can do."""
    return f"its files are not in the cache and came from no URI; {way_back(record)}"
