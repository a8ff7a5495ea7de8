"""From logits to tokens: penalties, bans and filters with vLLM's meaning and order, and draws that are reproducible.

A draw is a function of (seed, output position): Gumbel-max, argmaxₜ(log pₜ + Gₜ), with noise Gₜ from the counter-based
generator Philox (key = seed, counter = position), indexed by token id. Batch, order and filters never shift it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ..errors import InvalidArgument, NotFinite, OpenLoRAError
from .api import Sampling, TokenLogprob


class SamplingState:
    """One request's sampling: its settings and what its penalties have counted."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], vocab_size: int, device: torch.device) -> None:
        self.sampling = sampling
        self.output: list[int] = []
        self.penalised = (
            sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
        )
        self._prompt = prompt
        self._vocab_size = vocab_size
        self._device = device

    # Both are made when first needed: a long queue of waiting requests must not hold a vocabulary each.

    @cached_property
    def in_prompt(self) -> torch.Tensor:
        """Whether a token occurs in the prompt, `[vocab]`."""
        found = torch.zeros(self._vocab_size, dtype=torch.bool, device=self._device)
        found[torch.tensor(self._prompt, dtype=torch.long, device=self._device)] = True
        return found

    @cached_property
    def output_counts(self) -> torch.Tensor:
        """How often a token occurs in the output, `[vocab]`."""
        counted = torch.tensor(self.output, dtype=torch.long, device=self._device)
        return torch.bincount(counted, minlength=self._vocab_size).float()

    def append(self, token_id: int) -> None:
        if self.penalised:
            self.output_counts[token_id] += 1
        self.output.append(token_id)

    def banned(self) -> list[int]:
        """Tokens that must not come next: ends before `min_tokens`, and the last token of any bad word begun."""
        sampling = self.sampling
        tokens = [
            word[-1]
            for word in sampling.bad_words
            if len(word) == 1 or tuple(self.output[1 - len(word) :]) == word[:-1]
        ]
        if len(self.output) < sampling.min_tokens:
            tokens += [*sampling.eos_token_ids, *sampling.stop_token_ids]
        return tokens


@dataclass(frozen=True)
class Sampled:
    token_id: int
    logprob: TokenLogprob | None


def sample(logits: torch.Tensor, states: Sequence[SamplingState]) -> list[Sampled | OpenLoRAError]:
    """The next token of each row of `logits` `[rows, vocab]` (float32, left as it is), or why that row must end.

    Order: penalties → bad words and `min_tokens` → temperature → `min_p` → `top_k` and `top_p`. Log-probabilities
    are those of `logits`.
    """
    finite = torch.isfinite(logits).all(dim=-1).tolist()
    scores = _restrict(logits, states)
    possible = (scores.amax(dim=-1) > float("-inf")).tolist()
    token_ids = _choose(scores, states).tolist()
    logprobs = _logprobs(logits, token_ids, states)
    results: list[Sampled | OpenLoRAError] = []
    for row, token_id in enumerate(token_ids):
        if not finite[row]:
            results.append(NotFinite("the model's logits hold NaN or Inf for this request"))
        elif not possible[row]:
            results.append(InvalidArgument("every token is banned", field="bad_words"))
        else:
            results.append(Sampled(token_id, logprobs.get(row)))
    return results


def _restrict(logits: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
    """Apply penalties and bans; a copy is made only when a row asks for one.

    repetition (prompt and output): positive logits are divided by it, others multiplied (CTRL, arXiv 1909.05858);
    frequency and presence (output): logit − frequency · count − presence · [count > 0].
    """
    penalised = [row for row, state in enumerate(states) if state.penalised]
    banned = [(row, token) for row, state in enumerate(states) for token in state.banned()]
    if not penalised and not banned:
        return logits
    scores = logits.clone()
    if penalised:
        chosen = [states[row] for row in penalised]
        counts = torch.stack([state.output_counts for state in chosen])  # [penalised, vocab]
        seen = torch.stack([state.in_prompt for state in chosen]) | (counts > 0)
        part = scores[penalised]
        repetition = _column(part, [state.sampling.repetition_penalty for state in chosen])
        part = torch.where(seen, torch.where(part > 0, part / repetition, part * repetition), part)
        part -= _column(part, [state.sampling.frequency_penalty for state in chosen]) * counts
        part -= _column(part, [state.sampling.presence_penalty for state in chosen]) * (counts > 0)
        scores[penalised] = part
    if banned:
        rows, tokens = zip(*banned, strict=True)
        scores[list(rows), list(tokens)] = float("-inf")
    return scores


def _choose(scores: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
    """Greedy rows take the largest score, the others draw; `[rows]`."""
    token_ids = scores.argmax(dim=-1)
    drawn = [row for row, state in enumerate(states) if state.sampling.temperature > 0]
    if drawn:
        chosen = [states[row] for row in drawn]
        part = scores[drawn]
        # The largest becomes 0 first, so that no temperature, however small, can overflow.
        part = (part - part.amax(dim=-1, keepdim=True)) / _column(part, [s.sampling.temperature for s in chosen])
        part = filter_scores(
            part,
            min_p=[s.sampling.min_p for s in chosen],
            top_k=[s.sampling.top_k for s in chosen],
            top_p=[s.sampling.top_p for s in chosen],
        )
        noise = np.stack([gumbel_noise(s.sampling.seed, len(s.output), part.shape[1]) for s in chosen])
        token_ids[drawn] = (part.double() + torch.from_numpy(noise).to(part.device)).argmax(dim=-1)
    return token_ids


def filter_scores(
    scores: torch.Tensor, *, min_p: Sequence[float], top_k: Sequence[int], top_p: Sequence[float]
) -> torch.Tensor:
    """Set to -inf what a filter removes from `scores` `[rows, vocab]`; one value per row, 0, 0 and 1 keep everything.

    `min_p` keeps p ≥ min_p · max p; `top_k` keeps the k largest (and ties); `top_p` the smallest set of most likely
    tokens whose probability, after the other two, reaches top_p.
    """
    removed = float("-inf")
    if any(value > 0 for value in min_p):
        probabilities = torch.softmax(scores, dim=-1)
        limit = _column(scores, min_p) * probabilities.amax(dim=-1, keepdim=True)
        scores = scores.masked_fill(probabilities < limit, removed)
    vocab = scores.shape[1]
    narrow = any(0 < k < vocab for k in top_k)
    if not narrow and all(p >= 1 for p in top_p):
        return scores
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    if narrow:
        last = [k - 1 if 0 < k < vocab else vocab - 1 for k in top_k]
        smallest = ordered.gather(1, torch.tensor(last, device=scores.device)[:, None])  # [rows, 1]
        scores = scores.masked_fill(scores < smallest, removed)
        ordered = ordered.masked_fill(ordered < smallest, removed)
    if any(p < 1 for p in top_p):
        probabilities = torch.softmax(ordered, dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities  # of the tokens more likely than this one
        surplus = before >= _column(scores, top_p)
        surplus[:, 0] = False
        # 1 means everything, whatever the rounding of the sum
        surplus &= torch.tensor([[p < 1] for p in top_p], device=scores.device)
        scores = scores.masked_fill(torch.zeros_like(surplus).scatter(1, order, surplus), removed)
    return scores


def gumbel_noise(seed: int, position: int, vocab_size: int) -> np.ndarray:
    """Standard Gumbel noise −log(−log u), one value per token id, from Philox(key = seed, counter = position)."""
    # Position sits in the second word: the generator itself counts in the first.
    generator = np.random.Philox(key=seed, counter=np.array([0, position, 0, 0], dtype=np.uint64))
    uniform = ((generator.random_raw(vocab_size) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52  # in (0, 1)
    return -np.log(-np.log(uniform))


def _logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], states: Sequence[SamplingState]
) -> dict[int, TokenLogprob]:
    rows = [row for row, state in enumerate(states) if state.sampling.logprobs is not None]
    if not rows:
        return {}
    logprobs = torch.log_softmax(logits[rows], dim=-1)
    most = max(states[row].sampling.logprobs or 0 for row in rows)
    values, indices = logprobs.topk(min(most, logits.shape[1]), dim=-1)
    chosen = logprobs.gather(1, torch.tensor([[token_ids[row]] for row in rows], device=logits.device))
    result = {}
    for row, own, top_values, top_ids in zip(rows, chosen.tolist(), values.tolist(), indices.tolist(), strict=True):
        count = states[row].sampling.logprobs or 0
        top = tuple(zip(top_ids[:count], top_values[:count], strict=True))
        result[row] = TokenLogprob(token_ids[row], own[0], top)
    return result


def _column(like: torch.Tensor, values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]  # [rows, 1]
