"""Where written-out adapters lie: named by their content, bounded, and gone with the engine that wrote them."""

from __future__ import annotations

import shutil
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path


class Staging:
    """A directory of this engine's own. Only for one thread."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        """What an earlier engine left in `directory` is removed."""
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True, mode=0o700)
        self._directory, self._max_bytes = directory, max_bytes
        self._sizes: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._holders: Counter[str] = Counter()

    @property
    def nbytes(self) -> int:
        return sum(self._sizes.values())

    def path(self, key: str) -> Path:
        return self._directory / key

    def hold(self, key: str, write: Callable[[Path], None]) -> Path:
        """The adapter `key`, written by `write` where it isn't there, and kept until it is released."""
        path = self.path(key)
        if key not in self._sizes:
            write(path)
            self._sizes[key] = sum(file.stat().st_size for file in path.iterdir())
        self._sizes.move_to_end(key)
        self._holders[key] += 1
        self._collect()
        return path

    def release(self, key: str) -> None:
        self._holders[key] -= 1
        self._holders += Counter()  # drops zeros
        self._collect()

    def remove(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

    def _collect(self) -> None:
        for key in [key for key in self._sizes if key not in self._holders]:
            if self.nbytes <= self._max_bytes:
                return
            shutil.rmtree(self.path(key))
            del self._sizes[key]
