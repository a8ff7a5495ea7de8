"""One request in the generation step, from its ticket to its last response."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from ..attribution.frames import STATUS_CANCELLED, STATUS_COMPLETE, STATUS_ERROR
from ..engine.api import EngineOutput, EngineRequest, TokenLogprob
from ..engine.client import EngineClient
from ..errors import DeadlineExceeded, Internal, NotAuthenticated, OpenLoRAError, from_message
from .chunk import Chunk
from .text import TextAssembler, TextCodec
from .ticket import Ticket
from .usage import RequestUsage

ACK_SECONDS = 2.0  # attribution answers in a millisecond; a caller that is not the ensemble never does
PROBE_SECONDS = 0.25  # how soon a gRPC cancel is seen while no response flows
EMPTY_DELTA_SECONDS = 1.0  # over HTTP a disconnect shows only when bytes are written

CANCELLED = "cancelled"

log = logging.getLogger(__name__)


class Sink(Protocol):
    """Where responses go: a Triton response sender behind `Responder`."""

    def send_chunk(self, chunk: Chunk, *, final: bool = False) -> None: ...

    def fail(self, error: OpenLoRAError) -> None: ...

    def finish(self) -> None: ...


@dataclass(frozen=True)
class Pacing:
    """When tokens of a stream may wait for each other."""

    coalesce_above: int
    coalesce_seconds: float
    live_streams: Callable[[], int]

    def window(self) -> float:
        """Seconds that a token may wait now."""
        return self.coalesce_seconds if self.live_streams() > self.coalesce_above else 0.0


@dataclass
class _Pending:
    """What was made and not yet sent."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.token_ids or self.text)


class Generation:
    """A state machine in the shape of a coroutine: hello → intent → engine → completion → last response.

    `run()` ends in exactly one FINAL on every path. Nothing is generated before the intent is durable, and the last
    response leaves only when the completion is.
    """

    def __init__(
        self,
        ticket: Ticket,
        prompt: tuple[int, ...],
        prompt_text: str,
        sink: Sink,
        engine: EngineClient,
        usage: RequestUsage,
        codec: TextCodec,
        pacing: Pacing,
    ) -> None:
        self.ticket = ticket
        self._prompt = prompt
        self._prompt_text = prompt_text
        self._echo = prompt_text if ticket.text.echo else ""  # goes before the first text
        self._sink = sink
        self._engine = engine
        self._usage = usage
        self._codec = codec
        self._pacing = pacing
        self._acked = asyncio.Event()
        self._cancelled = asyncio.Event()
        self._events: asyncio.Queue[EngineOutput | OpenLoRAError | str] = asyncio.Queue()
        self._text = TextAssembler(
            codec,
            ticket.text.stop,
            include_stop=ticket.text.include_stop,
            skip_special_tokens=ticket.text.skip_special_tokens,
        )
        self._pending = _Pending()
        self._index = 0  # of the next chunk
        self._sent_tokens = False
        self._last_response = self._last_delta = time.monotonic()
        self._cumulative_logprob = 0.0
        self.streaming = False

    def acknowledge(self) -> None:
        self._acked.set()

    def cancel(self) -> None:
        """The client is gone or said stop. Safe at any time, any number of times."""
        self._cancelled.set()
        self._events.put_nowait(CANCELLED)

    def abort(self, error: OpenLoRAError) -> None:
        """Something that this request needs is gone."""
        self._events.put_nowait(error)

    async def run(self) -> None:
        """Answer the request; never raises."""
        try:
            await self.hello()
            await self._generate()
        except OpenLoRAError as error:
            await self._end_with(error)
        except Exception as error:  # a fault of ours must still answer the client
            log.exception("request %s", self.ticket.request_id)
            await self._end_with(Internal(f"{type(error).__name__}: {error}"))
        finally:
            self._engine.release(self.ticket.request_id)
            self._sink.finish()

    async def hello(self) -> None:
        """Go on only when attribution says that this answer is on its way through it.

        Raises:
            NotAuthenticated: generation was called by itself.
        """
        self._send(Chunk("hello", self.ticket.request_id, self._next_index()))
        try:
            await asyncio.wait_for(self._acked.wait(), ACK_SECONDS)
        except TimeoutError:
            raise NotAuthenticated(
                "generation is a step of the ensemble `openlora` and answers only through it"
            ) from None

    async def _generate(self) -> None:
        deadline = time.monotonic() + self.ticket.timeout_ms / 1000
        info = self._engine.require()
        await self._usage.begin(self.ticket, info, len(self._prompt), self._prompt_text)
        finish_reason = CANCELLED if self._cancelled.is_set() else await self._run_engine(deadline)
        self._take_text(self._text.finish())
        if self._text.stopped and finish_reason == "length":
            finish_reason = "stop"  # completed by the very last bytes
        status = STATUS_CANCELLED if finish_reason == CANCELLED else STATUS_COMPLETE
        seq = await self._usage.complete(status)
        self.streaming = False
        self._flush("last", finish_reason=finish_reason, seq=seq)

    async def _run_engine(self, deadline: float) -> str:
        ticket = self.ticket
        self.streaming = ticket.stream
        sampling = msgspec.structs.replace(ticket.sampling, bad_words=self._codec.bad_word_ids(ticket.text.bad_words))
        request = EngineRequest(ticket.request_id, self._prompt, ticket.adapters, sampling, ticket.priority)
        await self._engine.submit(request, self._events)
        while True:
            event = await self._next_event(deadline)
            if isinstance(event, EngineOutput):
                finish_reason = await self._take_output(event)
                if finish_reason:
                    return finish_reason
                self._flush_if_due()
            elif event == CANCELLED:
                await self._engine.cancel(ticket.request_id)
                return CANCELLED
            elif isinstance(event, OpenLoRAError):
                raise event

    async def _next_event(self, deadline: float) -> EngineOutput | OpenLoRAError | str | None:
        """The next word of engine or client; None when it was time to send something meanwhile."""
        if not self._events.empty():
            return self._events.get_nowait()
        now = time.monotonic()
        if now >= deadline:
            await self._engine.cancel(self.ticket.request_id)
            raise DeadlineExceeded(f"not finished in {self.ticket.timeout_ms} ms")
        wake = min(deadline, self._last_response + PROBE_SECONDS)
        if self._pending.text and self.streaming:
            wake = min(wake, self._last_delta + self._pacing.window())
        try:
            return await asyncio.wait_for(self._events.get(), max(0.0, wake - now))
        except TimeoutError:
            self._flush_if_due()
            self._probe_if_due()
            return None

    async def _take_output(self, output: EngineOutput) -> str:
        """Fold one step's tokens in; the finish reason once the request is over."""
        self._fold(output)
        if self._text.stopped:
            if not output.finish_reason:
                await self._engine.cancel(self.ticket.request_id)
            return "stop"
        if output.finish_reason == "error":
            raise from_message(output.error)
        return output.finish_reason

    def _fold(self, output: EngineOutput) -> None:
        """Take tokens up to the one that completes a stop string; those behind it are nobody's."""
        hidden = len(output.token_ids) - 1 if self._hides_last(output) else -1
        for position, token_id in enumerate(output.token_ids):
            self._pending.token_ids.append(token_id)
            self._usage.count_token()
            if output.logprobs is not None:
                self._pending.logprobs.append(output.logprobs[position])
                self._cumulative_logprob += output.logprobs[position].logprob
            if position != hidden:
                self._take_text(self._text.push(token_id))
            if self._text.stopped:
                return

    def _hides_last(self, output: EngineOutput) -> bool:
        """EOS and stop tokens are billed and listed, and are no text."""
        return output.finish_reason == "stop" and not self.ticket.text.include_stop

    def _take_text(self, text: str) -> None:
        if text:
            self._pending.text.append(text)
            self._usage.add_text(text)

    def _flush_if_due(self) -> None:
        if not self.streaming:
            return
        now = time.monotonic()
        waited = now - self._last_delta
        first = bool(self._pending) and not self._sent_tokens
        if first or (self._pending.text and waited >= self._pacing.window()) or waited >= EMPTY_DELTA_SECONDS:
            self._usage.progress()
            self._flush("delta")

    def _probe_if_due(self) -> None:
        if time.monotonic() - self._last_response >= PROBE_SECONDS:
            self._send(Chunk("probe", self.ticket.request_id, self._next_index()))

    def _flush(self, kind: str, *, finish_reason: str = "", seq: int = -1) -> None:
        pending, self._pending = self._pending, _Pending()
        text, self._echo = self._echo + "".join(pending.text), ""
        self._sent_tokens = self._sent_tokens or bool(pending.token_ids) or kind == "last"
        self._last_delta = time.monotonic()
        wants_logprobs = self.ticket.sampling.logprobs is not None
        self._send(
            Chunk(
                kind,
                self.ticket.request_id,
                self._next_index(),
                text=text,
                token_ids=tuple(pending.token_ids),
                num_input_tokens=len(self._prompt),
                finish_reason=finish_reason,
                seq=seq,
                logprobs=self._logprobs_json(pending.logprobs) if wants_logprobs else "",
                cumulative_logprob=self._cumulative_logprob if wants_logprobs else None,
            ),
            final=kind == "last",
        )

    def _send(self, chunk: Chunk, *, final: bool = False) -> None:
        self._last_response = time.monotonic()
        self._sink.send_chunk(chunk, final=final)

    def _next_index(self) -> int:
        self._index += 1
        return self._index - 1

    def _logprobs_json(self, logprobs: list[TokenLogprob]) -> str:
        def shown(token_id: int, logprob: float) -> dict[str, Any]:
            return {"token_id": token_id, "token": self._codec.piece(token_id), "logprob": logprob}

        return json.dumps(
            [
                {**shown(one.token_id, one.logprob), "top": [shown(*candidate) for candidate in one.top]}
                for one in logprobs
            ]
        )

    async def _end_with(self, error: OpenLoRAError) -> None:
        """Journal what was made, then tell the client; a journal that fails leaves the first error standing."""
        status = STATUS_CANCELLED if isinstance(error, DeadlineExceeded) else STATUS_ERROR
        try:
            self._take_text(self._text.finish())
            await self._usage.complete_if_begun(status)
        except OpenLoRAError as journal_error:
            error = journal_error
        self._sink.fail(error)
