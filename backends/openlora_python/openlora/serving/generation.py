"""One request in the generation step, from its ticket to its last response."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from ..attribution.frames import STATUS_CANCELLED, STATUS_COMPLETE, STATUS_ERROR, ProgressFrame
from ..engine.api import EngineOutput, EngineRequest, TokenLogprob
from ..engine.client import EngineClient
from ..errors import DeadlineExceeded, Internal, NotAuthenticated, OpenLoRAError, from_message
from .chunk import Chunk
from .metrics import RequestRecord, outcome_of
from .pacing import Pacer
from .text import TextAssembler, TextCodec
from .ticket import Ticket
from .usage import RequestUsage

ACK_SECONDS = 2.0  # attribution answers in a millisecond; a caller that is not the ensemble never does

CANCELLED = "cancelled"

log = logging.getLogger(__name__)


class Sink(Protocol):
    """Where responses go: a Triton response sender behind `Responder`."""

    def send_chunk(self, chunk: Chunk, *, final: bool = False) -> None: ...

    def fail(self, error: OpenLoRAError) -> None: ...

    def finish(self) -> None: ...


@dataclass
class _Pending:
    """What was made and not yet sent."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    since: float = math.inf  # when the oldest of it was made


class Generation:
    """A state machine in the shape of a coroutine: hello → intent → adapters → engine → completion → last response.

    `run()` ends in exactly one FINAL on every path. Nothing is generated before the intent is durable, and the last
    response leaves only when the completion is. While adapters are fetched and while the engine runs, the coroutine
    sleeps: tokens are taken in by `take` and sent by the pacer, which also keeps the deadline and asks for cancels.
    Everything happens on one loop.
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
        pacer: Pacer,
        arrival: asyncio.Future[None] | None = None,
    ) -> None:
        """`arrival` ends when the bytes of its adapters are in the cache; None: they are."""
        self.ticket = ticket
        self._prompt = prompt
        self._prompt_text = prompt_text
        self._echo = prompt_text if ticket.text.echo else ""  # goes before the first text
        self._sink = sink
        self._engine = engine
        self._usage = usage
        self._codec = codec
        self._pacer = pacer
        self._arrival = arrival
        self._acked = asyncio.Event()
        self._over = asyncio.Event()  # `_outcome` is set
        self._outcome: str | OpenLoRAError = ""  # a finish reason, or what went wrong
        self._engine_over = False  # its last output is here
        self._text = TextAssembler(
            codec,
            ticket.text.stop,
            include_stop=ticket.text.include_stop,
            skip_special_tokens=ticket.text.skip_special_tokens,
        )
        self._pending = _Pending()
        self._index = 0  # of the next chunk
        self._sent_tokens = False
        self._cumulative_logprob = 0.0
        self._ended_as = ""  # finish reason or error code
        self._billed_prompt = 0  # tokens, once they are in the journal
        self._queue_seconds: float | None = None
        self._first_token_at: float | None = None
        self.streaming = ticket.stream
        self.deadline = math.inf
        self.last_response = self.last_delta = time.monotonic()

    @property
    def usage(self) -> RequestUsage:
        return self._usage

    def acknowledge(self) -> None:
        self._acked.set()

    def cancel(self) -> None:
        """The client is gone or said stop. Safe at any time, any number of times."""
        self._conclude(CANCELLED)

    def abort(self, error: OpenLoRAError) -> None:
        """Something that this request needs is gone."""
        self._conclude(error)

    async def run(self) -> None:
        """Answer the request; never raises."""
        try:
            await self.hello()
            await self._generate()
        except OpenLoRAError as error:
            await self._end_with(error)
        except Exception as error:  # a fault of ours must still answer the client
            await self._end_with(self._fault(error))
        finally:
            self._engine.release(self.ticket.request_id)
            self._sink.finish()

    def record(self, accepted_at: float) -> RequestRecord:
        """For the metrics, once it is over. `accepted_at` is on the monotonic clock."""
        first = self._first_token_at
        return RequestRecord(
            self.ticket.adapter_names,
            self._ended_as,
            self._billed_prompt,
            self._usage.output_tokens,
            self._queue_seconds,
            None if first is None else first - accepted_at,
        )

    async def hello(self) -> None:
        """Go on only when attribution says that this answer is on its way through it.

        Raises:
            NotAuthenticated: generation was called by itself.
        """
        self._respond(Chunk("hello", self.ticket.request_id, self._next_index()))
        try:
            await asyncio.wait_for(self._acked.wait(), ACK_SECONDS)
        except TimeoutError:
            raise NotAuthenticated(
                "generation is a step of the ensemble `openlora` and answers only through it"
            ) from None

    async def _generate(self) -> None:
        self.deadline = time.monotonic() + self.ticket.timeout_ms / 1000
        info = self._engine.require()
        await self._usage.begin(self.ticket, info, len(self._prompt), self._prompt_text)
        self._billed_prompt = len(self._prompt)
        finish_reason = await self._run_engine()
        self._take_text(self._text.finish())
        if self._text.stopped and finish_reason == "length":
            finish_reason = "stop"  # completed by the very last bytes
        status = STATUS_CANCELLED if finish_reason == CANCELLED else STATUS_COMPLETE
        seq = await self._usage.complete(status)
        self._flush("last", finish_reason=finish_reason, seq=seq)
        self._ended_as = finish_reason

    async def _run_engine(self) -> str:
        """The finish reason, once the engine has nothing more to do for this request."""
        if not self._over.is_set():
            self._pacer.add(self)
            try:
                await self._adapters_there()
                if not self._over.is_set():
                    await self._engine.submit(self._engine_request(), self)
                    await self._over.wait()
            finally:
                self._pacer.remove(self)
            if not self._engine_over:
                await self._engine.cancel(self.ticket.request_id)
        if isinstance(self._outcome, OpenLoRAError):
            raise self._outcome
        return self._outcome

    async def _adapters_there(self) -> None:
        """Wait until the engine can read them, or until this request is over without them."""
        if self._arrival is None:
            return
        over = asyncio.ensure_future(self._over.wait())
        await asyncio.wait([self._arrival, over], return_when=asyncio.FIRST_COMPLETED)
        over.cancel()
        if not self._over.is_set():
            self._arrival.result()

    def _engine_request(self) -> EngineRequest:
        ticket = self.ticket
        return EngineRequest(
            ticket.request_id,
            self._prompt,
            ticket.adapters,
            msgspec.structs.replace(ticket.sampling, bad_words=self._codec.bad_word_ids(ticket.text.bad_words)),
            ticket.priority,
            timeout=max(0.0, self.deadline - time.monotonic()),
            cache_salt=ticket.cache_salt,
        )

    # --- while the engine runs: called by the engine's client and by the pacer, never raising -------------------------

    def take(self, output: EngineOutput) -> None:
        """Fold one step's tokens in."""
        if self._over.is_set():
            return
        try:
            self._fold(output)
        except OpenLoRAError as error:
            self.abort(error)
        except Exception as error:  # of ours: it must end this request and no other
            self.abort(self._fault(error))
        self._engine_over = bool(output.finish_reason)
        if self._text.stopped:
            self._conclude("stop")
        elif output.finish_reason == "error":
            error = from_message(output.error)
            self.abort(self._late() if isinstance(error, DeadlineExceeded) else error)
        elif output.finish_reason:
            self._conclude(output.finish_reason)
        elif self.streaming:
            self._pacer.hold(self)

    def due(self, window: float) -> float:
        pending = self._pending
        if not self._sent_tokens:
            return pending.since
        return pending.since + window if pending.text else math.inf

    def progress(self) -> ProgressFrame:
        return self._usage.progress()

    def send_delta(self) -> None:
        self._guarded(self._flush, "delta")

    def send_probe(self) -> None:
        self._guarded(self._respond, Chunk("probe", self.ticket.request_id, self._next_index()))

    def expire(self) -> None:
        self.abort(self._late())

    def _guarded(self, send: Callable[..., None], *arguments: Any) -> None:
        try:
            send(*arguments)
        except Exception as error:  # of ours: it must end this request and no other
            self.abort(self._fault(error))

    def _conclude(self, outcome: str | OpenLoRAError) -> None:
        """The first word counts."""
        if not self._over.is_set():
            self._outcome = outcome
            self._over.set()
            self._pacer.remove(self)

    def _fault(self, error: Exception) -> OpenLoRAError:
        log.error("request %s", self.ticket.request_id, exc_info=error)
        return Internal(f"{type(error).__name__}: {error}")

    def _late(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"not finished in {self.ticket.timeout_ms} ms")

    # --- tokens in, responses out -------------------------------------------------------------------------------------

    def _fold(self, output: EngineOutput) -> None:
        """Take tokens up to the one that completes a stop string; those behind it are nobody's."""
        pending = self._pending
        if output.token_ids and pending.since == math.inf:
            pending.since = time.monotonic()
            if self._first_token_at is None:
                self._first_token_at, self._queue_seconds = pending.since, output.queue_seconds
        hidden = len(output.token_ids) - 1 if self._hides_last(output) else -1
        for position, token_id in enumerate(output.token_ids):
            pending.token_ids.append(token_id)
            self._usage.count_token()
            if output.logprobs is not None:
                pending.logprobs.append(output.logprobs[position])
                self._cumulative_logprob += output.logprobs[position].logprob
            if position != hidden:
                self._take_text(self._text.push(token_id))
            if self._text.stopped:
                return

    def _hides_last(self, output: EngineOutput) -> bool:
        """EOS and stop tokens are billed and listed, and are no text. What completes a guide is."""
        sampling = self.ticket.sampling
        ended = output.finish_reason == "stop" and output.token_ids
        return (
            bool(ended)
            and not self.ticket.text.include_stop
            and (output.token_ids[-1] in sampling.eos_token_ids or output.token_ids[-1] in sampling.stop_token_ids)
        )

    def _take_text(self, text: str) -> None:
        if text:
            self._pending.text.append(text)
            self._usage.add_text(text)

    def _flush(self, kind: str, *, finish_reason: str = "", seq: int = -1) -> None:
        pending, self._pending = self._pending, _Pending()
        text, self._echo = self._echo + "".join(pending.text), ""
        self._sent_tokens = self._sent_tokens or bool(pending.token_ids) or kind == "last"
        self.last_delta = time.monotonic()
        wants_logprobs = self.ticket.sampling.logprobs is not None
        self._respond(
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
                coalesced=kind == "delta" and self._pacer.coalescing,
            ),
            final=kind == "last",
        )

    def _respond(self, chunk: Chunk, *, final: bool = False) -> None:
        self.last_response = time.monotonic()
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
        self._ended_as = outcome_of(error)
        self._sink.fail(error)
