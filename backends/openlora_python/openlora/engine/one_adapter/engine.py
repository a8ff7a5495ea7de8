"""An engine with one adapter per request, behind the protocol of all engines.

One thread runs an asyncio loop. Each request is a task on it: place its adapters, read the backend's steps, hand on
what they made. Whatever ends a task, the request ends in exactly one output with a finish reason.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Protocol

from ...errors import DeadlineExceeded, InvalidArgument, OpenLoRAError, Overloaded, UnsupportedModel
from ..api import AdapterStats, Emit, EngineInfo, EngineOutput, EngineRequest, EngineStats, Sampling, TokenLogprob
from ..request_check import check_request
from .base_shapes import BaseShapes
from .failures import Meaning, told
from .options import OneAdapterOptions
from .placing import RETRY_AFTER_MS, LifeSpent, PlacedAdapter, Placing
from .staging import Staging

_LOG = logging.getLogger(__name__)
CLOSE_SECONDS = 5.0


@dataclass(frozen=True)
class Step:
    """What one step of the backend made for one request: copies, not views of what the next step changes."""

    token_ids: list[int]
    finish_reason: str = ""  # stop | length
    logprobs: list[TokenLogprob] | None = None
    cached_tokens: int = 0
    queue_seconds: float = 0.0


@dataclass
class Counts:
    """What a backend says of itself; what it doesn't know stays 0."""

    steps: int = 0
    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    prefix_lookup_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    adapters_loaded: int = 0


class Backend(Protocol):
    """The engine itself. Made and called on the loop."""

    info: EngineInfo
    meanings: Sequence[Meaning]

    def check(self, request: EngineRequest) -> None:
        """Raises InvalidArgument, naming the field, for what the engine can't do."""

    def generate(self, request: EngineRequest, adapter: PlacedAdapter | None) -> AsyncIterator[Step]:
        """The request's steps. When the iteration is given up, the engine's work on it stops."""

    def counts(self) -> Counts: ...

    async def close(self) -> None: ...

    @property
    def failure(self) -> Exception | None:
        """Why the engine can't go on, if so."""


@dataclass(eq=False)
class _Live:
    request: EngineRequest
    submitted_at: float
    task: asyncio.Task[None] | None = None
    cancelled: bool = False
    outputs: int = 0


class OneAdapterEngine:
    """`engine.api.Engine` over a `Backend`, which `open_backend` makes.

    When ids or sums are used up, `ending` becomes true: new requests are refused as overloaded, the running ones end,
    then `ended` is true and whoever hosts the engine replaces it. `failed` is why it can't go on at all.
    """

    def __init__(self, model_dir: str, base_digest: str, options: OneAdapterOptions) -> None:
        self.failed: Exception | None = None
        self.ending = False
        self._options = options
        self._shapes = BaseShapes(model_dir)
        self._staging_dir = Path(options.staging_dir or mkdtemp(prefix="openlora-staging-"))
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="adapters")
        self._lock = threading.Lock()
        self._live: dict[str, _Live] = {}  # guarded by _lock
        self._refused = 0  # of which nobody was told yet; guarded by _lock
        self._made: list[EngineOutput] = []
        self._emit: Emit | None = None
        self._last_finish, self._finish_interval = time.monotonic(), 0.1
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine", daemon=True)
        self._thread.start()
        opened: Future[Backend] = asyncio.run_coroutine_threadsafe(self._open(model_dir, base_digest), self._loop)
        try:
            self._backend = opened.result()
        except BaseException:
            self._stop_loop()
            raise
        self.info = self._backend.info
        staging = Staging(self._staging_dir, options.max_staged_bytes)
        self._placing = Placing(self._shapes, self.info.dtype, self.info.max_rank, options, staging)

    async def open_backend(self, model_dir: str, base_digest: str) -> Backend:
        raise NotImplementedError

    async def _open(self, model_dir: str, base_digest: str) -> Backend:
        """A backend that has made a token: one that can't should not wait for a client to find out."""
        backend = await self.open_backend(model_dir, base_digest)
        try:
            trial = EngineRequest("trial", (0,), (), Sampling(max_tokens=1, temperature=0.0))
            made = [token async for step in backend.generate(trial, None) for token in step.token_ids]
        except Exception as error:
            raise UnsupportedModel(f"{backend.info.engine} can't compute with this model: {error}") from error
        if len(made) != 1:
            raise UnsupportedModel(f"{backend.info.engine} made {len(made)} tokens where 1 was asked for")
        return backend

    # --- the protocol: any thread -----------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Everything that was accepted is answered, and nothing more will be."""
        with self._lock:
            return self.ending and not self._live and not self._refused and not self._made

    def start(self, emit: Emit) -> None:
        self._emit = emit

    def submit(self, request: EngineRequest) -> None:
        """Queue a request. What is wrong with it, or an overfull queue, is told by its one output.

        Raises:
            InvalidArgument: a request with this id is still running; it goes on.
        """
        with self._lock:
            if request.request_id in self._live:
                raise InvalidArgument(f"{request.request_id!r} is still running", field="request_id")
            live = _Live(request, time.monotonic())
            refusal = self._refusal(request, len(self._live) - self._options.max_batch)
            if refusal is None:
                self._live[request.request_id] = live
            else:
                self._refused += 1
        self._loop.call_soon_threadsafe(self._begin, live, refusal)

    def cancel(self, request_id: str) -> None:
        self._loop.call_soon_threadsafe(self._cancel, request_id)

    def stats(self) -> EngineStats:
        counts, placed = self._backend.counts(), self._placing.counts
        if self.failed is None:
            self.failed = self._backend.failure
        return EngineStats(
            steps=counts.steps,
            running=counts.running,
            waiting=counts.waiting,
            kv_blocks_used=counts.kv_blocks_used,
            kv_blocks_total=counts.kv_blocks_total,
            adapters_loaded=counts.adapters_loaded,
            prefix_lookup_tokens=counts.prefix_lookup_tokens,
            prefix_hit_tokens=counts.prefix_hit_tokens,
            preemptions=counts.preemptions,
            adapters=AdapterStats(
                slots=self.info.max_adapters,
                slots_filled=counts.adapters_loaded,
                host_adapters=self._placing.ids,
                hits_host=placed.later_uses,
                hits_disk=placed.first_uses,
                loads=placed.first_uses,
                read_seconds=placed.read_seconds,
                failed_loads=placed.failed,
            ),
        )

    def shutdown(self) -> None:
        """Stop everything; running requests are dropped."""
        self._emit = None
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._stop_loop()

    def _refusal(self, request: EngineRequest, waiting: int) -> OpenLoRAError | None:
        if self.ending:
            return Overloaded("this engine is being replaced", retry_after_ms=RETRY_AFTER_MS)
        try:
            check_request(request, self.info)
            self._backend.check(request)
        except InvalidArgument as error:
            return error
        if waiting >= self._options.max_waiting:
            retry = self._finish_interval * waiting / 2  # until half of the queue is gone
            return Overloaded(
                f"{waiting} requests are waiting", retry_after_ms=round(1000 * min(max(retry, 0.1), 30.0))
            )
        return None

    # --- on the loop -----------------------------------------------------------------------------------------------

    def _begin(self, live: _Live, refusal: OpenLoRAError | None) -> None:
        if refusal is not None:
            self._put(EngineOutput(live.request.request_id, [], "error", str(refusal)))
            with self._lock:
                self._refused -= 1
        elif live.cancelled:
            self._finish(live, "cancelled")
        else:
            live.task = asyncio.ensure_future(self._serve(live))
            live.task.add_done_callback(lambda task: self._finish_unserved(live))

    def _finish_unserved(self, live: _Live) -> None:
        """A task that is cancelled before its first turn never gets one."""
        if self._live.get(live.request.request_id) is live:
            self._finish(live, "cancelled")

    def _cancel(self, request_id: str) -> None:
        live = self._live.get(request_id)
        if live is not None and not live.cancelled:
            live.cancelled = True
            if live.task is not None:
                live.task.cancel()

    async def _serve(self, live: _Live) -> None:
        request = live.request
        timeout = None if request.timeout is None else live.submitted_at + request.timeout - time.monotonic()
        try:
            async with asyncio.timeout(timeout):
                reason = await self._run(live)
        except TimeoutError:
            self._finish(live, "error", DeadlineExceeded(f"not finished in {(request.timeout or 0) * 1000:.0f} ms"))
        except asyncio.CancelledError:
            self._finish(live, "cancelled")
        except LifeSpent as error:
            _LOG.warning("%s", error)
            self.ending = True
            self._finish(live, "error", error)
        except Exception as error:
            if not isinstance(error, OpenLoRAError):
                _LOG.error("request %s", request.request_id, exc_info=error)
            self._finish(live, "error", self._told(live, error))
        else:
            self._finish(live, reason)

    def _told(self, live: _Live, error: Exception) -> OpenLoRAError:
        typed, guide = told(error, self._backend.meanings), live.request.sampling.guide
        if typed.field == "guide" and guide is not None:
            typed.field = guide.field  # what the client called it
        return typed

    async def _run(self, live: _Live) -> str:
        """Its finish reason, which the output with its last tokens does not have: that one comes from `_finish`."""
        request = live.request
        placed = await self._placed(request)
        steps = self._backend.generate(request, placed)
        try:
            async for step in steps:
                if step.token_ids:
                    self._put(self._output(live, step))
                if step.finish_reason:
                    return step.finish_reason
        finally:
            await steps.aclose()
            if placed is not None:
                self._disk.submit(self._placing.release, placed)
        raise RuntimeError("the engine gave no reason for the end")

    async def _placed(self, request: EngineRequest) -> PlacedAdapter | None:
        """On a thread of its own, which goes on when this request is given up: then what it placed is released."""
        if not request.adapters:
            return None
        placing = self._disk.submit(self._placing.place, request.adapters)
        try:
            return await asyncio.wrap_future(placing)
        except asyncio.CancelledError:
            placing.add_done_callback(self._release_unwanted)
            raise

    def _release_unwanted(self, placing: Future[PlacedAdapter | None]) -> None:
        if not placing.cancelled() and placing.exception() is None and (placed := placing.result()) is not None:
            self._disk.submit(self._placing.release, placed)

    def _output(self, live: _Live, step: Step) -> EngineOutput:
        output = EngineOutput(live.request.request_id, step.token_ids, logprobs=step.logprobs)
        if live.outputs == 0:
            output.cached_tokens, output.queue_seconds = step.cached_tokens, step.queue_seconds
        live.outputs += 1
        return output

    def _finish(self, live: _Live, reason: str, error: OpenLoRAError | None = None) -> None:
        with self._lock:
            del self._live[live.request.request_id]
        now = time.monotonic()
        self._finish_interval += 0.1 * (min(now - self._last_finish, 1.0) - self._finish_interval)
        self._last_finish = now
        self._put(EngineOutput(live.request.request_id, [], reason, "" if error is None else str(error)))

    def _put(self, output: EngineOutput) -> None:
        """Everything that one turn of the loop brings goes out together. A last output joins its last tokens."""
        made = self._made
        if output.finish_reason and made and made[-1].request_id == output.request_id:
            made[-1].finish_reason, made[-1].error = output.finish_reason, output.error
        else:
            made.append(output)
        if len(made) == 1:
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        if self._emit is not None:
            try:
                self._emit(self._made)
            except Exception as error:  # nobody can be told anything any more
                _LOG.exception("outputs can't be delivered")
                self.failed = error
        self._made = []

    async def _close(self) -> None:
        tasks = [live.task for live in list(self._live.values()) if live.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_SECONDS)
        await self._backend.close()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._disk.shutdown(wait=True)
        Staging(self._staging_dir, 1).remove()
