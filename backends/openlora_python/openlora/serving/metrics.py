"""What the metrics port says of requests and adapters; `docs/metrics.md` explains every family.

Free of Triton: `Registry` is its binding. Telling Triton of a change is a round trip between two processes, so changes
are gathered here and published together. Triton keeps a label for as long as it runs, so the labels are bounded.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from ..errors import OpenLoRAError

BASE = "base"  # reserved: no adapter has this name
OTHER = "other"  # all adapters beyond the limit, and one of this name
SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


@dataclass(frozen=True)
class Family:
    """Metrics of one name, told apart by their labels."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    buckets: tuple[float, ...] = ()  # upper bounds, of a histogram


class Metric(Protocol):
    """A counter takes `increment`, a gauge `set`, a histogram `observe`."""

    def increment(self, amount: float) -> None: ...

    def set(self, value: float) -> None: ...

    def observe(self, value: float) -> None: ...


class Registry(Protocol):
    """Where metrics are made. The same family and labels are asked for once."""

    def metric(self, family: Family, labels: dict[str, str]) -> Metric: ...


REQUESTS = Family("openlora_requests_total", "counter", "Requests that ended, by outcome")
PROMPT_TOKENS = Family("openlora_prompt_tokens_total", "counter", "Prompt tokens of requests that ended")
OUTPUT_TOKENS = Family("openlora_output_tokens_total", "counter", "Output tokens of requests that ended")
QUEUE = Family("openlora_queue_seconds", "histogram", "From submission to a row in the engine", SECONDS_BUCKETS)
FIRST_TOKEN = Family(
    "openlora_time_to_first_token_seconds", "histogram", "From acceptance to the first token", SECONDS_BUCKETS
)
ADAPTER_REQUESTS = Family("openlora_adapter_requests_total", "counter", "Requests that ended, by adapter and outcome")
ADAPTER_PROMPT_TOKENS = Family("openlora_adapter_prompt_tokens_total", "counter", "Prompt tokens by adapter")
ADAPTER_OUTPUT_TOKENS = Family("openlora_adapter_output_tokens_total", "counter", "Output tokens by adapter")
ADAPTER_FIRST_TOKENS = Family(
    "openlora_adapter_first_tokens_total", "counter", "Requests with a first token, by adapter: what the sums are over"
)
ADAPTER_QUEUE = Family("openlora_adapter_queue_seconds_total", "counter", "Sum of queue times by adapter")
ADAPTER_FIRST_TOKEN = Family(
    "openlora_adapter_time_to_first_token_seconds_total", "counter", "Sum of times to first token by adapter"
)
FETCHES = Family(
    "openlora_adapter_fetches_total", "counter", "Adapters fetched into the cache for requests, by outcome"
)
FETCH_SECONDS = Family(
    "openlora_adapter_fetch_seconds", "histogram", "From the first request to the bytes in the cache", SECONDS_BUCKETS
)
FETCHED = "fetched"
REFUSED = Family("openlora_requests_refused_total", "counter", "Requests that the resolver refused, by error code")


def outcome_of(error: OpenLoRAError) -> str:
    """The outcome of a request that failed: its error code, in lower case."""
    return error.code.lower()


@dataclass(frozen=True)
class RequestRecord:
    """One request that is over."""

    adapters: tuple[str, ...] | None  # names; empty = the base model; None = nobody knows
    outcome: str  # finish reason, or `outcome_of` an error
    prompt_tokens: int = 0
    output_tokens: int = 0
    queue_seconds: float | None = None  # None = it never got a token
    first_token_seconds: float | None = None


class AdapterLabels:
    """Label values for adapters: the first `limit` names that come have their own, for good."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._own: set[str] = set()

    def label(self, name: str) -> str:
        if name not in self._own and name not in (BASE, OTHER):
            if len(self._own) >= self._limit:
                return OTHER
            self._own.add(name)
        return name


_Series = tuple[Family, tuple[tuple[str, str], ...]]


@dataclass
class _Gathered:
    """What happened since it was last published."""

    amounts: Counter[_Series] = field(default_factory=Counter)
    observations: list[tuple[Family, float]] = field(default_factory=list)

    def add(self, family: Family, amount: float, **labels: str) -> None:
        self.amounts[family, tuple(labels.items())] += amount


class ServingMetrics:
    """Metrics of the generation step. `record` is for any thread, `publish` for one."""

    def __init__(self, registry: Registry, adapter_labels: int) -> None:
        self._registry = registry
        self._labels = AdapterLabels(adapter_labels)
        self._lock = threading.Lock()
        self._gathered = _Gathered()
        self._metrics: dict[_Series, Metric] = {}

    def record(self, request: RequestRecord) -> None:
        """Count a request; an ensemble counts for each of its adapters."""
        with self._lock:
            gathered = self._gathered
            gathered.add(REQUESTS, 1, outcome=request.outcome)
            gathered.add(PROMPT_TOKENS, request.prompt_tokens)
            gathered.add(OUTPUT_TOKENS, request.output_tokens)
            for family, seconds in ((QUEUE, request.queue_seconds), (FIRST_TOKEN, request.first_token_seconds)):
                if seconds is not None:
                    gathered.observations.append((family, seconds))
            if request.adapters is not None:
                # Two of them may share the label for the rest: then it counts once.
                for label in {self._labels.label(name) for name in request.adapters or (BASE,)}:
                    self._record_adapter(gathered, label, request)

    def record_fetch(self, error: OpenLoRAError | None, seconds: float) -> None:
        """Count an adapter that was fetched, for however many requests, or wasn't."""
        with self._lock:
            self._gathered.add(FETCHES, 1, outcome=FETCHED if error is None else outcome_of(error))
            if error is None:
                self._gathered.observations.append((FETCH_SECONDS, seconds))

    def _record_adapter(self, gathered: _Gathered, label: str, request: RequestRecord) -> None:
        gathered.add(ADAPTER_REQUESTS, 1, adapter=label, outcome=request.outcome)
        gathered.add(ADAPTER_PROMPT_TOKENS, request.prompt_tokens, adapter=label)
        gathered.add(ADAPTER_OUTPUT_TOKENS, request.output_tokens, adapter=label)
        if request.queue_seconds is not None and request.first_token_seconds is not None:
            gathered.add(ADAPTER_FIRST_TOKENS, 1, adapter=label)
            gathered.add(ADAPTER_QUEUE, request.queue_seconds, adapter=label)
            gathered.add(ADAPTER_FIRST_TOKEN, request.first_token_seconds, adapter=label)

    def publish(self) -> None:
        """Tell the registry what was gathered."""
        with self._lock:
            gathered, self._gathered = self._gathered, _Gathered()
        for (family, labels), amount in gathered.amounts.items():
            metric = self._metric(family, labels)  # with nothing to add as well: a zero is worth more than a gap
            if amount:
                metric.increment(amount)
        for family, seconds in gathered.observations:
            self._metric(family).observe(seconds)

    def _metric(self, family: Family, labels: Sequence[tuple[str, str]] = ()) -> Metric:
        series = (family, tuple(labels))
        metric = self._metrics.get(series)
        if metric is None:
            metric = self._metrics[series] = self._registry.metric(family, dict(labels))
        return metric


class RefusalMetrics:
    """Metrics of the resolver, which refuses before anything else happens."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._metrics: dict[str, Metric] = {}

    def count(self, error: OpenLoRAError) -> None:
        code = outcome_of(error)
        if code not in self._metrics:
            self._metrics[code] = self._registry.metric(REFUSED, {"code": code})
        self._metrics[code].increment(1)
