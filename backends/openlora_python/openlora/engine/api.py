"""The protocol that every engine meets: token ids in, token ids out, adapters named by digest.

The structs travel between the generation step and the engine process (msgpack), so an engine may live under
another interpreter: this module imports nothing but the standard library and msgspec.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

WEIGHT_ONE = 1_000_000
"""Adapter weights are integers in 1e-6 units: the engine computes with the weight that the receipt records."""


class AdapterUse(msgspec.Struct, frozen=True):
    """One adapter of a request. `path` is a validated, content-addressed copy that never changes."""

    digest: str  # manifest digest, 64 hex digits
    path: str
    weight: int  # 1e-6 units; the adapter's own scaling comes on top
    pinned: bool = False  # by the catalog: evicted last from memory; as of the adapter's latest use


GUIDE_KINDS = ("json", "json_schema", "regex", "grammar", "choice")
MAX_GUIDE_BYTES = 64 * 1024


class Guide(msgspec.Struct, frozen=True):
    """What the text of the whole output must be: the output ends where it is complete.

    `json`: any JSON object; `json_schema`: JSON that is valid under the schema `text`; `regex`: a match of `text` from
    begin to end, in Rust's syntax; `grammar`: a sentence of `text`, which is GBNF (`root ::= …`) or Lark
    (`start: …`); `choice`: one of the strings in the JSON list `text`.
    """

    kind: str  # one of GUIDE_KINDS
    text: str = ""  # UTF-8 of at most MAX_GUIDE_BYTES
    field: str = "guide"  # what errors call it: the name under which the client sent it


class Sampling(msgspec.Struct, frozen=True):
    """How to choose tokens; every field is normalised and in range before it gets here."""

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0  # a draw is a function of (seed, output position)
    seed_given: bool = False  # by the client: an engine that can't follow a seed then refuses the request
    eos_token_ids: tuple[int, ...] = ()  # empty = ignore EOS
    stop_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences never to be completed
    logprobs: int | None = None  # None = none; 0 = of the chosen token; n = and of the n most likely
    guide: Guide | None = None


class EngineRequest(msgspec.Struct, frozen=True):
    """One answer to make. Prompt and `max_tokens` together fit the model; all adapters are of its base model."""

    request_id: str
    prompt: tuple[int, ...]
    adapters: tuple[AdapterUse, ...]  # empty = base model
    sampling: Sampling
    priority: int = 0  # lower runs earlier
    timeout: float | None = None  # seconds from submission; then it ends with the error DEADLINE_EXCEEDED
    cache_salt: str = ""  # prompts share cached prefixes only under the same salt


class TokenLogprob(msgspec.Struct, frozen=True):
    """Natural-log probabilities under the model, before temperature and filters."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first


class EngineOutput(msgspec.Struct):
    """What one step made for one request. The last one of a request has a `finish_reason`."""

    request_id: str
    token_ids: list[int]
    finish_reason: str = ""  # stop | length | cancelled | error
    error: str = ""  # str() of an OpenLoRAError, with finish_reason "error"
    logprobs: list[TokenLogprob] | None = None
    cached_tokens: int = 0  # on the first one with tokens: of the prompt, taken from the prefix cache
    queue_seconds: float = 0.0  # on the same one: from submission until it got a row


class EngineInfo(msgspec.Struct, frozen=True):
    """Facts about a loaded engine: what receipts record and what the steps before it check against."""

    engine: str  # "torch"
    version: str  # of the engine and the libraries it computes with
    base_digest: str  # 64 hex digits
    dtype: str
    quantization: str
    device: str
    max_model_len: int
    vocab_size: int
    max_rank: int
    max_adapters: int  # device slots: distinct adapters in one step
    one_adapter: bool = False  # a request has one adapter, its ensembles are written out: ranks add up to max_rank


class AdapterStats(msgspec.Struct, frozen=True):
    """Where adapters are, and since the start how requests found them: one of a request counts where it was when the
    request was submitted."""

    slots: int = 0
    slots_filled: int = 0  # adapters on the device
    host_adapters: int = 0  # adapters in host memory
    host_bytes: int = 0  # of those, and of loads in progress
    host_limit_bytes: int = 0
    hits_device: int = 0
    hits_host: int = 0
    hits_disk: int = 0
    loads: int = 0  # from disk to host …
    read_seconds: float = 0.0  # … which took so long
    failed_loads: int = 0
    placed: int = 0  # copied from host to device, where that is a copy …
    place_seconds: float = 0.0  # … which took so long
    evictions_device: int = 0
    evictions_host: int = 0


class EngineStats(msgspec.Struct, frozen=True):
    """What an engine has done since its start, and what it holds now; 0 where an engine knows no such thing."""

    steps: int  # since the start
    running: int  # requests with a row in the batch
    waiting: int  # requests without one, whether for a row, blocks or their adapters
    kv_blocks_used: int  # by requests
    kv_blocks_total: int
    adapters_loaded: int  # that a step can use at once
    kv_blocks_cached: int = 0  # held by nobody, with prefixes that may be asked for again
    prefix_lookup_tokens: int = 0  # since the start: of prompts that were looked up in the prefix cache …
    prefix_hit_tokens: int = 0  # … and those of them that were in it
    preemptions: int = 0  # since the start
    adapters: AdapterStats = AdapterStats()


Emit = Callable[[list[EngineOutput]], None]
"""Takes everything that one step made, once a step, on the engine's own thread."""


class Engine(Protocol):
    """An engine owns batching, KV cache and adapters. Calls are thread-safe and return at once."""

    info: EngineInfo
    failed: Exception | None  # why it can't go on: whoever hosts it replaces it
    ending: bool  # it takes no new requests …
    ended: bool  # … and has answered all it took: whoever hosts it replaces it

    def start(self, emit: Emit) -> None:
        """Start the step loop."""

    def submit(self, request: EngineRequest) -> None:
        """Queue a request. Every accepted request ends in exactly one output with a finish reason."""

    def cancel(self, request_id: str) -> None:
        """Stop a request, whatever phase it is in; it ends as `cancelled`. An unknown id is ignored."""

    def stats(self) -> EngineStats: ...

    def shutdown(self) -> None:
        """Stop the step loop; running requests are dropped."""
