"""Whether the export's leaves are those that were anchored, at every anchor. docs/settlement.md, 3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..merkle_tree import Frontier
from ..receipt import leaf_hash
from .chain_state import Anchor
from .judge import Export

Advance = Callable[[int], None]
"""Told how many more leaves are done."""

_STEP = 4096


class StoredFrontier(Frontier):
    """A tree's right edge that can be put away and taken up again."""

    @property
    def peaks(self) -> tuple[bytes, ...]:
        return tuple(self._peaks)

    @classmethod
    def at(cls, size: int, peaks: Sequence[bytes]) -> StoredFrontier:
        frontier = cls()
        frontier.size = size
        frontier._peaks = list(peaks)
        return frontier

    def extend(self, export: Export, size: int, advance: Advance = lambda count: None) -> None:
        """Take the export's next leaves, until there are `size`."""
        for start in range(self.size, size, _STEP):
            stop = min(start + _STEP, size)
            for leaf in export.leaves(start, stop):
                self.append(leaf_hash(leaf))
            advance(stop - start)


@dataclass(frozen=True)
class History:
    """The last good anchored size, and what is wrong behind it."""

    good_size: int
    fault: str | None


def check_history(
    export: Export, anchors: Sequence[Anchor], frontier: StoredFrontier, advance: Advance = lambda count: None
) -> History:
    """Compare the root at every anchored size from the frontier's on; what is before it has been checked."""
    good = max((anchor.size for anchor in anchors if anchor.size < frontier.size), default=0)
    for anchor in anchors:
        if anchor.size < frontier.size:
            continue
        if anchor.size > export.size:
            return History(good, f"anchored at {anchor.size} receipts, the export has {export.size}")
        frontier.extend(export, anchor.size, advance)
        if frontier.root() != anchor.root:
            return History(
                good,
                f"history rewritten: the first {anchor.size} receipts have the root {frontier.root().hex()}, "
                f"anchored in block {anchor.block} was {anchor.root.hex()}",
            )
        good = anchor.size
    return History(good, None)
