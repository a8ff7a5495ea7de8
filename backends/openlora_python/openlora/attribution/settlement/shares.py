"""Whom one receipt's price goes to: exact fractions, then integers that sum to 10^9. docs/settlement.md, 4."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from fractions import Fraction

from ...network.parameters import Parameters
from ..blobs import WHOLE_PPM, ModelTerms, TermsBlob
from .registry import account

WHOLE_SHARE = 10**9

Shares = dict[bytes, int]
"""By account (20 bytes); they sum to 10^9, and none is zero."""


def shares(terms: TermsBlob, weights: Sequence[int], parameters: Parameters, payee: str) -> Shares:
    """The shares of a receipt: `weights` in the order of the terms' adapters, `payee` of the log's node."""
    fractions: defaultdict[bytes, Fraction] = defaultdict(Fraction)
    for who, fraction in _fractions(terms, weights, parameters, payee):
        fractions[who] += fraction
    return largest_remainder(fractions)


def largest_remainder(fractions: dict[bytes, Fraction]) -> Shares:
    """Integers that sum to 10^9 from fractions that sum to 1; at equal remainders the lower address gets one more."""
    whole = {who: WHOLE_SHARE * part.numerator // part.denominator for who, part in fractions.items()}
    left = WHOLE_SHARE - sum(whole.values())
    by_remainder = sorted(fractions, key=lambda who: (whole[who] - WHOLE_SHARE * fractions[who], who))
    for who in by_remainder[:left]:
        whole[who] += 1
    return {who: share for who, share in whole.items() if share}


def _fractions(
    terms: TermsBlob, weights: Sequence[int], parameters: Parameters, payee: str
) -> Iterator[tuple[bytes, Fraction]]:
    base = account(terms.base.owner)
    yield account(parameters.platform), Fraction(parameters.platform_ppm, WHOLE_PPM)
    yield account(payee), Fraction(parameters.node_ppm, WHOLE_PPM)
    yield base, Fraction(parameters.base_ppm, WHOLE_PPM)
    adapter_part = Fraction(parameters.adapter_ppm, WHOLE_PPM)
    data_part = Fraction(parameters.data_ppm, WHOLE_PPM)
    total = sum(abs(weight) for weight in weights)
    if total == 0:
        yield base, adapter_part
        yield from _data(terms.base, data_part)
        return
    for adapter, weight in zip(terms.adapters, weights, strict=True):
        by_weight = Fraction(abs(weight), total)
        yield account(adapter.owner), adapter_part * by_weight
        yield from _data(adapter, data_part * by_weight)


def _data(model: ModelTerms, part: Fraction) -> Iterator[tuple[bytes, Fraction]]:
    """A part of the price by the declared data sets of a model; without any, to its owner."""
    if not model.datasets:
        yield account(model.owner), part
    for dataset in model.datasets:
        for contributor in dataset.contributors:
            yield account(contributor.address), part * Fraction(dataset.ppm * contributor.ppm, WHOLE_PPM**2)
