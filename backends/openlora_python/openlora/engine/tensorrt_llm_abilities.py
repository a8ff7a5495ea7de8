"""What of a request each backend of TensorRT-LLM does. It takes the rest too, and ignores it in silence: we refuse it.

Sources are pull requests and issues of NVIDIA/TensorRT-LLM. Nobody here has run them on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InvalidArgument
from .api import EngineRequest, Sampling

# Parameters that not every backend has, as clients call them, and the values at which they ask for nothing. Everything
# else (max_tokens, temperature, top_p, top_k, stop_token_ids, logprobs …) all of them have.
NEUTRAL = {
    name: getattr(Sampling(), name)
    for name in ("min_tokens", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "bad_words")
}
OPTIONAL = (*NEUTRAL, "seed", "priority")


@dataclass(frozen=True)
class Abilities:
    """`parameters` are those of OPTIONAL, `guides` those of GUIDE_KINDS that a backend does."""

    parameters: frozenset[str]
    guides: frozenset[str]

    def check(self, request: EngineRequest, backend: str) -> None:
        """Raises InvalidArgument, naming what the request asks for and `backend` does not do."""
        sampling, guide = request.sampling, request.sampling.guide
        for name, neutral in NEUTRAL.items():
            given = getattr(sampling, name)
            if given != neutral and name not in self.parameters:
                raise InvalidArgument(f"{backend} does not do it: leave it out, got {_short(given)}", field=name)
        if sampling.seed_given and sampling.temperature > 0 and "seed" not in self.parameters:
            raise InvalidArgument(
                f"{backend} does not do it: leave it out or set temperature 0, got {sampling.seed}", field="seed"
            )
        if request.priority and "priority" not in self.parameters:
            raise InvalidArgument(f"{backend} does not do it: leave it out, got {request.priority}", field="priority")
        if guide is not None and guide.kind not in self.guides:
            right = ", ".join(sorted(self.guides)) or "none"
            raise InvalidArgument(
                f"{backend} has no guide of the kind {guide.kind!r}: {right} is right", field=guide.field
            )


def _short(given: object) -> str:
    return f"{len(given)} of them" if isinstance(given, tuple) else str(given)


_PENALTIES = frozenset({"repetition_penalty", "presence_penalty", "frequency_penalty"})
_GUIDES = frozenset({"json", "json_schema", "regex", "grammar"})

# None has min_tokens: it forbids `end_id` alone, while our ends are stop tokens, which end an answer all the same
# (#4776); until #12166 and #12358 (March 2026) it also counted the prompt, and for -1 forbade the vocabulary's last.
# None has bad_words: it takes words, and splits them with its own tokenizer.
TORCH_SAMPLER = Abilities(frozenset(), _GUIDES)  # takes penalties and min_p and ignores them (#9442)
TORCH_SAMPLER_WITH_PENALTIES = Abilities(_PENALTIES | {"min_p"}, _GUIDES)  # #16485, #16590: told of in rc24's manual
TORCH_SAMPLER_WITH_SEEDS = Abilities(_PENALTIES | {"min_p", "seed"}, _GUIDES)  # #17172, August 2026
# The C++ decoder. Guides want a backend that only one of the two kinds of executor is given.
BUILT_ENGINE = Abilities(_PENALTIES | {"min_p", "seed"}, frozenset())
