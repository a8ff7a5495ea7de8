"""Penalties for repetition, touching only the tokens that a request has seen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from .api import Sampling


class SeenTokens:
    """The tokens whose scores one request's penalties change, and how often each stands in its output."""

    def __init__(self, prompt: Iterable[int], output: Iterable[int]) -> None:
        known = np.unique(np.fromiter(prompt, dtype=np.int64))
        self._size = len(known)
        self._token_ids = known
        self._counts = np.zeros(self._size, dtype=np.float32)
        self._places = dict(zip(known.tolist(), range(self._size), strict=True))
        for token_id in output:
            self.add(token_id)

    @property
    def token_ids(self) -> np.ndarray:
        """`[seen]`, each once."""
        return self._token_ids[: self._size]

    @property
    def counts(self) -> np.ndarray:
        """`[seen]` float32, 0 for those of the prompt alone."""
        return self._counts[: self._size]

    def add(self, token_id: int) -> None:
        """It came in the output."""
        place = self._places.setdefault(token_id, self._size)
        if place == self._size:
            if place == len(self._token_ids):
                room = max(32, place)
                self._token_ids = np.concatenate([self._token_ids, np.zeros(room, dtype=np.int64)])
                self._counts = np.concatenate([self._counts, np.zeros(room, dtype=np.float32)])
            self._token_ids[place] = token_id
            self._size += 1
        self._counts[place] += 1


def penalises(sampling: Sampling) -> bool:
    return sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0


def penalise(scores: np.ndarray, rows: Sequence[int], seen: Sequence[SeenTokens], settings: Sequence[Sampling]) -> None:
    """Change `scores` `[all rows, vocab]` in place, in `rows`, each with what it has seen and its settings.

    repetition (prompt and output): positive scores are divided by it, others multiplied (CTRL, arXiv 1909.05858);
    frequency and presence (output): score − frequency · count − presence · [count > 0].
    """
    sizes = [len(one.token_ids) for one in seen]

    def spread(values: Sequence[float], dtype: type = np.float32) -> np.ndarray:
        return np.repeat(np.array(values, dtype=dtype), sizes)  # [all seen]

    places = spread(rows, np.int64), np.concatenate([one.token_ids for one in seen])
    counts = np.concatenate([one.counts for one in seen])
    found = scores[places]
    repetition = spread([one.repetition_penalty for one in settings])
    found = np.where(found > 0, found / repetition, found * repetition)
    found -= spread([one.frequency_penalty for one in settings]) * counts
    found -= spread([one.presence_penalty for one in settings]) * (counts > 0)
    scores[places] = found
