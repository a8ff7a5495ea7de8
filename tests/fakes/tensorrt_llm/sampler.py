"""From logits to a token: what a backend of a version heeds, and what it takes and ignores in silence."""

from __future__ import annotations

from typing import Any

import torch

NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_p": 0.0, "seed": None}


class Logprob:
    def __init__(self, logprob: float, rank: int) -> None:
        self.logprob, self.rank = logprob, rank


class Sampler:
    """One per LLM. Whoever's seed is not heeded draws from one generator, with all the others."""

    def __init__(self, recorded: dict[str, Any]) -> None:
        self._heeds = frozenset(recorded["heeds"])
        self._temperature_alone = recorded["temperature_alone"]
        self._shared = torch.Generator().manual_seed(0)

    def generator(self, parameters: Any) -> torch.Generator:
        seed = self._heeded(parameters, "seed")
        return self._shared if seed is None else torch.Generator().manual_seed(seed % 2**63)

    def choose(self, raw: torch.Tensor, tokens: list[int], prompt: int, parameters: Any, generator: Any) -> int:
        """The next token after `tokens`, the first `prompt` of which are the prompt."""
        logits = self._penalized(raw.clone(), tokens, tokens[prompt:], parameters)
        if len(tokens) - prompt < (parameters.min_tokens or 0):
            logits[..., parameters.end_id] = -torch.inf  # of no other token that ends an answer; -1 is the last one's
        if self._is_greedy(parameters):
            return int(logits.argmax())
        return int(torch.multinomial(self._probabilities(logits, parameters), 1, generator=generator))

    def _heeded(self, parameters: Any, name: str) -> Any:
        given = getattr(parameters, name)
        return given if name in self._heeds and given is not None else NEUTRAL[name]

    def _is_greedy(self, parameters: Any) -> bool:
        if not parameters.temperature or parameters.top_k == 1:
            return True
        # regularizeTopKTopP: both absent are both 0, which is top_k = 1.
        return self._temperature_alone == "greedy" and not parameters.top_k and not parameters.top_p

    def _penalized(self, logits: torch.Tensor, tokens: list[int], made: list[int], parameters: Any) -> torch.Tensor:
        repetition, presence, frequency = (
            self._heeded(parameters, f"{kind}_penalty") for kind in ("repetition", "presence", "frequency")
        )
        for token in set(tokens):
            logits[token] *= repetition ** (1 if logits[token] < 0 else -1)
        for token in set(made):
            logits[token] -= presence + frequency * made.count(token)
        return logits

    def _probabilities(self, logits: torch.Tensor, parameters: Any) -> torch.Tensor:
        chances = (logits / parameters.temperature).softmax(-1)
        if parameters.top_k:
            chances[chances < chances.topk(min(parameters.top_k, len(chances))).values[-1]] = 0
        if parameters.top_p:
            ordered, order = chances.sort(descending=True)
            chances[order[(ordered.cumsum(-1) - ordered) > parameters.top_p]] = 0
        chances[chances < self._heeded(parameters, "min_p") * chances.max()] = 0
        return chances / chances.sum()


def logprobs_of(logits: torch.Tensor, token: int, count: int) -> dict[int, Logprob]:
    values = logits.log_softmax(-1)
    best = values.topk(min(count, len(values)))
    found = {int(one): Logprob(float(value), rank + 1) for rank, (value, one) in enumerate(zip(*best, strict=True))}
    if token not in found:
        found[token] = Logprob(float(values[token]), int((values > values[token]).sum()) + 1)
    return found
