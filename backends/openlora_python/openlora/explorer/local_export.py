"""The log of this machine as settlement reads one: what an export directory holds, without writing it first."""

from __future__ import annotations

from collections.abc import Iterator

from ..attribution.log import ReceiptLog

_PAGE = 1024


class LocalExport:
    """A log that is open for reading, up to the size that it has now."""

    def __init__(self, log: ReceiptLog) -> None:
        self.key = log.key
        self.size = log.size()
        self._log = log

    def leaves(self, start: int, stop: int) -> Iterator[bytes]:
        """The leaves of receipts [start, stop)."""
        for first in range(start, stop, _PAGE):
            for one in self._log.list(first, min(_PAGE, stop - first)):
                yield one.leaf

    def signature(self, index: int) -> bytes | None:
        """Of receipt `index`."""
        found = self._log.get(index)
        return found.signature if found else None

    def blob(self, sha256: bytes) -> bytes | None:
        """What was hashed to this."""
        return self._log.blob(sha256)
