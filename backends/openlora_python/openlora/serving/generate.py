"""Step 2: the generation step. Owns the tokenizer, the usage journal and the responses; the engine is elsewhere.

`execute` may only copy and return: everything after it runs as one coroutine a request on a loop of our own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time

import zmq
import zmq.asyncio

from ..attribution.journal import Journal
from ..config import RunConfig
from ..engine.api import EngineInfo, EngineStats
from ..engine.client import EngineClient
from ..errors import (
    Internal,
    InvalidArgument,
    NotAuthenticated,
    OpenLoRAError,
    Overloaded,
    RequestNotFound,
    Unavailable,
)
from .access.quota_store import LedgerKeeper
from .adapter_supply import AdapterSupply
from .chunk import Chunk, Control, open_control
from .engine_metrics import EngineMetrics
from .fetch_client import FetchClient
from .generation import Generation, Sink
from .metrics import Registry, RequestRecord, ServingMetrics, outcome_of
from .pacing import Pacer
from .seal import Seal
from .status import StatusReporter
from .text import TextCodec
from .ticket import Ticket, TicketOffice
from .usage import RequestUsage

REPORT_SECONDS = 0.5
METRICS_SECONDS = 1.0
JOURNAL_RETRY_SECONDS = 1.0
SAVE_SECONDS = 1.0  # between two savings of the quota ledger
OVERLOAD_RETRY_MS = 1000
LOG_RETRY_MS = 2000

log = logging.getLogger(__name__)


class GenerationStep:
    """Runs requests from ticket to last response, and keeps what they share: journal, engine, table of the living."""

    def __init__(self, run: RunConfig, registry: Registry) -> None:
        self._run = run
        self._codec = TextCodec(run.base.path)
        self._office = TicketOffice(Seal(run.run_key_path, "ticket"))
        self._control_seal = Seal(run.run_key_path, "control")
        self._living: dict[str, Generation] = {}
        # When, by id, from Triton's thread on: `_living` has them a moment later. On the monotonic clock.
        self._accepted: dict[str, float] = {}
        self._metrics = ServingMetrics(registry, run.settings.metrics.adapter_labels)
        self._engine_metrics = EngineMetrics(registry)
        self._stats: tuple[EngineInfo | None, EngineStats] | None = None  # what an engine said last, and which one
        self._capacity = run.settings.engine.max_batch + run.settings.engine.max_waiting
        self._log_fault = ""  # why attribution can't write receipts, if so
        self._ledger_keeper = LedgerKeeper(run.quota_path, run.journal_dir)
        self._journal = Journal.open(run.journal_dir, wait=True, on_failure=self._journal_failed)
        self._ledger = self._ledger_keeper.open()
        self._in_doubt: set[str] = set()  # ended while the journal had failed: only `reopen` can tell what they took
        self._loop = asyncio.new_event_loop()
        limits = run.settings.limits
        self._pacer = Pacer(self._loop, self._journal, limits.coalesce_above, limits.coalesce_ms / 1000)
        self._engine = EngineClient(run.socket("engine"), self._pacer.end_of_step, self._take_stats)
        self._fetcher = FetchClient(run.socket("fetcher"), self._metrics.record_fetch)
        self._supply = AdapterSupply(run.adapter_cache, self._fetcher, max(1, run.settings.engine.max_waiting // 2))
        self._thread = threading.Thread(target=self._run_loop, name="generation", daemon=True)
        self._thread.start()

    def accept(self, sealed_ticket: bytes, text: bytes, sink: Sink) -> None:
        """Take a request on; `sink` gets exactly one FINAL, here or later. On Triton's thread; returns at once."""
        names = None
        try:
            ticket = self._office.redeem(sealed_ticket, text)
            names = ticket.adapter_names
            if ticket.kind == "generate":
                self._check_admission(ticket)
                self._accepted[ticket.request_id] = time.monotonic()
        except OpenLoRAError as error:
            self._refuse(error, sink, names)
            return
        work = self._stop if ticket.kind == "stop" else self._generate
        asyncio.run_coroutine_threadsafe(work(ticket, text.decode(), sink), self._loop)

    def faults(self) -> list[str]:
        """Why requests are refused now; empty when they are not."""
        found = []
        if self._journal.failed is not None:
            found.append(f"journal: {self._journal.failed}")
        if self._log_fault:
            found.append(f"receipt log: {self._log_fault}")
        if self._engine.info is None:
            found.append("no engine")
        return found

    def close(self) -> None:
        """End the loop and the journal; what still runs is closed as aborted at the next start."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._journal.close()
        self._ledger_keeper.close()

    def _check_admission(self, ticket: Ticket) -> None:
        if self._journal.failed is not None:
            raise self._journal.failed
        if self._log_fault:
            raise Unavailable(f"the receipt log: {self._log_fault}", retry_after_ms=LOG_RETRY_MS)
        info = self._engine.require()
        if unknown := next((i for i in ticket.sampling.stop_token_ids if i >= info.vocab_size), None):
            raise InvalidArgument(f"{unknown} is not below the vocabulary's {info.vocab_size}", field="stop_token_ids")
        if len(self._accepted) >= self._capacity:
            raise Overloaded(f"{self._capacity} requests run and wait already", retry_after_ms=OVERLOAD_RETRY_MS)

    def _tokenize(self, ticket: Ticket, text: str) -> tuple[int, ...]:
        """The prompt's tokens. A long one takes a while, without holding up anything on the loop."""
        prompt = self._codec.encode(text, add_special_tokens=ticket.text.add_special_tokens)
        if not prompt:
            raise InvalidArgument("no tokens", field="text_input")
        limit = self._engine.require().max_model_len
        if len(prompt) + ticket.sampling.max_tokens > limit:
            raise InvalidArgument(
                f"{len(prompt)} tokens and max_tokens {ticket.sampling.max_tokens} are more than this model's {limit}",
                field="text_input",
            )
        return prompt

    async def _generate(self, ticket: Ticket, prompt_text: str, sink: Sink) -> None:
        generation = None
        tokenizing = self._loop.run_in_executor(None, self._tokenize, ticket, prompt_text)
        leasing = self._loop.run_in_executor(None, self._supply.lease, ticket) if ticket.adapters else None
        leased, arrival = False, None
        try:
            if leasing is not None:
                missing, leased = await leasing, True
                if missing:
                    arrival = self._loop.create_task(self._supply.bring(missing))
            prompt = await tokenizing
            held = self._ledger.reserve(ticket.request_id, ticket.quotas, len(prompt), ticket.sampling.max_tokens)
            generation = self._new_generation(ticket, prompt, prompt_text, sink, held.started_at, arrival)
            self._living[ticket.request_id] = generation
            await generation.run()
            self._metrics.record(generation.record(self._accepted[ticket.request_id]))
        except OpenLoRAError as error:
            self._refuse(error, sink, ticket.adapter_names)
        except Exception as error:  # a fault of ours must still answer the client
            log.exception("request %s", ticket.request_id)
            self._refuse(Internal(f"{type(error).__name__}: {error}"), sink, ticket.adapter_names)
        finally:
            if generation is None or not generation.usage.journalled:
                self._ledger.refund(ticket.request_id)
            elif not generation.usage.completed:
                self._in_doubt.add(ticket.request_id)
            self._living.pop(ticket.request_id, None)
            self._accepted.pop(ticket.request_id, None)
            if arrival is not None and not arrival.cancel():
                arrival.exception()  # heard, whether or not this request got as far as waiting for it
            if leased:
                self._supply.release(ticket.adapters)

    def _refuse(self, error: OpenLoRAError, sink: Sink, adapter_names: tuple[str, ...] | None) -> None:
        sink.fail(error)
        self._metrics.record(RequestRecord(adapter_names, outcome_of(error)))

    async def _stop(self, ticket: Ticket, prompt_text: str, sink: Sink) -> None:
        """Stop the one running request with this caller and label; answers one empty response."""
        generation = self._new_generation(ticket, (), prompt_text, sink, int(time.time()))
        self._living[ticket.request_id] = generation
        try:
            await generation.hello()
            found = [
                other
                for other in self._living.values()
                if other.ticket.kind == "generate"
                and (other.ticket.caller, other.ticket.label) == (ticket.caller, ticket.label)
            ]
            if not ticket.label or len(found) != 1:
                raise RequestNotFound(f"{len(found)} running requests of yours have the id {ticket.label!r}")
            found[0].cancel()
            sink.send_chunk(Chunk("stopped", ticket.request_id, 1), final=True)
        except OpenLoRAError as error:
            sink.fail(error)
        finally:
            sink.finish()
            del self._living[ticket.request_id]

    def _new_generation(
        self,
        ticket: Ticket,
        prompt: tuple[int, ...],
        prompt_text: str,
        sink: Sink,
        started_at: int,
        arrival: asyncio.Task[None] | None = None,
    ) -> Generation:
        usage = RequestUsage(self._journal, self._ledger, started_at)
        return Generation(ticket, prompt, prompt_text, sink, self._engine, usage, self._codec, self._pacer, arrival)

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        standing = (self._engine.run(), self._fetcher.run(), self._pacer.run(), self._listen(), self._report())
        for work in (*standing, self._save_ledger(), self._publish()):
            self._loop.create_task(work).add_done_callback(_raise_fault)
        self._loop.run_forever()

    async def _listen(self) -> None:
        """Control messages of attribution: acknowledgements, cancels, and how its log does."""
        with zmq.asyncio.Context.instance().socket(zmq.PULL) as socket:
            socket.bind(self._run.socket("control"))
            while True:
                try:
                    control = open_control(self._control_seal, await socket.recv())
                except NotAuthenticated as error:
                    log.warning("control message refused: %s", error)
                    continue
                self._obey(control)

    def _obey(self, control: Control) -> None:
        if control.op == "log_failed":
            self._log_fault = control.reason
        elif control.op == "log_ready":
            self._log_fault = ""
        elif generation := self._living.get(control.request_id):
            generation.acknowledge() if control.op == "ack" else generation.cancel()

    async def _report(self) -> None:
        reporter = StatusReporter(self._run.socket("status"), "generation")
        while True:
            faults = self.faults()
            reporter.report(ready=not faults, reason="; ".join(faults))
            await asyncio.sleep(REPORT_SECONDS)

    async def _save_ledger(self) -> None:
        while True:
            await asyncio.sleep(SAVE_SECONDS)
            await self._loop.run_in_executor(None, self._ledger_keeper.save)

    def _take_stats(self, stats: EngineStats) -> None:
        self._stats = (self._engine.info, stats)

    async def _publish(self) -> None:
        while True:  # not on the loop: each change is a round trip to tritonserver
            await self._loop.run_in_executor(None, self._metrics.publish)
            said_by, stats = self._stats or (None, None)
            engine = stats if said_by is self._engine.info else None
            await self._loop.run_in_executor(None, self._engine_metrics.publish, engine)
            await asyncio.sleep(METRICS_SECONDS)

    def _journal_failed(self, error: BaseException) -> None:
        """Nothing was acknowledged. Recover into a new segment, again and again, with the doors shut meanwhile."""
        log.error("usage journal: %s", error)
        asyncio.run_coroutine_threadsafe(self._reopen_journal(), self._loop)

    async def _reopen_journal(self) -> None:
        while fault := self._journal.failed:
            for generation in self._living.values():
                generation.abort(fault)
            await asyncio.sleep(JOURNAL_RETRY_SECONDS)
            if self._living:
                continue  # their completions would find no intent in the new segment
            try:
                found = await self._loop.run_in_executor(None, self._journal.reopen)
            except Unavailable as error:
                log.error("usage journal: still %s", error)
                continue
            for closing in found.aborted:
                self._ledger.book(closing.seq, closing.request_id, closing.out_tokens)
            for request_id in self._in_doubt:
                self._ledger.refund(request_id)  # of those that are booked nothing is held any more
            self._in_doubt.clear()


def _raise_fault(task: asyncio.Task[None]) -> None:
    """The standing tasks never end; one that does is a fault, and a stub that can't serve must not stay."""
    if not task.cancelled() and (error := task.exception()):
        log.critical("generation: a standing task ended", exc_info=error)
        os._exit(1)
