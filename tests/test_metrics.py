"""What is counted, under which labels, and when it is told; without Triton."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from operator import attrgetter

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openlora.engine.api import EngineStats
from openlora.errors import AdapterNotFound, EngineRestarted, Overloaded, Unavailable
from openlora.serving.engine_metrics import ENGINE_METRICS, EngineMetrics
from openlora.serving.metrics import (
    OTHER,
    AdapterLabels,
    Family,
    RefusalMetrics,
    RequestRecord,
    ServingMetrics,
    outcome_of,
)

NO_ENGINE = EngineStats(steps=0, running=0, waiting=0, kv_blocks_used=0, kv_blocks_total=0, adapters_loaded=0)


@dataclass
class Series:
    """One metric, and how often it was told something."""

    kind: str
    value: float = 0.0
    observed: list[float] = field(default_factory=list)
    calls: int = 0

    def increment(self, amount: float) -> None:
        assert self.kind == "counter" and amount >= 0
        self.value += amount
        self.calls += 1

    def set(self, value: float) -> None:
        assert self.kind == "gauge"
        self.value = value
        self.calls += 1

    def observe(self, value: float) -> None:
        assert self.kind == "histogram"
        self.observed.append(value)


class Memory:
    """A registry that is as strict as Triton's: each series is made once, all of a family with the same labels."""

    def __init__(self) -> None:
        self.series: dict[tuple[str, frozenset[tuple[str, str]]], Series] = {}
        self._labels: dict[str, set[str]] = {}

    def metric(self, family: Family, labels: dict[str, str]) -> Series:
        assert set(labels) == self._labels.setdefault(family.name, set(labels))
        assert bool(family.buckets) == (family.kind == "histogram")
        key = (family.name, frozenset(labels.items()))
        assert key not in self.series
        self.series[key] = Series(family.kind)
        return self.series[key]

    def value(self, name: str, **labels: str) -> float:
        return self.series[f"openlora_{name}", frozenset(labels.items())].value

    def observed(self, name: str) -> list[float]:
        return self.series[f"openlora_{name}", frozenset()].observed

    def labels(self, label: str) -> set[str]:
        return {dict(labels)[label] for _, labels in self.series if label in dict(labels)}


def test_a_request_counts_once_and_for_each_of_its_adapters() -> None:
    memory = Memory()
    metrics = ServingMetrics(memory, 10)
    metrics.record(RequestRecord(("a", "b"), "length", 5, 7, 0.25, 0.5))
    metrics.record(RequestRecord(("a",), "stop", 2, 1, 0.5, 1.0))
    metrics.record(RequestRecord((), "cancelled", 4, 0))
    metrics.record(RequestRecord(("b",), outcome_of(Overloaded("full"))))
    metrics.record(RequestRecord(None, "not_authenticated"))
    assert memory.series == {}  # nothing is told before it is published
    metrics.publish()
    outcomes = {outcome: memory.value("requests_total", outcome=outcome) for outcome in memory.labels("outcome")}
    assert outcomes == {"length": 1, "stop": 1, "cancelled": 1, "overloaded": 1, "not_authenticated": 1}
    assert (memory.value("prompt_tokens_total"), memory.value("output_tokens_total")) == (11, 8)
    assert (memory.observed("queue_seconds"), memory.observed("time_to_first_token_seconds")) == ([0.25, 0.5], [0.5, 1])
    assert memory.labels("adapter") == {"a", "b", "base"}
    for adapter, outcome in (
        ("a", "length"),
        ("b", "length"),
        ("a", "stop"),
        ("base", "cancelled"),
        ("b", "overloaded"),
    ):
        assert memory.value("adapter_requests_total", adapter=adapter, outcome=outcome) == 1
    names = ("prompt_tokens", "output_tokens", "first_tokens", "queue_seconds", "time_to_first_token_seconds")
    sums = {
        adapter: [memory.value(f"adapter_{name}_total", adapter=adapter) for name in names] for adapter in ("a", "b")
    }
    assert sums == {"a": [7, 8, 2, 0.75, 1.5], "b": [5, 7, 1, 0.25, 0.5]}


def test_what_was_gathered_is_told_at_once_and_only_once() -> None:
    memory = Memory()
    metrics = ServingMetrics(memory, 10)
    for _ in range(100):
        metrics.record(RequestRecord(("a",), "stop", 1, 1, 0.0, 0.0))
    for _ in range(3):
        metrics.publish()
    requests = memory.series["openlora_requests_total", frozenset({("outcome", "stop")})]
    assert (requests.value, requests.calls) == (100, 1)
    metrics.record(RequestRecord(("a",), "stop", 1, 1, 0.0, 0.0))
    metrics.publish()
    assert (requests.value, requests.calls) == (101, 2)


@given(st.lists(st.sampled_from([*"abcdef", OTHER, "base"])), st.integers(0, 4))
def test_labels_are_bounded_for_good(names: list[str], limit: int) -> None:
    labels = AdapterLabels(limit)
    given_labels: dict[str, set[str]] = defaultdict(set)
    for name in names:
        given_labels[name].add(labels.label(name))
    own = [name for name, of in given_labels.items() if of == {name} and name not in (OTHER, "base")]
    assert len(own) <= limit
    assert own == [name for name in dict.fromkeys(names) if name not in (OTHER, "base")][:limit]  # first come
    assert all(of == ({name} if name in (*own, "base") else {OTHER}) for name, of in given_labels.items())


def test_the_rest_is_counted_together_and_an_ensemble_of_it_once() -> None:
    memory = Memory()
    metrics = ServingMetrics(memory, 1)
    for adapters in (("a",), ("b",), ("c", "d"), ("a", "e"), (OTHER,)):
        metrics.record(RequestRecord(adapters, "stop", 1, 2))
    metrics.publish()
    counts = {label: memory.value("adapter_requests_total", adapter=label, outcome="stop") for label in ("a", OTHER)}
    assert counts == {"a": 2, OTHER: 4}
    assert memory.labels("adapter") == {"a", OTHER}


def test_fetches_are_counted_by_how_they_ended() -> None:
    registry = Memory()
    metrics = ServingMetrics(registry, 10)
    metrics.record_fetch(None, 0.2)
    metrics.record_fetch(None, 0.4)
    metrics.record_fetch(Unavailable("its source is down"), 9.0)
    metrics.publish()
    assert registry.value("adapter_fetches_total", outcome="fetched") == 2
    assert registry.value("adapter_fetches_total", outcome="unavailable") == 1
    assert registry.series["openlora_adapter_fetch_seconds", frozenset()].observed == [0.2, 0.4]


def test_the_engines_statistics_follow_it_from_life_to_life() -> None:
    fields = [one.field for one in ENGINE_METRICS if one.field in EngineStats.__struct_fields__]
    assert {"steps", "running", "preemptions", "prefix_hit_tokens", "adapters_loaded"} <= set(fields)
    counters = [one for one in ENGINE_METRICS if one.family.kind == "counter" and one.field in fields]
    gauges = [one for one in ENGINE_METRICS if one.family.kind == "gauge" and one.field in fields]
    memory = Memory()
    metrics = EngineMetrics(memory)
    counted = 0
    # The second engine counts further than the first one did, the third one less, and nobody saw the second one die.
    for life in ([3, 8], [None, None], [9, 9], [1, 2]):
        for number in life:
            stats = None if number is None else msgspec.structs.replace(NO_ENGINE, **dict.fromkeys(fields, number))
            metrics.publish(stats)
            now = number or 0
            assert memory.value("engine_up") == (stats is not None)
            assert [memory.value(f"engine_{one.name}") for one in gauges] == [now] * len(gauges)
            assert [memory.value(f"engine_{one.name}") for one in counters] == [counted + now] * len(counters)
        counted += now


def test_every_engine_metric_reads_a_statistic() -> None:
    assert all(isinstance(attrgetter(one.field)(NO_ENGINE), int | float) for one in ENGINE_METRICS)
    assert len({(one.name, one.labels) for one in ENGINE_METRICS}) == len(ENGINE_METRICS)


@pytest.mark.parametrize("error", [AdapterNotFound("x"), EngineRestarted("x")])
def test_refusals_are_counted_by_code(error: Exception) -> None:
    memory = Memory()
    refusals = RefusalMetrics(memory)
    for _ in range(3):
        refusals.count(error)
    assert memory.value("requests_refused_total", code=error.code.lower()) == 3
