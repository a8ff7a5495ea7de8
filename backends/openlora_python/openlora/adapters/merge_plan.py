"""What a merge is: weighted sources, a method and its settings; the key that names it, the record that travels with it.

The record lies in the header of the merged weights, so the merged adapter's own digest covers it. It says whose work
the new weights are. Anyone who holds the sources can compute the merge again and compare digests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Literal

import msgspec
import rfc8785
from msgspec import Meta
from pydantic import Field

from ..engine.api import WEIGHT_ONE
from ..errors import InvalidArgument

KEY_DOMAIN = b"openlora/merge/v1"
RECORD_KEY = "openlora_merge"  # in the metadata of the merged safetensors file
MAX_SOURCES = 8  # as in a request
MAX_SEED = 2**53 - 1  # RFC 8785 writes larger integers as rounded doubles

MajoritySign = Literal["total", "frequency"]
Digest = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]


@dataclass(frozen=True)
class MergeMethod:
    """What there is to know of a method without its arithmetic, which is in `merge_methods`.

    `space`: what it combines. `rows` = the ranks of all sources side by side; `factors` = A with A and B with B, which
    needs equal ranks; `low_rank` and `dense` = the full change of the weights, cut down to a rank again.
    """

    space: Literal["rows", "factors", "low_rank", "dense"]
    settings: frozenset[str]
    summary: str


METHODS: Mapping[str, MergeMethod] = MappingProxyType(
    {
        "cat": MergeMethod("rows", frozenset(), "the exact weighted sum; ranks add up"),
        "linear": MergeMethod("factors", frozenset(), "sums of A and of B: a rough approximation of the weighted sum"),
        "svd": MergeMethod("low_rank", frozenset({"rank"}), "the nearest adapter of a rank to the weighted sum"),
        "ties": MergeMethod(
            "factors", frozenset({"density", "majority_sign"}), "largest entries, elected signs, on A and B"
        ),
        "ties_svd": MergeMethod(
            "dense", frozenset({"density", "majority_sign", "rank"}), "ties on the full change, cut down to a rank"
        ),
        "dare_linear": MergeMethod(
            "factors", frozenset({"density", "seed"}), "random entries, rescaled and summed, on A and B"
        ),
        "dare_ties": MergeMethod(
            "factors", frozenset({"density", "majority_sign", "seed"}), "random entries, elected signs, on A and B"
        ),
        "magnitude_prune": MergeMethod("factors", frozenset({"density"}), "largest entries, summed, on A and B"),
    }
)


class MergeSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One adapter that goes into a merge. `weight` is in 1e-6 units."""

    digest: Digest
    weight: Annotated[int, Meta(ge=-10_000_000, le=10_000_000)]


class MergePlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that decides the merged bytes; None = the method has no such setting (or `rank`: not asked for).

    The order of the sources counts: `cat` stacks them in it, DARE draws its masks in it.
    """

    sources: Annotated[tuple[MergeSource, ...], Meta(min_length=1, max_length=MAX_SOURCES)]
    method: str
    density: Annotated[int, Meta(gt=0, le=WEIGHT_ONE)] | None = None  # part of the entries that stays, 1e-6 units
    majority_sign: MajoritySign | None = None
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED)] | None = None
    rank: Annotated[int, Meta(gt=0)] | None = None
    schema: Literal[1] = 1  # changes whenever the arithmetic does

    @classmethod
    def of(
        cls,
        sources: Sequence[MergeSource],
        method: str = "cat",
        *,
        density: float | None = None,
        majority_sign: str | None = None,
        seed: int | None = None,
        rank: int | None = None,
    ) -> MergePlan:
        """A plan that is checked and complete: `majority_sign` is total and `seed` 0 where the method has them.

        Raises:
            InvalidArgument: for an unknown method, a setting that it doesn't have or lacks, and values out of range.
        """
        known = METHODS.get(method)
        if known is None:
            raise InvalidArgument(f"{method!r:.80} is none of {', '.join(METHODS)}", field="method")
        given = {"density": density, "majority_sign": majority_sign, "seed": seed, "rank": rank}
        for name, value in given.items():
            if value is not None and name not in known.settings:
                raise InvalidArgument(f"has no meaning for method {method!r}", field=name)
        if "density" in known.settings and density is None:
            raise InvalidArgument(f"{method!r} needs one: the part of the entries that stays, 0 to 1", field="density")
        if density is not None and not (0 < density <= 1 and round(density * WEIGHT_ONE) > 0):
            raise InvalidArgument(f"above 0 and at most 1 is wanted, got {density!r}", field="density")
        if majority_sign not in (None, "total", "frequency"):
            raise InvalidArgument(f"'total' or 'frequency' is wanted, got {majority_sign!r:.40}", field="majority_sign")
        if seed is not None and not 0 <= seed <= MAX_SEED:
            raise InvalidArgument(f"0 to {MAX_SEED} is wanted, got {seed}", field="seed")
        if rank is not None and rank < 1:
            raise InvalidArgument(f"at least 1 is wanted, got {rank}", field="rank")
        _check_sources(sources)
        return cls(
            tuple(sources),
            method,
            None if density is None else round(density * WEIGHT_ONE),
            majority_sign or ("total" if "majority_sign" in known.settings else None),
            seed if seed is not None or "seed" not in known.settings else 0,
            rank,
        )

    @property
    def record(self) -> bytes:
        """JCS (RFC 8785) of all fields: what is written into the merged adapter."""
        return rfc8785.dumps(msgspec.to_builtins(self))

    @property
    def key(self) -> str:
        """SHA-256(`openlora/merge/v1` ‖ record), 64 hex digits: equal keys are equal merges."""
        return hashlib.sha256(KEY_DOMAIN + self.record).hexdigest()


def _check_sources(sources: Sequence[MergeSource]) -> None:
    if not 1 <= len(sources) <= MAX_SOURCES:
        raise InvalidArgument(f"1 to {MAX_SOURCES} are wanted, got {len(sources)}", field="adapters")
    digests = [source.digest for source in sources]
    if repeated := next((digest for digest in digests if digests.count(digest) > 1), None):
        raise InvalidArgument(f"two of the names are the same adapter, {repeated[:16]}…", field="adapters")
    if unused := next((source for source in sources if source.weight == 0), None):
        raise InvalidArgument(f"the weight of {unused.digest[:16]}… is zero: leave it out", field="adapters")


def read_record(text: str) -> MergePlan:
    """The plan in a merged adapter's header.

    Raises:
        InvalidArgument: when it isn't one.
    """
    try:
        plan = msgspec.json.decode(text, type=MergePlan)
    except msgspec.DecodeError as error:
        raise InvalidArgument(str(error), field="merge record") from error
    if plan.method not in METHODS:
        raise InvalidArgument(f"method {plan.method!r:.80} is not known", field="merge record")
    return plan


Positive = Annotated[int, Field(gt=0)]


@dataclass(frozen=True)
class MergeLimits:
    """What merging may take of this node: `merge` of the settings."""

    __pydantic_config__ = {"extra": "forbid"}

    max_adapters: Positive = 64  # different merged adapters in one catalog
    max_bytes: Positive = 16 << 30  # of their weights
    max_memory_bytes: Positive = 8 << 30  # of one merge at work
    max_cpu_seconds: Positive = 7200  # of one merge
