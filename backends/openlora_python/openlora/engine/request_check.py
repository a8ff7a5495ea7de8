"""What a request must be before it may wait."""

from __future__ import annotations

from ..errors import InvalidArgument
from .api import EngineInfo, EngineRequest


def check_request(request: EngineRequest, info: EngineInfo) -> None:
    """Refuse what the engine of `info` could never do.

    Raises:
        InvalidArgument: naming the field.
    """
    sampling, prompt, vocab_size = request.sampling, request.prompt, info.vocab_size
    if not prompt:
        raise InvalidArgument("is empty, at least one token is right", field="prompt")
    if len(prompt) >= info.max_model_len:
        raise InvalidArgument(
            f"{len(prompt)} tokens leave no room for an answer, max_model_len is {info.max_model_len}", field="prompt"
        )
    if sampling.max_tokens < 1:
        raise InvalidArgument(f"{sampling.max_tokens} is too small, at least 1 is right", field="max_tokens")
    named = {
        "prompt": prompt,
        "eos_token_ids": sampling.eos_token_ids,
        "stop_token_ids": sampling.stop_token_ids,
        "bad_words": [token for word in sampling.bad_words for token in word],
    }
    for name, tokens in named.items():
        outside = next((token for token in tokens if not 0 <= token < vocab_size), None)
        if outside is not None:
            raise InvalidArgument(f"token id {outside} is outside the vocabulary of {vocab_size}", field=name)
    if not all(sampling.bad_words):
        raise InvalidArgument("a word has no tokens", field="bad_words")
    distinct = len({use.digest for use in request.adapters})
    if not info.one_adapter and distinct > info.max_adapters:
        raise InvalidArgument(f"{distinct} adapters, at most {info.max_adapters} fit", field="adapters")
