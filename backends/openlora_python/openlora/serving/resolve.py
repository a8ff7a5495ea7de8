"""Step 1: what a request asks for, decided once. The only parser of client input.

About a millisecond, never blocks on a download: parse, check the caller, pin every adapter to a version, pick the
terms, and seal all of it into a ticket that only the generation step of this server run accepts.
"""

from __future__ import annotations

import json
import secrets
import time
from pathlib import Path
from typing import Any

from ..adapters.adapter_spec import AdapterSpec, parse_adapters
from ..adapters.catalog_reader import CatalogReader
from ..adapters.catalog_rows import CHAIN_NAME, AdapterRecord
from ..adapters.chain_view import ChainView
from ..adapters.missing_files import not_fetchable
from ..adapters.sources import is_uri
from ..adapters.store import mark_used
from ..attribution.blobs import NO_PARAMETERS, terms_blob
from ..attribution.card import Card, parse_card
from ..config import RunConfig
from ..engine.api import AdapterUse, Sampling
from ..engine.one_adapter.rank_sum import check_rank_sum
from ..errors import AdapterInvalid, AdapterNotFound, InvalidArgument, Unavailable
from .access.policy import AccessPolicy
from .access.rate_limit import RateLimiter
from .chain import RETRY_MS as CHAIN_RETRY_MS
from .chain import registry_preimage, served_chain
from .guides import GUIDE_TENSOR, TYPE_TENSOR, guide_of
from .routing import Router
from .sampling_parameters import SamplingParameters, merge_sampling
from .seal import Seal
from .ticket import LIFETIME_SECONDS, Quota, TextOptions, Ticket, TicketOffice, text_digest

# Tensors that are sampling parameters, and what vLLM calls them.
SAMPLING_TENSORS = {
    "max_tokens": "max_tokens",
    "min_tokens": "min_tokens",
    "top_k": "top_k",
    "temperature": "temperature",
    "top_p": "top_p",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "seed": "seed",
    "stop_words": "stop",
    "bad_words": "bad_words",
}
# Inputs that other servers' clients send; only values that change nothing are taken.
NEUTRAL = {
    "beam_width": (1,),
    "num_return_sequences": (1,),
    "length_penalty": (0.0, 1.0),
}
MAX_LABEL_BYTES = 256
MARKS = 4  # of a copy's use within the time that a use protects it
IGNORED_PARAMETERS = frozenset({"id"})  # the id of a generate body arrives as a parameter as well


class ResolverStep:
    """Turns the inputs of one request into a sealed ticket."""

    def __init__(self, run: RunConfig) -> None:
        self._run = run
        self._limits = run.settings.limits
        self._chain = served_chain(run)
        self._policy = AccessPolicy(run, None if self._chain is None else self._chain.holdings)
        self._rates = RateLimiter()
        self._catalog = CatalogReader(run.catalog_path)
        self._router = Router(run.catalog_path)
        self._office = TicketOffice(Seal(run.run_key_path, "ticket"))
        self._base_card = _card(run.base.card)
        self._mark_seconds = run.settings.sources.keep_seconds / MARKS

    def resolve(self, inputs: dict[str, Any], parameters: dict[str, Any], label: str) -> bytes:
        """The ticket.

        Args:
            inputs: the tensors that were sent, as Python values (STRING as bytes, STRING[-1] as a list of bytes).
            parameters: the request's parameters, where misspelt keys of a generate body end up.
            label: the client's own request id.

        Raises:
            InvalidArgument, AdapterNotFound, AdapterInvalid, QuotaExceeded, Unavailable.
        """
        if "text_input" not in inputs:
            raise InvalidArgument("missing", field="text_input")
        text = inputs["text_input"]
        if len(text) > self._limits.max_prompt_bytes:
            raise InvalidArgument(
                f"at most {self._limits.max_prompt_bytes} bytes on this server, got {len(text)}", field="text_input"
            )
        _text(text, "text_input")
        if len(label.encode()) > MAX_LABEL_BYTES:
            raise InvalidArgument(f"at most {MAX_LABEL_BYTES} bytes, got {len(label.encode())}", field="id")
        caller = self._policy.caller(_optional_text(inputs, "api_key"))
        common = {
            "request_id": secrets.token_hex(32),
            "label": label,
            "caller": caller,
            "expires_at": time.time() + LIFETIME_SECONDS,
            "text_sha256": text_digest(text),
        }
        if inputs.get("stop", False):
            return self._office.issue(Ticket(kind="stop", **common))
        limits = self._policy.limits(caller)
        callers_quota = Quota(f"caller:{caller}", limits.tokens_per_day)
        self._rates.take([(callers_quota.account, limits.requests_per_minute)])
        self._refuse_unsupported(inputs)
        sampling = self._sampling(inputs, parameters)
        key = _routing_key(caller, label, sampling.routing_key)
        records, view = self._pin(caller, key, self._asked_for(inputs, sampling))
        digests = [record.digest for _, record in records]
        if len(set(digests)) != len(digests):
            raise InvalidArgument("two of the names are the same adapter", field="adapters")
        if self._run.settings.engine.one_adapter:
            check_rank_sum([record.rank for _, record in records], self._run.settings.engine.max_rank)
        return self._office.issue(
            Ticket(
                kind="generate",
                **common,
                stream=bool(inputs.get("stream", False)),
                timeout_ms=min(sampling.timeout_ms or self._limits.timeout_ms, self._limits.max_timeout_ms),
                priority=max(sampling.priority, self._limits.highest_priority),
                cache_salt="" if self._run.settings.engine.prefix_cache == "shared" else caller,
                adapters=tuple(
                    AdapterUse(record.digest, str(self._cached(record)), spec.weight, record.pinned)
                    for spec, record in records
                ),
                adapter_names=tuple(record.name for _, record in records),
                sampling=self._for_engine(inputs, sampling),
                text=TextOptions(
                    stop=sampling.stop or (),
                    bad_words=sampling.bad_words or (),
                    include_stop=sampling.include_stop_str_in_output,
                    skip_special_tokens=sampling.skip_special_tokens,
                    add_special_tokens=sampling.add_special_tokens,
                    echo=not inputs.get("exclude_input_in_output", True),
                ),
                terms=self._terms([record for _, record in records], view),
                registry=registry_preimage(view),
                quotas=(callers_quota, *self._granted([record.name for _, record in records])),
            )
        )

    def _pin(
        self, caller: str, key: str, specs: tuple[AdapterSpec, ...]
    ) -> tuple[list[tuple[AdapterSpec, AdapterRecord]], ChainView | None]:
        """The adapters, and the block whose terms they have: all read in one, so that no ticket mixes two blocks."""
        with self._catalog.snapshot():
            view = None if self._chain is None else self._chain.view(self._catalog)

            def pinned(named: AdapterSpec) -> AdapterRecord:
                return self._pinned(caller, named, view)

            def knows(named: AdapterSpec) -> bool:
                return self._may_know(caller, named.name, named.version)

            try:
                return [(spec, self._router.pin(spec, key, pinned, knows)) for spec in specs], view
            except AdapterNotFound:
                # Whatever was asked for, so that nobody learns by this what there is.
                if self._chain is not None and self._chain.awaits(caller):
                    raise Unavailable(
                        f"what {caller} holds is being read from the chain", retry_after_ms=CHAIN_RETRY_MS
                    ) from None
                raise

    def _cached(self, record: AdapterRecord) -> Path:
        """Where its bytes are, or will be before the engine reads them: those of a remote source are fetched."""
        path = self._run.adapter_cache / record.digest
        if not mark_used(path, self._mark_seconds) and not is_uri(record.source):
            raise Unavailable(f"adapter {record.name}: {not_fetchable(record)}")
        return path

    def _sampling(self, inputs: dict[str, Any], parameters: dict[str, Any]) -> SamplingParameters:
        tensors: dict[str, Any] = {}
        for tensor, name in SAMPLING_TENSORS.items():
            if tensor in inputs:
                value = inputs[tensor]
                tensors[name] = [_text(item, tensor) for item in value] if isinstance(value, list) else value
        named = {name: value for name, value in parameters.items() if name not in IGNORED_PARAMETERS}
        sampling = merge_sampling(tensors, _optional_text(inputs, "sampling_parameters"), named)
        if sampling.max_tokens > self._limits.max_tokens:
            raise InvalidArgument(
                f"at most {self._limits.max_tokens} on this server, got {sampling.max_tokens}", field="max_tokens"
            )
        if sampling.min_tokens > sampling.max_tokens:
            raise InvalidArgument(
                f"at most max_tokens ({sampling.max_tokens}), got {sampling.min_tokens}", field="min_tokens"
            )
        return sampling

    def _for_engine(self, inputs: dict[str, Any], sampling: SamplingParameters) -> Sampling:
        wants_logprobs = any(inputs.get(flag) for flag in ("return_log_probs", "return_logprobs"))
        wants_logprobs = wants_logprobs or bool(inputs.get("return_cumulative_logprob"))
        logprobs = sampling.logprobs if sampling.logprobs is not None else (0 if wants_logprobs else None)
        return Sampling(
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=max(sampling.top_k, 0),
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            seed=secrets.randbits(53) if sampling.seed is None else sampling.seed,
            seed_given=sampling.seed is not None,
            eos_token_ids=() if sampling.ignore_eos else self._run.base.eos_token_ids,
            stop_token_ids=sampling.stop_token_ids or (),
            logprobs=logprobs,
            guide=guide_of(_optional_text(inputs, TYPE_TENSOR), _optional_text(inputs, GUIDE_TENSOR), sampling),
        )

    def _asked_for(self, inputs: dict[str, Any], sampling: SamplingParameters) -> tuple[AdapterSpec, ...]:
        spec = _optional_text(inputs, "adapters")
        if sampling.lora_name is not None:
            if spec is not None:
                raise InvalidArgument("given twice with this request, as adapters and as lora_name", field="adapters")
            try:
                return parse_adapters(sampling.lora_name)
            except InvalidArgument as error:
                raise InvalidArgument(error.message, field="lora_name") from error
        return () if spec is None else parse_adapters(spec)

    def _pinned(self, caller: str, spec: AdapterSpec, view: ChainView | None) -> AdapterRecord:
        """The exact version. What a caller may not use gets the same words as what does not exist."""
        version = f" version {spec.version!r:.80}" if spec.version else ""
        unknown = AdapterNotFound(f"no adapter {spec.name!r}{version}")
        if CHAIN_NAME.fullmatch(spec.name):
            if self._chain is None:
                raise unknown
            if not self._chain.grants(view):  # before it is looked up: the same for what does not exist
                raise Unavailable("the chain was not heard of for too long", retry_after_ms=CHAIN_RETRY_MS)
        try:
            record = self._catalog.find(spec.name, spec.version)
        except AdapterNotFound:
            raise unknown from None
        except InvalidArgument:  # what is wrong with the version is only for those who may know of the name
            if self._may_know(caller, spec.name):
                raise
            raise unknown from None
        if not self._policy.allows(caller, record):
            raise unknown
        if record.status != "ready":
            raise AdapterInvalid(f"adapter {spec.name!r}: {record.reason}")
        return record

    def _may_know(self, caller: str, name: str, version: int | str | None = None) -> bool:
        try:
            return self._policy.allows(caller, self._catalog.find(name, version))
        except AdapterNotFound:
            return False

    def _granted(self, names: list[str]) -> list[Quota]:
        """The adapters' own quotas, once their request rates have allowed one more."""
        limits = {f"adapter:{name}": self._policy.adapter_limits(name) for name in names}
        self._rates.take([(account, one.requests_per_minute) for account, one in limits.items()])
        return [Quota(account, one.tokens_per_day) for account, one in limits.items()]

    def _terms(self, records: list[AdapterRecord], view: ChainView | None) -> dict[str, Any]:
        base_card, parameters = self._base_card, NO_PARAMETERS
        if view is not None:
            base_card, parameters = _card(view.base_card) or base_card, view.parameters or parameters
        return terms_blob(
            (self._run.base.digest, base_card), [(one.digest, _card(one.card)) for one in records], parameters
        )

    def _refuse_unsupported(self, inputs: dict[str, Any]) -> None:
        for name, neutral in NEUTRAL.items():
            if name in inputs:
                value = inputs[name]
                value = _text(value, name) if isinstance(value, bytes) else value
                if value not in neutral:
                    raise InvalidArgument(f"not supported, only {neutral[0]!r} is taken, got {value!r:.80}", field=name)
        end_id = inputs.get("end_id")
        if end_id is not None and end_id not in (-1, *self._run.base.eos_token_ids):
            raise InvalidArgument(
                f"the model ends with {list(self._run.base.eos_token_ids)}, got {end_id}; use stop_token_ids",
                field="end_id",
            )


def _routing_key(caller: str, label: str, key: str | None) -> str:
    """What a group's choice follows: the key that was sent, or else the client's id, or else nothing but chance."""
    if key is None and not label:
        return secrets.token_hex(16)
    return json.dumps([caller, "label", label] if key is None else [caller, "key", key])


def _card(document: dict[str, Any] | None) -> Card | None:
    return parse_card(document) if document else None


def _text(value: bytes, field: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"not UTF-8: byte {error.start} is {value[error.start]:#04x}", field=field) from error


def _optional_text(inputs: dict[str, Any], name: str) -> str | None:
    return _text(inputs[name], name) if name in inputs else None
