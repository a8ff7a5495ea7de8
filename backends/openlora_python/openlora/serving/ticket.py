"""The ticket: what the resolver decided about one request, sealed for the generation step.

Single-use, expiring, bound to the text by its SHA-256. Everything that generation does follows from it.
"""

from __future__ import annotations

import hashlib
import time
from typing import Any, Literal

import msgspec

from ..engine.api import AdapterUse, Sampling
from ..errors import NotAuthenticated
from .seal import Seal

LIFETIME_SECONDS = 30.0


class TextOptions(msgspec.Struct, frozen=True):
    """How text goes in and out; the engine knows nothing of it."""

    stop: tuple[str, ...] = ()
    bad_words: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    add_special_tokens: bool = True
    echo: bool = False  # the prompt in front of the first text


class Quota(msgspec.Struct, frozen=True):
    """An account that the request's tokens are booked on, and what it may take a day; None = only booked."""

    account: str  # `caller:NAME` or `adapter:NAME`
    tokens_per_day: int | None = None


class Ticket(msgspec.Struct, frozen=True):
    kind: Literal["generate", "stop"]
    request_id: str  # 64 hex digits, from the operating system's generator
    label: str  # the client's own id: not unique, only for `stop`
    caller: str
    expires_at: float  # seconds since the epoch
    text_sha256: str
    stream: bool = False
    timeout_ms: int = 120_000
    priority: int = 0
    cache_salt: str = ""  # who may use what this prompt leaves in the prefix cache: all with the same one
    adapters: tuple[AdapterUse, ...] = ()
    adapter_names: tuple[str, ...] = ()  # in the same order; for metrics
    sampling: Sampling = Sampling()
    text: TextOptions = TextOptions()
    terms: dict[str, Any] = {}  # the terms blob of the receipt
    registry: bytes = b""  # preimage of its registry reference; empty = none
    quotas: tuple[Quota, ...] = ()  # all of them or none: the caller's, and that of each adapter


def text_digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


class TicketOffice:
    """Issues tickets in the resolver, redeems them in generation."""

    def __init__(self, seal: Seal) -> None:
        self._seal = seal
        self._redeemed: dict[str, float] = {}  # request id -> when its ticket expires; oldest first

    def issue(self, ticket: Ticket) -> bytes:
        return self._seal.close(msgspec.json.encode(ticket))

    def redeem(self, sealed: bytes, text: bytes) -> Ticket:
        """The ticket, once.

        Raises:
            NotAuthenticated: forged, expired, used before, or made for another text.
        """
        ticket = msgspec.json.decode(self._seal.open(sealed), type=Ticket)
        now = time.time()
        while self._redeemed and (oldest := next(iter(self._redeemed))) and self._redeemed[oldest] < now:
            del self._redeemed[oldest]
        if ticket.expires_at < now:
            raise NotAuthenticated("the ticket has expired: call the ensemble `openlora`")
        if ticket.request_id in self._redeemed:
            raise NotAuthenticated("the ticket was used before: call the ensemble `openlora`")
        if ticket.text_sha256 != text_digest(text):
            raise NotAuthenticated("the ticket was made for another text: call the ensemble `openlora`")
        self._redeemed[ticket.request_id] = ticket.expires_at
        return ticket
