"""Who has earned what, and what was void, computed here from this machine's log and the chain's facts.

The same function as in `openlora settle`: the page shows what this node can recompute, not what somebody claims.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eth_utils import to_checksum_address

from ..attribution.settlement.books import Books, keep_prefixes, open_books
from ..attribution.settlement.facts import ChainFacts
from ..attribution.settlement.judge import Export, Headers
from ..attribution.settlement.prefix_store import PrefixStore
from ..attribution.settlement.reward_tree import RewardTree

Range = tuple[str, int, int]
"""Log id (hex), first receipt, and the one behind the last."""


@dataclass(frozen=True)
class Accounts:
    """What could be computed."""

    earned: Mapping[str, int]  # cumulative, by checksummed address
    tree: RewardTree
    root: bytes  # the accepted one
    voids: Mapping[Range, Mapping[str, int]]  # receipts by reason, of the ranges that epochs settle
    notes: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether these amounts give the root that was accepted on chain."""
        return self.tree.root == self.root


@dataclass
class Accountant:
    """Computes accounts again and again; what was judged once is kept in `directory`."""

    directory: Path
    _voids: dict[Range, Mapping[str, int]] = field(default_factory=dict)

    def compute(
        self, facts: ChainFacts, exports: Sequence[Export], ranges: Sequence[Range], headers: Headers | None = None
    ) -> Accounts:
        """The accounts at the settled sizes. InvalidArgument: they can't be computed here, and why."""
        store = PrefixStore(self.directory)
        books = open_books(exports, facts, headers, store)
        for one in ranges:
            if one not in self._voids and (counted := _count_voids(books, one)) is not None:
                self._voids[one] = counted
        keep_prefixes(books, exports, store)
        tree, amounts = books.reward_tree()
        earned = {to_checksum_address(who): amount for who, amount in amounts.items()}
        return Accounts(earned, tree, books.state.root, dict(self._voids), tuple(books.notes))


def _count_voids(books: Books, wanted: Range) -> dict[str, int] | None:
    """None: the range was not judged."""
    log_id, start, stop = wanted
    judged = books.logs.get(bytes.fromhex(log_id))
    if judged is None or not judged.start <= start < stop <= judged.judged:
        return None
    reasons = Counter(judged.reason_at(index) for index in range(start, stop))
    return {reason: count for reason, count in reasons.most_common() if reason is not None}
