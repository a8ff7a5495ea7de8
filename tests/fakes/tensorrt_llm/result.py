"""What `generate_async` gives: one object that changes with every step."""

from __future__ import annotations

import asyncio
from typing import Any

from .sampler import Logprob, logprobs_of

BURST = 3  # steps that arrive together, as from a busy executor


class RequestError(RuntimeError):
    """Of one request alone. Comes out of the iteration, not out of the call."""


class _Completion:
    def __init__(self) -> None:
        self.index = 0
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Logprob]] = []
        self.token_ids_diff: list[int] = []
        self.logprobs_diff: list[dict[int, Logprob]] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | None = None


class Result:
    """A `RequestOutput`: awaited step by step, itself what every step yields."""

    def __init__(self, llm: Any, given: dict[str, Any]) -> None:
        self._llm, self._given = llm, given
        self.prompt_token_ids = list(given["inputs"])
        self.outputs = [_Completion()]
        self.finished = False
        self.cached_tokens = 0
        self.abort_calls = 0
        self._steps: list[tuple[list[int], list[dict[int, Logprob]], str | None]] = []
        self._parameters = given["sampling_params"]
        self._generator = llm.sampler.generator(self._parameters)
        self._tokens = list(self.prompt_token_ids)
        try:
            asyncio.get_running_loop()
            self._has_queue = True
        except RuntimeError:
            self._has_queue = False
        llm.active.add(self)
        self._started = False

    def abort(self) -> None:
        self.abort_calls += 1
        if not self.finished:
            self._end("cancelled")

    def aborted(self) -> bool:
        return self.outputs[0].finish_reason == "cancelled"

    def __aiter__(self) -> Result:
        return self

    async def __anext__(self) -> Result:
        assert self._has_queue, "generate_async was not called from a coroutine: there is no queue to wait on"
        if self.finished:
            raise StopAsyncIteration
        if not self._steps:
            await asyncio.sleep(0)
            if self.finished:
                raise StopAsyncIteration
            self._compute()
        tokens, logprobs, reason = self._steps.pop(0)
        made = self.outputs[0]
        # What the step before gave is gone: the same lists hold other things now.
        made.token_ids_diff[:] = tokens
        made.logprobs_diff[:] = logprobs
        made.token_ids += tokens
        made.logprobs += logprobs
        if not self._given["streaming"]:
            return await self.__anext__() if reason is None else self._last(reason)
        return self if reason is None else self._last(reason)

    def _last(self, reason: str) -> Result:
        self._end(reason)
        return self

    def _end(self, reason: str | None) -> None:
        self.outputs[0].finish_reason = reason
        self.finished = True
        self._llm.active.discard(self)

    def _compute(self) -> None:
        """The steps that arrive next."""
        if not self._started:
            self._started = True
            lora = self._given["lora_request"]
            self.cached_tokens = self._llm.reused(self.prompt_token_ids, lora, self._given["cache_salt"])
        for _ in range(BURST):
            token, logprob = self._next_token()
            self._tokens.append(token)
            reason = self._reason(token)
            cut = reason == "stop" and not self._parameters.include_stop_str_in_output
            self._steps.append(([] if cut else [token], [] if cut or logprob is None else [logprob], reason))
            if reason:
                return

    def _reason(self, token: int) -> str | None:
        """A stop token ends it whatever `min_tokens` says."""
        made = len(self._tokens) - len(self.prompt_token_ids)
        if token in (self._parameters.stop_token_ids or ()):
            return "stop"
        limit = self._llm.arguments["max_seq_len"] or 2**31
        return "length" if made >= self._parameters.max_tokens or len(self._tokens) >= limit else None

    def _next_token(self) -> tuple[int, dict[int, Logprob] | None]:
        parameters, prompt = self._parameters, len(self.prompt_token_ids)
        try:
            self._llm.iterate()
            raw = self._llm.memory.logits(self._tokens, self._given["lora_request"])
        except Exception as error:
            self._end(None)
            raise error if self._llm.closed else RequestError(str(error)) from error
        token = self._llm.sampler.choose(raw, self._tokens, prompt, parameters, self._generator)
        return token, None if parameters.logprobs is None else logprobs_of(raw, token, parameters.logprobs)
