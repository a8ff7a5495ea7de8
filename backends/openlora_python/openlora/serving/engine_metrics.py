"""Metrics of the engine: what it says of itself once a second, under the names of `docs/metrics.md`."""

from __future__ import annotations

from operator import attrgetter
from typing import NamedTuple

from ..engine.api import EngineStats
from .metrics import Family, Metric, Registry


class EngineMetric(NamedTuple):
    """A statistic that is published. Those with one name are one family, told apart by their labels."""

    name: str  # with openlora_engine_ in front
    field: str  # of EngineStats; a dot leads on into a struct
    description: str
    labels: tuple[tuple[str, str], ...] = ()

    @property
    def family(self) -> Family:
        counts = self.name.endswith("_total")  # since the engine's start
        return Family(f"openlora_engine_{self.name}", "counter" if counts else "gauge", self.description)


USES = "Adapters of submitted requests, by the tier where they were then"
LOADS = "Adapters loaded: from disk to host, from host to device"
LOAD_SECONDS = "Sum of the times that loads took"
EVICTIONS = "Adapters that gave up their place"
ENGINE_METRICS = (
    EngineMetric("steps_total", "steps", "Steps of the engine"),
    EngineMetric("running_requests", "running", "Requests with a row in the engine"),
    EngineMetric("waiting_requests", "waiting", "Requests that wait for a row or an adapter"),
    EngineMetric("kv_blocks", "kv_blocks_total", "KV cache blocks"),
    EngineMetric("kv_blocks_used", "kv_blocks_used", "KV cache blocks that running requests hold"),
    EngineMetric("kv_blocks_cached", "kv_blocks_cached", "Free KV cache blocks with reusable prefixes"),
    EngineMetric("adapters_loaded", "adapters_loaded", "Adapters in device slots"),
    EngineMetric("prefix_lookup_tokens_total", "prefix_lookup_tokens", "Prompt tokens looked up in the prefix cache"),
    EngineMetric("prefix_hit_tokens_total", "prefix_hit_tokens", "Prompt tokens found in the prefix cache"),
    EngineMetric("preemptions_total", "preemptions", "Requests sent back to the queue"),
    EngineMetric("adapter_slots", "adapters.slots", "Device slots"),
    EngineMetric("host_adapters", "adapters.host_adapters", "Adapters in host memory"),
    EngineMetric("host_adapter_bytes", "adapters.host_bytes", "Host memory of adapters, loads in progress included"),
    EngineMetric("host_adapter_limit_bytes", "adapters.host_limit_bytes", "Host memory that adapters may take"),
    EngineMetric("adapter_uses_total", "adapters.hits_device", USES, (("tier", "device"),)),
    EngineMetric("adapter_uses_total", "adapters.hits_host", USES, (("tier", "host"),)),
    EngineMetric("adapter_uses_total", "adapters.hits_disk", USES, (("tier", "disk"),)),
    EngineMetric("adapter_loads_total", "adapters.loads", LOADS, (("to", "host"),)),
    EngineMetric("adapter_loads_total", "adapters.placed", LOADS, (("to", "device"),)),
    EngineMetric("adapter_load_seconds_total", "adapters.read_seconds", LOAD_SECONDS, (("to", "host"),)),
    EngineMetric("adapter_load_seconds_total", "adapters.place_seconds", LOAD_SECONDS, (("to", "device"),)),
    EngineMetric("adapter_load_failures_total", "adapters.failed_loads", "Loads from disk that failed"),
    EngineMetric("adapter_evictions_total", "adapters.evictions_device", EVICTIONS, (("tier", "device"),)),
    EngineMetric("adapter_evictions_total", "adapters.evictions_host", EVICTIONS, (("tier", "host"),)),
)
UP = Family("openlora_engine_up", "gauge", "1 while an engine answers, else 0")


class EngineMetrics:
    """Follows the engine of the moment: counters go on when a new one starts from zero."""

    def __init__(self, registry: Registry) -> None:
        self._up = registry.metric(UP, {})
        self._metrics: list[tuple[EngineMetric, Metric]] = [
            (one, registry.metric(one.family, dict(one.labels))) for one in ENGINE_METRICS
        ]
        self._published: dict[EngineMetric, float] = {}

    def publish(self, engine: EngineStats | None) -> None:
        """None = there is no engine now."""
        self._up.set(0 if engine is None else 1)
        for one, metric in self._metrics:
            value = 0 if engine is None else attrgetter(one.field)(engine)
            before = self._published.get(one, 0)
            self._published[one] = value
            if value == before:
                continue
            if one.family.kind == "gauge":
                metric.set(value)
            elif engine is not None:
                metric.increment(value - before if value > before else value)
