"""Adapters of chosen sizes for a `Residency`, made when they are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from openlora.engine.adapter_block import Adapter, AdapterLayout, LoraShape, Member, make_layout
from openlora.errors import AdapterInvalid

FEATURES = 16


def layout_of(rank: int) -> AdapterLayout:
    return make_layout([[Member("q", 0, FEATURES)]], {"q": LoraShape(rank, FEATURES, 1.0)}, torch.float32, strips=False)


class AdapterStore:
    """Opens any digest: an adapter of the rank that `ranks` says (1 where it says nothing), or none while it is
    `broken`. `opened` and `read` count."""

    def __init__(self, ranks: dict[str, int] | None = None) -> None:
        self.ranks = ranks or {}
        self.broken: set[str] = set()
        self.opened: Counter[str] = Counter()
        self.read: Counter[str] = Counter()

    def size(self, digest: str) -> int:
        return layout_of(self.ranks.get(digest, 1)).nbytes

    @contextmanager
    def open(self, digest: str, path: str) -> Iterator[OpenedAdapter]:
        self.opened[digest] += 1
        if digest in self.broken:
            raise AdapterInvalid(f"adapter {digest}: broken")
        yield OpenedAdapter(self, digest)


class OpenedAdapter:
    def __init__(self, store: AdapterStore, digest: str) -> None:
        self._store, self._digest = store, digest
        self.nbytes = store.size(digest)

    def read(self) -> Adapter:
        self._store.read[self._digest] += 1
        layout = layout_of(self._store.ranks.get(self._digest, 1))
        return Adapter(self._digest, layout, layout.allocate())
