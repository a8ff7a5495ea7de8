"""How many prompt tokens a step may compute beside decoding streams: as many as a fitted model of step times allows.

Two regimes have a model each, of one form: seconds ≈ a + b·tokens + c·pairs. A step that only decodes reads all weights
for a few rows and is bound by memory; one with prompt tokens in it is bound by arithmetic. `tokens` are those computed,
`pairs` those of a computed token and a token it attends to.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

_GRAIN = 8  # tokens: of what a step computes of a prompt beside decoding streams
_LEAST = 16  # tokens: what such a step computes of a waiting prompt, whatever the time it takes
_UNKNOWN = 64  # prompt tokens in a step beside decoding streams, while nothing was measured
_SCALE = np.array([1.0, 1 / 16, 1 / 65536])  # brings the three terms to one magnitude
_RIDGE = 1e-6
_MEMORY = 200  # steps after which an observation has lost two thirds of its weight in the shape of a model …
_PACE_MEMORY = 8  # … and in the pace of the machine


@dataclass
class StepLoad:
    """What one step computes."""

    decoding: int = 0  # streams that get their next token
    tokens: int = 0
    pairs: int = 0

    @property
    def mixed(self) -> bool:
        """Whether tokens of a prompt are among them."""
        return self.tokens > self.decoding


class StepTimes:
    """Least squares with forgetting for the times of one kind of step.

    Minimises Σ λᵃᵍᵉ·(1 − estimate/seconds)²: relative errors, so that a step which took long because something else
    held the machine weighs little. Coefficients are never negative: a term whose best value is, is left out. The
    memory is long, because steps of one size alone say nothing about the terms; what changes quickly, how fast the
    machine runs just now, is one factor for all three.
    """

    def __init__(self) -> None:
        self._products = np.zeros((3, 3))
        self._sums = np.zeros(3)
        self._solution: np.ndarray | None = None
        self._pace = 1.0  # seconds that a step takes now, by those that the long memory says

    @property
    def known(self) -> bool:
        return bool(self._sums[0] > 0)

    def observe(self, load: StepLoad, seconds: float) -> None:
        if self.known:
            surprise = min(max(seconds / self.estimate(load), 0.5), 2.0)
            self._pace *= surprise ** (1 / _PACE_MEMORY)
        features = _features(load) / seconds
        keep = 1 - 1 / _MEMORY
        self._products = keep * self._products + np.outer(features, features)
        self._sums = keep * self._sums + features
        self._solution = None

    def coefficients(self) -> tuple[float, float, float]:
        """a in seconds, b in seconds a token, c in seconds a pair."""
        if self._solution is None:
            self._solution = self._solve() * _SCALE
        a, b, c = (self._pace * self._solution).tolist()
        return a, b, c

    def estimate(self, load: StepLoad) -> float:
        """Seconds."""
        a, b, c = self.coefficients()
        return a + b * load.tokens + c * load.pairs

    def _solve(self) -> np.ndarray:
        solution = np.zeros(3)
        used = [0, 1, 2]
        while used:
            products = self._products[np.ix_(used, used)]
            ridge = _RIDGE * np.trace(products) * np.eye(len(used))
            part = np.linalg.solve(products + ridge, self._sums[used])
            if part.min() >= 0:
                solution[used] = part
                break
            del used[int(part.argmin())]
        return solution


def _features(load: StepLoad) -> np.ndarray:
    return np.array([1.0, load.tokens, load.pairs]) * _SCALE


@dataclass
class Allowance:
    """What is left of one step. `load` grows as work is taken."""

    tokens: int
    seconds: float | None = None  # None: no stream waits for this step to end
    per_token: float = 0.0
    per_pair: float = 0.0
    load: StepLoad = field(default_factory=StepLoad)

    def take(self, start: int, wanted: int) -> int:
        """How many of `wanted` tokens from position `start` on this step computes; they are taken from the rest."""
        tokens = min(wanted, self.tokens)
        if self.seconds is not None:
            affordable = self._affordable(start) // _GRAIN * _GRAIN
            if not self.load.mixed:
                affordable = max(affordable, _LEAST)
            tokens = min(tokens, affordable)
            self.seconds -= self.per_token * tokens + self.per_pair * _pairs(start, tokens)
        self.tokens -= tokens
        self.load.tokens += tokens
        self.load.pairs += _pairs(start, tokens)
        return tokens

    def _affordable(self, start: int) -> int:
        """The largest t with per_token·t + per_pair·pairs(start, t) ≤ seconds, pairs ≈ start·t + t²/2."""
        linear, square, seconds = self.per_token + self.per_pair * start, self.per_pair / 2, self.seconds or 0.0
        if seconds <= 0:
            return 0
        root = (linear * linear + 4 * square * seconds) ** 0.5
        return min(self.tokens, int(2 * seconds / (linear + root))) if linear + root > 0 else self.tokens


def _pairs(start: int, tokens: int) -> int:
    return tokens * start + tokens * (tokens + 1) // 2


class StepBudget:
    """Keeps a step with prompt tokens in it within `stretch` times the step that would only decode.

    `stretch` s trades the two waits: decoding streams see gaps of up to s times their usual one while a prompt is
    computed, and its first token takes s/(s − 1) times what it takes alone (the rest of each step goes to the streams).
    When more prompts wait than streams decode, more requests gain by a long step than lose by it, and the
    stretch grows in proportion. Where nothing decodes, a step computes all it can.
    """

    def __init__(self, max_step_tokens: int, stretch: float) -> None:
        self._max_step_tokens = max_step_tokens
        self._stretch = stretch
        self._decoding_times = StepTimes()
        self._mixed_times = StepTimes()

    def allow(self, decoding: int, context: int, prefilling: int) -> Allowance:
        """The allowance of a step in which `decoding` streams attend to `context` tokens in all, and prompts wait."""
        load = StepLoad(decoding, decoding, context)
        allowance = Allowance(self._max_step_tokens - decoding, load=load)
        if decoding == 0 or prefilling == 0:
            return allowance
        if not (self._decoding_times.known and self._mixed_times.known):
            allowance.tokens = min(allowance.tokens, _UNKNOWN)
            return allowance
        stretch = 1 + (self._stretch - 1) * max(1.0, prefilling / decoding)
        target = stretch * self._decoding_times.estimate(load)
        _, allowance.per_token, allowance.per_pair = self._mixed_times.coefficients()
        allowance.seconds = target - self._mixed_times.estimate(load)
        return allowance

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn from a step that is done."""
        (self._mixed_times if load.mixed else self._decoding_times).observe(load, seconds)
