"""From the ensemble's answers to OpenAI's bodies; the receipt rides along as `openlora_receipt`."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, ClassVar

from openlora_client import Answer, Chunk, Usage

Logprob = dict[str, Any]  # {"token_id", "token", "logprob", "top": [...]}
RECEIPT = "openlora_receipt"


class Shape:
    """One answer's bodies, whole or chunk by chunk."""

    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, label: str, model: str, *, logprobs: bool, usage_in_stream: bool) -> None:
        self._common = {"id": label, "created": int(time.time()), "model": model}
        self._logprobs = logprobs
        self._usage_in_stream = usage_in_stream
        self._output_tokens = 0

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choice = self._whole_choice(answer.text, self._shown(answer.logprobs))
        return {
            **self._common,
            "object": self.whole_object,
            "choices": [{"index": 0, **choice, "finish_reason": answer.finish_reason}],
            "usage": _usage(answer.usage),
            RECEIPT: answer.receipt,
        }

    def chunks(self, chunk: Chunk) -> Iterable[dict[str, Any]]:
        """The bodies that `chunk` becomes: none when it has nothing to show, more at the end."""
        self._output_tokens += chunk.num_output_tokens
        if chunk.text or chunk.logprobs or chunk.finish_reason:
            body = self._chunk(self._chunk_choice(chunk.text, self._shown(chunk.logprobs)), chunk.finish_reason or None)
            yield body if chunk.receipt is None else {**body, RECEIPT: chunk.receipt}
        if chunk.finish_reason and self._usage_in_stream:
            usage = _usage(Usage(chunk.num_input_tokens, self._output_tokens))
            yield {**self._common, "object": self.chunk_object, "choices": [], "usage": usage}

    def opening(self) -> Iterable[dict[str, Any]]:
        """What comes before the first chunk."""
        return ()

    def _chunk(self, choice: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        body = {
            **self._common,
            "object": self.chunk_object,
            "choices": [{"index": 0, **choice, "finish_reason": finish_reason}],
        }
        return {**body, "usage": None} if self._usage_in_stream else body

    def _shown(self, logprobs: tuple[Logprob, ...]) -> dict[str, Any] | None:
        return self._logprobs_of(logprobs) if self._logprobs else None

    def _whole_choice(self, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        raise NotImplementedError

    def _chunk_choice(self, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs_of(self, logprobs: tuple[Logprob, ...]) -> dict[str, Any]:
        raise NotImplementedError


class CompletionShape(Shape):
    whole_object = chunk_object = "text_completion"

    def __init__(self, label: str, model: str, *, logprobs: bool, usage_in_stream: bool) -> None:
        super().__init__(label, model, logprobs=logprobs, usage_in_stream=usage_in_stream)
        self._offset = 0  # characters of the tokens before this chunk

    def _whole_choice(self, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"text": text, "logprobs": logprobs}

    _chunk_choice = _whole_choice

    def _logprobs_of(self, logprobs: tuple[Logprob, ...]) -> dict[str, Any]:
        offsets = []
        for entry in logprobs:
            offsets.append(self._offset)
            self._offset += len(entry["token"])
        return {
            "tokens": [entry["token"] for entry in logprobs],
            "token_logprobs": [entry["logprob"] for entry in logprobs],
            "top_logprobs": [{one["token"]: one["logprob"] for one in entry["top"]} for entry in logprobs],
            "text_offset": offsets,
        }


class ChatShape(Shape):
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self) -> Iterable[dict[str, Any]]:
        yield self._chunk({"delta": {"role": "assistant", "content": ""}, "logprobs": None}, None)

    def _whole_choice(self, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": logprobs}

    def _chunk_choice(self, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}, "logprobs": logprobs}

    def _logprobs_of(self, logprobs: tuple[Logprob, ...]) -> dict[str, Any]:
        return {
            "content": [
                {**_chat_logprob(entry), "top_logprobs": [_chat_logprob(one) for one in entry["top"]]}
                for entry in logprobs
            ],
            "refusal": None,
        }


def _chat_logprob(entry: Logprob) -> dict[str, Any]:
    token = entry["token"]
    # A token that is a part of a character shows as U+FFFD: its bytes are not known here.
    return {"token": token, "logprob": entry["logprob"], "bytes": None if "\ufffd" in token else list(token.encode())}


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }
