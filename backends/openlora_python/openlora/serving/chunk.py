"""What generation hands to attribution: one sealed tensor a response, and the control messages that go back."""

from __future__ import annotations

from typing import Literal

import msgspec

from .seal import Seal


class Chunk(msgspec.Struct, frozen=True, omit_defaults=True):
    """One response of generation.

    `hello` is answered with an `ack` over the control socket before any token is made: a client that calls
    generation directly never gets past it. `probe` carries nothing and lets attribution see a cancel. `last` names
    the journal record that the receipt is made of. `stopped` answers a `stop` request.
    """

    kind: Literal["hello", "probe", "delta", "last", "stopped"]
    request_id: str
    index: int  # counts the chunks of a request; one that comes twice is refused
    text: str = ""
    token_ids: tuple[int, ...] = ()
    num_input_tokens: int = 0
    finish_reason: str = ""
    seq: int = -1  # of the journal's completion record, on the last one
    logprobs: str = ""  # JSON
    cumulative_logprob: float | None = None
    coalesced: bool = False  # many streams are live: looking for a cancel with every response would cost too much


class Control(msgspec.Struct, frozen=True, omit_defaults=True):
    """What attribution tells generation."""

    op: Literal["ack", "cancel", "log_ready", "log_failed"]
    request_id: str = ""
    reason: str = ""


def seal_chunk(seal: Seal, chunk: Chunk) -> bytes:
    return seal.close(msgspec.json.encode(chunk))


def open_chunk(seal: Seal, sealed: bytes) -> Chunk:
    return msgspec.json.decode(seal.open(sealed), type=Chunk)


def seal_control(seal: Seal, control: Control) -> bytes:
    return seal.close(msgspec.json.encode(control))


def open_control(seal: Seal, sealed: bytes) -> Control:
    return msgspec.json.decode(seal.open(sealed), type=Control)
