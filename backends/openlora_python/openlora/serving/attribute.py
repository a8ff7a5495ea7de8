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
from dataclasses import dataclass
from typing import Protocol

import zmq

from ..attribution.log import ReceiptLog
from ..attribution.projection import Projector
from ..config import RunConfig
from ..errors import NotAuthenticated, OpenLoRAError, Unavailable
from .chunk import Chunk, Control, open_chunk, seal_control
from .seal import Seal
from .status import StatusReporter

RECEIPT_SECONDS = 5.0  # how long an answer waits for a receipt that the log can't take
TAIL_SECONDS = 0.2  # how often the journal is looked at when nobody waits for a receipt
REMEMBERED_REQUESTS = 100_000  # finished ones whose chunks are refused if they come again
FINISHED = 1 << 62

log = logging.getLogger(__name__)


class Answer(Protocol):
    """Where one response goes: the sender of one call of this step."""

    def send_response(self, chunk: Chunk, receipt: str) -> None: ...

    def fail(self, error: OpenLoRAError) -> None: ...

    def finish(self) -> None: ...


@dataclass(frozen=True)
class _Waiting:
    chunk: Chunk
    answer: Answer
    until: float  # on the monotonic clock


class AttributionStep:
    """One instance, in order. `take` runs on Triton's thread; receipts are made on the commit thread."""

    def __init__(self, run: RunConfig) -> None:
        self._chunk_seal = Seal(run.run_key_path, "usage")
        self._control_seal = Seal(run.run_key_path, "control")
        self._context = zmq.Context.instance()
        self._control = self._connect_control(run)
        self._next_index: collections.OrderedDict[str, int] = collections.OrderedDict()
        self._finals: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._log = ReceiptLog.open(run.state_dir, origin=run.settings.attribution.origin)
        self._projector = Projector(run.journal_dir, self._log)
        self._run = run
        self._thread = threading.Thread(target=self._commit, name="receipts", daemon=True)
        self._thread.start()

    def take(self, sealed: bytes, cancelled: bool, answer: Answer) -> None:
        """One response of generation on its way to the client."""
        try:
            chunk = open_chunk(self._chunk_seal, sealed)
            self._refuse_repeats(chunk)
        except OpenLoRAError as error:
            answer.fail(error)
            return
        if chunk.kind == "hello":
            self._tell(self._control, Control("ack", chunk.request_id))
        if cancelled and chunk.kind in ("hello", "probe", "delta"):
            self._tell(self._control, Control("cancel", chunk.request_id))
        if chunk.kind in ("hello", "probe"):
            answer.finish()
        elif chunk.kind == "last":
            self._finals.put(_Waiting(chunk, answer, time.monotonic() + RECEIPT_SECONDS))
        else:
            answer.send_response(chunk, "")

    def close(self) -> None:
        self._finals.put(None)
        self._thread.join()

    def _refuse_repeats(self, chunk: Chunk) -> None:
        expected = self._next_index.get(chunk.request_id, 0)
        if chunk.index < expected:
            raise NotAuthenticated("this response was passed on before: call the ensemble `openlora`")
        over = chunk.kind in ("last", "stopped")
        self._next_index[chunk.request_id] = FINISHED if over else chunk.index + 1
        if over:
            self._next_index.move_to_end(chunk.request_id)
        while len(self._next_index) > REMEMBERED_REQUESTS:
            self._next_index.popitem(last=False)

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
                self._log.close()
                return
            before = fault
            fault = self._project()
            if fault != before:
                self._tell(control, Control("log_failed" if fault else "log_ready", reason=fault))
            status.report(ready=not fault, reason=fault)
            waiting = self._answer_ready(waiting)

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

    def _answer_ready(self, waiting: list[_Waiting]) -> list[_Waiting]:
        """Give each its receipt, with the salts that open its commitments: they leave the log this once."""
        size = self._log.size() if waiting else 0
        still = []
        for entry in waiting:
            if entry.chunk.seq < size:
                receipt = self._log.receipt_json(entry.chunk.seq, with_salts=True)
                entry.answer.send_response(entry.chunk, json.dumps(receipt, separators=(",", ":")))
            elif time.monotonic() < entry.until:
                still.append(entry)
            else:
                entry.answer.fail(
                    Unavailable(f"the receipt log can't take the receipt of request {entry.chunk.request_id} now")
                )
        return still
