"""Draws: temperature, filters with vLLM's meaning and order, and Gumbel-max, argmaxₜ(log pₜ + Gₜ).

A filter keeps few tokens of a vocabulary, so what can't be kept is dropped by a threshold first, and only the rest is
sorted and given noise. All of it is per row: neighbours change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .api import Sampling
from .noise import gumbel_noise, gumbel_noise_at

_CHUNKS_PER_K = 8
_SMALLEST = float(np.finfo(np.float32).tiny)
_HALF, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)
_NOTHING = np.uint64(0x7F800000 << 32)  # a score of -inf


@dataclass(frozen=True)
class Kept:
    """What filters leave of each row, most likely first, equal ones by token id; places beyond it are -inf."""

    token_ids: np.ndarray  # [rows, most]
    scores: np.ndarray  # [rows, most] float32


def draw(scores: np.ndarray, settings: Sequence[Sampling], positions: Sequence[int]) -> np.ndarray:
    """One token for each row of `scores` `[rows, vocab]` (float32; -inf is impossible, every row has a finite one).

    `scores` is used up. `positions` are the output positions of the tokens. Order: temperature → `min_p` → `top_k` →
    `top_p`.
    """
    temperatures = np.array([max(one.temperature, _SMALLEST) for one in settings], dtype=np.float32)
    scores -= scores.max(axis=1, keepdims=True)  # first, so that no temperature, however small, can overflow
    if (temperatures != 1).any():
        with np.errstate(over="ignore"):
            scores /= temperatures[:, None]
    vocab = scores.shape[1]
    filtered = np.array([one.min_p > 0 or one.top_p < 1 or 0 < one.top_k < vocab for one in settings])
    token_ids = np.empty(len(settings), dtype=np.int64)
    for row in np.flatnonzero(~filtered):
        token_ids[row] = (scores[row] + gumbel_noise(settings[row].seed, positions[row], vocab)).argmax()
    rows = np.flatnonzero(filtered)
    if len(rows):
        chosen = [settings[row] for row in rows]
        kept = filter_scores(
            scores if len(rows) == len(scores) else scores[rows],
            min_p=[one.min_p for one in chosen],
            top_k=[one.top_k for one in chosen],
            top_p=[one.top_p for one in chosen],
        )
        noisy = kept.scores.astype(np.float64)
        places = np.nonzero(noisy > -np.inf)
        noisy[places] += gumbel_noise_at(
            [one.seed for one in chosen], [positions[row] for row in rows], places[0], kept.token_ids[places], vocab
        )
        token_ids[rows] = np.take_along_axis(kept.token_ids, noisy.argmax(axis=1)[:, None], axis=1)[:, 0]
    return token_ids


def filter_scores(scores: np.ndarray, *, min_p: Sequence[float], top_k: Sequence[int], top_p: Sequence[float]) -> Kept:
    """What the filters leave of `scores` `[rows, vocab]`, whose largest is 0 in each row; one value per row.

    `min_p` keeps p ≥ min_p · max p; `top_k` keeps the k largest (and ties); `top_p` the smallest set of most likely
    tokens whose probability, after the other two, reaches top_p. 0, 0 and 1 keep everything.
    """
    vocab = scores.shape[1]
    least = np.array(min_p)
    nucleus = np.array(top_p)
    largest = np.array([k if 0 < k < vocab else vocab for k in top_k])
    floors, totals = _floors(scores, least, largest, nucleus)
    kept = _above(scores, floors)
    last = np.minimum(largest, kept.scores.shape[1]) - 1
    removed = kept.scores < np.take_along_axis(kept.scores, last[:, None], axis=1)
    weights = np.exp(kept.scores, dtype=np.float64)
    weights[removed] = 0
    before = weights.cumsum(axis=1) - weights  # of the tokens more likely than this one
    totals = np.where(np.isnan(totals), weights.sum(axis=1), totals)
    # 1 means everything, whatever the rounding of the sum; the most likely token always stays
    surplus = (before >= (nucleus * totals)[:, None]) & (nucleus < 1)[:, None]
    surplus[:, 0] = False
    kept.scores[removed | surplus] = -np.inf
    return kept


def _floors(
    scores: np.ndarray, min_p: np.ndarray, top_k: np.ndarray, top_p: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A score for each row below which nothing is kept, and the row's Σ exp where that drops a part of it (else NaN).

    For top_k: the k-th largest of the maxima of chunks is at most the k-th largest score. For top_p alone: tokens less
    likely than (1 − top_p) / vocab are, together, less than what top_p may leave out; half of that allows for rounding.
    """
    rows, vocab = scores.shape
    floors = np.full(rows, -np.inf)
    totals = np.full(rows, np.nan)
    proportional, narrow = min_p > 0, top_k < vocab
    floors[proportional] = np.log(min_p[proportional])
    if narrow.any():
        width = max(1, vocab // (_CHUNKS_PER_K * top_k[narrow].max()))
        maxima = np.maximum.reduceat(scores[narrow], np.arange(0, vocab, width), axis=1)
        maxima.sort(axis=1)
        bounds = np.take_along_axis(maxima, maxima.shape[1] - top_k[narrow][:, None], axis=1)[:, 0]
        floors[narrow] = np.maximum(floors[narrow], bounds)
    alone = (top_p < 1) & ~proportional & ~narrow
    if alone.any():
        totals[alone] = np.exp(scores if alone.all() else scores[alone]).sum(axis=1)
        floors[alone] = np.minimum(np.log(totals[alone] * (1 - top_p[alone]) / (2 * vocab)), 0)
    return floors, totals


def _above(scores: np.ndarray, floors: np.ndarray) -> Kept:
    """All tokens that reach their row's floor."""
    rows, vocab = scores.shape
    found = np.flatnonzero(scores >= floors.astype(np.float32)[:, None])
    row_of, token_ids = np.divmod(found, vocab)
    counts = np.bincount(row_of, minlength=rows)
    places = np.arange(len(found)) - np.repeat(counts.cumsum() - counts, counts)
    # One integer of falling score and rising token id: plain sorting, and ties are settled.
    keys = np.full((rows, counts.max()), _NOTHING)
    keys[row_of, places] = np.abs(scores.reshape(-1)[found]).view(np.uint32).astype(np.uint64) << _HALF
    keys[row_of, places] |= token_ids.astype(np.uint64)
    keys.sort(axis=1)
    return Kept((keys & _LOW).astype(np.int64), -(keys >> _HALF).astype(np.uint32).view(np.float32))
