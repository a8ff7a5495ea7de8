"""What comes back: chunks as they are made, and the answer they add up to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from openlora.errors import Unavailable


@dataclass(frozen=True)
class Chunk:
    """One response of the server. Texts and token ids of all chunks, in order, are the answer."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str  # stop | length | cancelled; empty until the last chunk
    num_input_tokens: int  # of the prompt: the same on every chunk
    num_output_tokens: int  # of this chunk
    request_id: str  # the server's, as the receipt has it; not the label that `stop` takes
    receipt: dict[str, Any] | None  # on the last chunk
    logprobs: tuple[dict[str, Any], ...] = ()  # one a token: {"token_id", "token", "logprob", "top": [...]}


@dataclass(frozen=True)
class Usage:
    """Tokens that were billed; EOS and stop tokens are among the output tokens."""

    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    receipt: dict[str, Any]
    request_id: str
    usage: Usage
    logprobs: tuple[dict[str, Any], ...] = ()


def join(chunks: Iterable[Chunk]) -> Answer:
    """The answer that `chunks` add up to.

    Raises:
        Unavailable: there is no last chunk with a receipt, so the answer was cut off on its way.
    """
    parts = list(chunks)
    last = parts[-1] if parts else None
    if last is None or not last.finish_reason or last.receipt is None:
        raise Unavailable(f"the stream ended after {len(parts)} responses without a finish reason and a receipt")
    return Answer(
        text="".join(part.text for part in parts),
        token_ids=tuple(token for part in parts for token in part.token_ids),
        finish_reason=last.finish_reason,
        receipt=last.receipt,
        request_id=last.request_id,
        usage=Usage(last.num_input_tokens, sum(part.num_output_tokens for part in parts)),
        logprobs=tuple(entry for part in parts for entry in part.logprobs),
    )
