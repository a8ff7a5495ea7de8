"""From logits to tokens: guides, penalties, bans and filters with vLLM's meaning and order, and reproducible draws.

A step costs one pass for all rows; what only some rows ask for is computed for those rows alone. It happens on the
CPU, in numpy: on a GPU the largest logit of each row is found there, and only rows that ask for more are copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ..errors import InvalidArgument, NotFinite, OpenLoRAError
from .api import Sampling, TokenLogprob
from .draws import draw
from .penalties import SeenTokens, penalise, penalises
from .structured_output import GuideState


class SamplingState:
    """One request's sampling: its settings, what its penalties have counted, and where it stands in its guide.

    All of it is a function of settings, prompt and output.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], guide: GuideState | None = None) -> None:
        self.sampling = sampling
        self.output: list[int] = []
        self.guide = guide
        self.penalised = penalises(sampling)
        self.drawn = sampling.temperature > 0
        self._prompt = prompt
        self._edited = self.penalised or guide is not None or bool(sampling.bad_words)

    @cached_property
    def seen(self) -> SeenTokens:
        """Made when first needed: a long queue of waiting requests must not hold a copy of every prompt."""
        return SeenTokens(self._prompt if self.sampling.repetition_penalty != 1.0 else (), self.output)

    @property
    def may_end(self) -> bool:
        return len(self.output) >= self.sampling.min_tokens

    @property
    def edited(self) -> bool:
        """Whether anything changes the next token's logits."""
        return self._edited or not self.may_end

    @property
    def ready(self) -> bool:
        """Whether its first token may be chosen: False while a guide is prepared.

        Raises:
            OpenLoRAError: never, for the guide is bad.
        """
        return self.guide is None or self.guide.ready

    @property
    def complete(self) -> bool:
        """Whether the guide leaves nothing to add; the request has ended then."""
        return self.guide is not None and self.may_end and self.guide.complete(self.output)

    def append(self, token_id: int) -> None:
        if self.penalised:
            self.seen.add(token_id)
        self.output.append(token_id)

    def banned(self) -> list[int]:
        """Tokens that must not come next: ends before `min_tokens`, and the last token of any bad word begun."""
        sampling = self.sampling
        tokens = [
            word[-1]
            for word in sampling.bad_words
            if len(word) == 1 or tuple(self.output[1 - len(word) :]) == word[:-1]
        ]
        if not self.may_end:
            tokens += [*sampling.eos_token_ids, *sampling.stop_token_ids]
        return tokens

    def no_token_left(self) -> InvalidArgument:
        """Why guide and bans together leave nothing."""
        if self.sampling.bad_words:
            rest = "that the guide allows " if self.guide else ""
            return InvalidArgument(f"every token {rest}is banned", field="bad_words")
        have = len(self.output)
        return InvalidArgument(
            f"{self.sampling.min_tokens} can't be reached: after {have} nothing but an end is left", field="min_tokens"
        )


@dataclass(frozen=True)
class Sampled:
    token_id: int
    logprob: TokenLogprob | None


def sample(logits: torch.Tensor, states: Sequence[SamplingState]) -> list[Sampled | OpenLoRAError]:
    """The next token of each row of `logits` `[rows, vocab]` (float32, left as it is), or why that row must end.

    Order: guide → penalties → bad words and `min_tokens` → temperature → `min_p` → `top_k` and `top_p`.
    Log-probabilities are those of `logits`.
    """
    best, finite = _largest(logits)
    token_ids = best.tolist()
    faults: dict[int, OpenLoRAError] = {
        int(row): NotFinite("the model's logits hold NaN or Inf for this request") for row in np.flatnonzero(~finite)
    }
    edited = [row for row, state in enumerate(states) if state.edited and row not in faults]
    if edited:
        scores = _rows(logits, edited)
        faults |= _edit(scores, edited, states)
        for row, token_id in zip(edited, scores.argmax(axis=1).tolist(), strict=True):
            token_ids[row] = token_id
    drawn = [row for row, state in enumerate(states) if state.drawn and row not in faults]
    if drawn:
        part = _rows(logits, drawn)
        if edited:
            places = {row: place for place, row in enumerate(edited)}
            for place, row in enumerate(drawn):
                if row in places:
                    part[place] = scores[places[row]]
        chosen = [states[row] for row in drawn]
        found = draw(part, [state.sampling for state in chosen], [len(state.output) for state in chosen])
        for row, token_id in zip(drawn, found.tolist(), strict=True):
            token_ids[row] = token_id
    logprobs = _logprobs(logits, token_ids, states)
    return [faults.get(row) or Sampled(token_id, logprobs.get(row)) for row, token_id in enumerate(token_ids)]


def _largest(logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Of each row the token with the largest logit, and whether all its logits are finite; `[rows]` each."""
    if logits.device.type == "cpu":
        # numpy's vector code takes a fifth of the time of torch's, and wakes no other thread for it.
        host = logits.numpy()
        best = host.argmax(axis=1)  # the place of a NaN if there is one
        return best, np.isfinite(np.take_along_axis(host, best[:, None], axis=1)[:, 0]) & np.isfinite(host.min(axis=1))
    values, best = logits.max(dim=-1)
    finite = torch.isfinite(values) & torch.isfinite(logits.amin(dim=-1))
    return best.cpu().numpy(), finite.cpu().numpy()


def _rows(logits: torch.Tensor, rows: Sequence[int]) -> np.ndarray:
    """A copy of some rows, on the host."""
    if len(rows) == len(logits):
        return logits.to("cpu", copy=True).numpy()
    return logits[torch.tensor(rows, device=logits.device)].cpu().numpy()


def _edit(scores: np.ndarray, rows: Sequence[int], states: Sequence[SamplingState]) -> dict[int, OpenLoRAError]:
    """Apply guides, penalties and bans to `scores`, a copy of the logits of `rows`, in place.

    Returns why rows must end that have no token left.
    """
    faults: dict[int, OpenLoRAError] = {}
    chosen = [states[row] for row in rows]
    for place, state in enumerate(chosen):
        if state.guide is not None:
            try:
                allowed = state.guide.allowed(state.output, state.sampling, may_end=state.may_end)
            except InvalidArgument as error:
                faults[rows[place]] = error
            else:
                scores[place, ~allowed] = -np.inf
    penalised = [place for place, state in enumerate(chosen) if state.penalised]
    if penalised:
        penalise(
            scores, penalised, [chosen[place].seen for place in penalised],
            [chosen[place].sampling for place in penalised],
        )  # fmt: skip
    banned = [(place, token_id) for place, state in enumerate(chosen) for token_id in state.banned()]
    if banned:
        places, token_ids = zip(*banned, strict=True)
        scores[list(places), list(token_ids)] = -np.inf
    for place in np.flatnonzero(scores.max(axis=1) == -np.inf):
        faults.setdefault(rows[place], chosen[place].no_token_left())
    return faults


def _logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], states: Sequence[SamplingState]
) -> dict[int, TokenLogprob]:
    rows = [row for row, state in enumerate(states) if state.sampling.logprobs is not None]
    if not rows:
        return {}
    part = logits[rows]
    norms = torch.logsumexp(part, dim=-1, keepdim=True)
    most = min(max(states[row].sampling.logprobs or 0 for row in rows), logits.shape[1])
    values, indices = part.topk(most, dim=-1)
    values = values - norms
    chosen = part.gather(1, torch.tensor([[token_ids[row]] for row in rows], device=logits.device)) - norms
    result = {}
    for row, own, top_values, top_ids in zip(rows, chosen.tolist(), values.tolist(), indices.tolist(), strict=True):
        count = states[row].sampling.logprobs or 0
        top = tuple(zip(top_ids[:count], top_values[:count], strict=True))
        result[row] = TokenLogprob(token_ids[row], own[0], top)
    return result
