"""Step 3: attribution. Passes text through untouched, turns journal records into signed receipts, sees cancels.

The receipt log is a projection of the usage journal: one thread tails it, whoever made the records and whether or not
anybody waits for the answer. A request's last response leaves when its receipt is in the log.
"""

from __future__ import annotations

import collections
import json
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import zmq

from ..attribution.checkpointer import Checkpointer
from ..attribution.log import ReceiptLog
from ..attribution.projection import Projector
from ..config import RunConfig
from ..errors import NotAuthenticated, OpenLoRAError, Unavailable
from .chunk import Chunk, Control, open_chunk, seal_control
from .seal import Seal
from .status import StatusReporter

RECEIPT_SECONDS = 5.0  # how long an answer waits for a receipt that the log can't take
TAIL_SECONDS = 0.2  # how often the journal is looked at when nobody waits for a receipt
LOOK_SECONDS = 0.35  # how often a coalesced response asks whether its client is gone; others always do
REMEMBERED_REQUESTS = 100_000  # finished ones whose chunks are refused if they come again

log = logging.getLogger(__name__)


class Answer(Protocol):
    """Where one response goes: the sender of one call of this step."""

    def send_response(self, chunk: Chunk, receipt: str, *, first: bool) -> None: ...

    def fail(self, error: OpenLoRAError) -> None: ...

    def finish(self) -> None: ...


@dataclass(slots=True)
class _Passing:
    """A request whose chunks pass."""

    next_index: int = 0
    looked_at: float = 0.0  # for a cancel; on the monotonic clock
    answered: bool = False  # its client has had a response


_FINISHED = _Passing(next_index=1 << 62)


@dataclass(frozen=True)
class _Waiting:
    chunk: Chunk
    first: bool
    answer: Answer
    until: float  # on the monotonic clock


class AttributionStep:
    """One instance, in order. `take` runs on Triton's thread; receipts are made on the commit thread."""

    def __init__(self, run: RunConfig) -> None:
        self._chunk_seal = Seal(run.run_key_path, "usage")
        self._control_seal = Seal(run.run_key_path, "control")
        self._context = zmq.Context.instance()
        self._control = self._connect_control(run)
        self._passing: collections.OrderedDict[str, _Passing] = collections.OrderedDict()
        self._finals: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._log = ReceiptLog.open(run.state_dir, origin=run.settings.attribution.origin)
        self._projector = Projector(run.journal_dir, self._log)
        self._checkpointer = Checkpointer(self._log)
        self._checkpoint_fault = ""
        self._run = run
        self._thread = threading.Thread(target=self._commit, name="receipts", daemon=True)
        self._thread.start()

    def take(self, sealed: bytes, is_cancelled: Callable[[], bool], answer: Answer) -> None:
        """One response of generation on its way to the client. `is_cancelled` asks Triton about that client."""
        try:
            chunk = open_chunk(self._chunk_seal, sealed)
            request = self._pass(chunk)
        except OpenLoRAError as error:
            answer.fail(error)
            return
        if chunk.kind == "hello":
            self._tell(self._control, Control("ack", chunk.request_id))
        if chunk.kind in ("hello", "probe", "delta"):
            self._look(chunk, request, is_cancelled)
        if chunk.kind in ("hello", "probe"):
            answer.finish()
            return
        first, request.answered = not request.answered, True
        if chunk.kind == "last":
            self._finals.put(_Waiting(chunk, first, answer, time.monotonic() + RECEIPT_SECONDS))
        else:
            answer.send_response(chunk, "", first=first)

    def close(self) -> None:
        self._finals.put(None)
        self._thread.join()

    def _pass(self, chunk: Chunk) -> _Passing:
        """What is known of the chunk's request; a chunk that comes again is refused."""
        request = self._passing.setdefault(chunk.request_id, _Passing())
        if chunk.index < request.next_index:
            raise NotAuthenticated("this response was passed on before: call the ensemble `openlora`")
        request.next_index = chunk.index + 1
        if chunk.kind in ("last", "stopped"):
            self._passing[chunk.request_id] = _FINISHED
            self._passing.move_to_end(chunk.request_id)
        while len(self._passing) > REMEMBERED_REQUESTS:
            self._passing.popitem(last=False)
        return request

    def _look(self, chunk: Chunk, request: _Passing, is_cancelled: Callable[[], bool]) -> None:
        """Tell generation when the client is gone. Asking is a round trip between the stub and tritonserver."""
        now = time.monotonic()
        if chunk.coalesced and now - request.looked_at < LOOK_SECONDS:
            return
        request.looked_at = now
        if is_cancelled():
            self._tell(self._control, Control("cancel", chunk.request_id))

    def _connect_control(self, run: RunConfig) -> zmq.Socket:
        socket = self._context.socket(zmq.PUSH)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(run.socket("control"))
        return socket

    def _tell(self, socket: zmq.Socket, control: Control) -> None:
        socket.send(seal_control(self._control_seal, control))

    # --- the commit thread -------------------------------------------------------------------------------------------

    def _commit(self) -> None:
        """Project whatever the journal has, then answer those whose receipt is there."""
        control = self._connect_control(self._run)
        status = StatusReporter(self._run.socket("status"), "attribution")
        status.report(ready=False, reason="starting")  # the launcher watches us from here on
        waiting: list[_Waiting] = []
        fault = ""
        while True:
            if not self._gather(waiting):
                self._checkpoint(now=True)
                self._log.close()
                return
            before = fault
            fault = self._project()
            if fault != before:
                self._tell(control, Control("log_failed" if fault else "log_ready", reason=fault))
            status.report(ready=not fault, reason=fault)
            waiting = self._answer_ready(waiting)
            self._checkpoint()

    def _gather(self, waiting: list[_Waiting]) -> bool:
        """Wait for a last response, or a while; take all that are there. False when it is time to end."""
        try:
            entry = self._finals.get(timeout=TAIL_SECONDS)
            while True:
                if entry is None:
                    return False
                waiting.append(entry)
                entry = self._finals.get_nowait()
        except queue.Empty:
            return True

    def _project(self) -> str:
        """Append new receipts; what went wrong, if anything did. Nothing is lost by failing: the journal has it."""
        try:
            while self._projector.project():
                pass  # there may be more than one transaction takes
        except Exception as error:  # whatever it is, requests must be refused until it is gone
            log.exception("receipt log")
            return f"{type(error).__name__}: {error}"
        return ""

    def _checkpoint(self, *, now: bool = False) -> None:
        """Sign a checkpoint when it is time. Answers don't wait for one, so a failure is a matter for the log file."""
        try:
            if self._checkpointer.sign_due(now=now):
                self._projector.release(self._checkpointer.signed_size)
                self._checkpoint_fault = ""
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
            if fault != self._checkpoint_fault:
                log.error("no checkpoint: %s", fault)
            self._checkpoint_fault = fault

    def _answer_ready(self, waiting: list[_Waiting]) -> list[_Waiting]:
        """Give each its receipt, with the salts that open its commitments; the log keeps them until told to forget."""
        if not waiting:
            return []
        first = self._log.first_completion
        completed = first + self._log.size()
        still = []
        for entry in waiting:
            if entry.chunk.seq < completed:
                receipt = self._log.receipt_json(entry.chunk.seq - first, with_salts=True)
                entry.answer.send_response(entry.chunk, json.dumps(receipt, separators=(",", ":")), first=entry.first)
            elif time.monotonic() < entry.until:
                still.append(entry)
            else:
                entry.answer.fail(
                    Unavailable(f"the receipt log can't take the receipt of request {entry.chunk.request_id} now")
                )
        return still
