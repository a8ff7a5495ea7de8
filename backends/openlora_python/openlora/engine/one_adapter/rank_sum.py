"""The one rule for how much may be added up: an ensemble is one adapter whose rank is the sum of its members'."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import InvalidArgument


def check_rank_sum(ranks: Sequence[int], max_rank: int) -> None:
    """Raises InvalidArgument when adapters of `ranks` together are too large for an engine of `max_rank`."""
    if len(ranks) > 1 and sum(ranks) > max_rank:
        told = " + ".join(map(str, ranks))
        raise InvalidArgument(
            f"ranks {told} make {sum(ranks)}, at most {max_rank} fit into one adapter of this engine", field="adapters"
        )
