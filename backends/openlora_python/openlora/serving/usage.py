"""What one request used, into the journal: durable before it counts, commitments instead of text."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

from ..attribution.blobs import adapters_blob, runtime_blob
from ..attribution.commitments import SALT_BYTES, output_commitment, prompt_commitment
from ..attribution.frames import IntentFrame, ProgressFrame
from ..attribution.journal import Journal
from ..engine.api import EngineInfo
from .access.quota import QuotaLedger
from .ticket import Ticket


class RequestUsage:
    """Bridges one request's coroutine and the journal's own thread."""

    journalled = False  # the intent may be in the journal
    completed = False  # and so is its end, which the ledger has booked

    def __init__(self, journal: Journal, ledger: QuotaLedger, started_at: int) -> None:
        """`started_at`: seconds since 1970, of the reservation."""
        self._journal = journal
        self._ledger = ledger
        self._started_at = started_at
        self._loop = asyncio.get_running_loop()
        self._request_id: str | None = None  # set once the intent is durable
        self._output = output_commitment(bytes(SALT_BYTES))
        self._out_tokens = 0

    async def begin(self, ticket: Ticket, info: EngineInfo, in_tokens: int, prompt_text: str) -> None:
        """Write the intent; returns when it is on disk.

        Raises:
            Unavailable: the journal can't promise that.
        """
        prompt_salt, output_salt = os.urandom(SALT_BYTES), os.urandom(SALT_BYTES)
        self._output = output_commitment(output_salt)
        intent = IntentFrame(
            request_id=ticket.request_id,
            caller=ticket.caller,
            label=ticket.label,
            base_digest=info.base_digest,
            runtime=runtime_blob(info),
            adapters=adapters_blob(ticket.adapters),
            terms=ticket.terms,
            registry=ticket.registry,
            prompt_salt=prompt_salt,
            output_salt=output_salt,
            prompt_commit=prompt_commitment(prompt_salt, prompt_text),
            in_tokens=in_tokens,
            started_at=self._started_at,
            accounts=tuple(quota.account for quota in ticket.quotas),
        )

        def append(done: Callable[..., None], failed: Callable[[BaseException], None]) -> None:
            self._journal.append([intent], done, failed)
            self.journalled = True

        await self._durable(append)
        self._request_id = ticket.request_id

    def count_token(self) -> None:
        self._out_tokens += 1

    @property
    def output_tokens(self) -> int:
        return self._out_tokens

    def add_text(self, text: str) -> None:
        self._output.update(text.encode())

    def progress(self) -> ProgressFrame:
        """What is about to be sent: in the journal before it leaves, so that a killed answer's receipt counts it."""
        return ProgressFrame(self._request_id, self._out_tokens, self._output.digest())

    async def complete(self, status: int) -> int:
        """Write the completion; its number, once it is on disk."""
        request_id, out_tokens, commit = self._request_id, self._out_tokens, self._output.digest()
        ended_at = int(time.time())

        def append(done: Callable[..., None], failed: Callable[[BaseException], None]) -> None:
            def durable(seq: int) -> None:
                self._ledger.book(seq, request_id, out_tokens)  # on the journal's thread, and so in its order
                done(seq)

            self._journal.append_completion(request_id, status, out_tokens, commit, ended_at, durable, failed)

        seq = await self._durable(append)
        self._request_id = None
        self.completed = True
        return seq

    async def complete_if_begun(self, status: int) -> None:
        if self._request_id is not None:
            await self.complete(status)

    async def _durable(
        self, append: Callable[[Callable[..., None], Callable[[BaseException], None]], None]
    ) -> int | None:
        """Wait for the journal's thread to call back: with the value it gives, or with its failure."""
        outcome: asyncio.Future[int | None] = self._loop.create_future()

        def done(value: int | None = None) -> None:
            self._loop.call_soon_threadsafe(outcome.set_result, value)

        def failed(error: BaseException) -> None:
            self._loop.call_soon_threadsafe(outcome.set_exception, error)

        append(done, failed)
        return await outcome
