"""From the adapters of a request to the one adapter that the engine is told of, under an id that never means another.

Engines keep weights and cached prefixes by id for as long as they live. So each (adapter, version), and each weighted
sum, has an id of its own that is never given again; when there have been too many, the engine's life is over.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import Overloaded
from ..api import WEIGHT_ONE, AdapterUse
from .base_shapes import BaseShapes
from .ensemble import concatenate, write_adapter
from .options import OneAdapterOptions
from .peft_files import PeftAdapter, read_adapter
from .rank_sum import check_rank_sum
from .staging import Staging

RETRY_AFTER_MS = 5000  # until a new engine may be there
_KEPT_FACTS = 8192


class LifeSpent(Overloaded):
    """This engine has given out all the ids, or written all the sums, that one life may have."""


@dataclass(frozen=True)
class PlacedAdapter:
    """What the engine is told: `name` and `number` mean these bytes for as long as it lives."""

    number: int
    name: str
    path: str
    staged: bool


@dataclass(frozen=True)
class _Facts:
    rank: int
    plain: bool


@dataclass
class PlacingCounts:
    first_uses: int = 0
    later_uses: int = 0
    failed: int = 0
    read_seconds: float = 0.0


class Placing:
    """Checks adapters before their first use, writes sums of them, gives ids. Only for one thread: it reads disks."""

    def __init__(
        self, shapes: BaseShapes, dtype: str, max_rank: int, options: OneAdapterOptions, staging: Staging
    ) -> None:
        self._shapes, self._dtype, self._max_rank, self._options = shapes, dtype, max_rank, options
        self._staging = staging
        self._numbers: dict[str, int] = {}  # by name; a number is the name's place in the order of first uses
        self._ensembles: set[str] = set()
        self._facts: OrderedDict[str, _Facts] = OrderedDict()  # of adapters that passed the check, by digest
        self.counts = PlacingCounts()

    @property
    def ids(self) -> int:
        """Given out so far."""
        return len(self._numbers)

    def place(self, uses: Sequence[AdapterUse]) -> PlacedAdapter | None:
        """The one adapter that `uses` make; None = the base model. `release` it when its request is over.

        Raises:
            AdapterInvalid, Unavailable: of an adapter that can't be used.
            InvalidArgument: the ranks add up to too much.
            LifeSpent: it would need an id, or a sum, too many.
        """
        if not uses:
            return None
        started = time.monotonic()
        try:
            facts = [self._checked(use) for use in uses]
        except Exception:
            self.counts.failed += 1
            raise
        check_rank_sum([one.rank for one in facts], self._max_rank)
        staged = not (len(uses) == 1 and uses[0].weight == WEIGHT_ONE and facts[0].plain)
        name = _name(uses) if staged else uses[0].digest
        number = self._number(name, staged)
        path = Path(uses[0].path)
        if staged:
            path = self._staging.hold(name, lambda target: self._write(uses, target))
        if name in self._numbers:
            self.counts.later_uses += 1
        else:
            self._numbers[name] = number
            self.counts.first_uses += 1
            self.counts.read_seconds += time.monotonic() - started
            if staged:
                self._ensembles.add(name)
        return PlacedAdapter(number, name, str(path), staged)

    def release(self, placed: PlacedAdapter) -> None:
        if placed.staged:
            self._staging.release(placed.name)

    def _checked(self, use: AdapterUse) -> _Facts:
        if (facts := self._facts.get(use.digest)) is not None:
            self._facts.move_to_end(use.digest)
            return facts
        adapter = self._read(use)
        facts = self._facts[use.digest] = _Facts(adapter.rank, adapter.plain)
        if len(self._facts) > _KEPT_FACTS:
            self._facts.popitem(last=False)
        return facts

    def _read(self, use: AdapterUse) -> PeftAdapter:
        return read_adapter(use.digest, use.path, self._shapes, self._dtype, self._max_rank)

    def _number(self, name: str, staged: bool) -> int:
        """From 1 on: clients of Triton take 0 for none."""
        if (number := self._numbers.get(name)) is not None:
            return number
        if len(self._numbers) >= self._options.max_adapter_ids:
            raise LifeSpent(
                f"this engine has used {self._options.max_adapter_ids} adapters and is being replaced",
                retry_after_ms=RETRY_AFTER_MS,
            )
        if staged and len(self._ensembles) >= self._options.max_ensembles:
            raise LifeSpent(
                f"this engine has made {self._options.max_ensembles} weighted adapters and is being replaced",
                retry_after_ms=RETRY_AFTER_MS,
            )
        return len(self._numbers) + 1

    def _write(self, uses: Sequence[AdapterUse], target: Path) -> None:
        write_adapter(concatenate([(self._read(use), use.weight) for use in _ordered(uses)]), target)


def _ordered(uses: Sequence[AdapterUse]) -> list[AdapterUse]:
    """A sum is the same in any order."""
    return sorted(uses, key=lambda use: (use.digest, use.weight))


def _name(uses: Sequence[AdapterUse]) -> str:
    content = json.dumps([[use.digest, use.weight] for use in _ordered(uses)])
    return hashlib.sha256(b"openlora/cat/v1" + content.encode()).hexdigest()
