"""What `openlora bench` says: one JSON line for a workload, one table for all of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table

from .machine import Machine
from .runner import Batch

_MS = 1000.0
_KIB, _MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class BenchSettings:
    """All that decides what is measured, as it was in force."""

    model: str
    popularity: str
    batch: int
    prompt_len: int
    new_tokens: int
    repeat: int
    warmup: int
    seed: int
    load_adapters: bool
    dtype: str
    quantization: str
    device: str
    threads: int
    omp_wait_policy: str | None  # None: the OpenMP library's own default


@dataclass(frozen=True)
class Percentiles:
    """In milliseconds, over every request (or every gap between two tokens of one) of all repeats."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Rates:
    """What follows from the batches alone. Rates are medians over the repeats, wall time with prefill included."""

    tokens_per_s: float
    tokens_per_s_min: float
    tokens_per_s_max: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None  # None when one new token is all that is asked for
    ttft_ms: Percentiles
    inter_token_ms: Percentiles | None
    new_tokens: int  # of all repeats
    kv_blocks_used: int  # at the peak of any repeat
    kv_blocks_wasted: int  # of those: more than the tokens in them need


@dataclass(frozen=True)
class Report(Rates):
    """One workload: a JSON line."""

    settings: BenchSettings
    machine: Machine
    distinct_adapters: int  # asked for by one batch, the most of all repeats
    adapters_loaded: int  # resident in the engine
    adapter_weight_bytes: int | None  # mean over the adapters asked for: A and B in the engine's dtype
    adapter_resident_bytes: int | None  # mean growth of resident memory by an adapter; None where none was loaded
    peak_rss_bytes: int  # of the process, start-up included


def rates_of(batches: Sequence[Batch]) -> Rates:
    """Medians, extremes and percentiles over the repeats of one workload."""
    overall = [batch.tokens_per_s for batch in batches]
    decode = [batch.decode_tokens_per_s for batch in batches if batch.decode_tokens_per_s is not None]
    gaps = [gap for batch in batches for gap in batch.inter_tokens]
    used, wasted = max((batch.kv_blocks_used, batch.kv_blocks_wasted) for batch in batches)
    return Rates(
        tokens_per_s=round(statistics.median(overall), 2),
        tokens_per_s_min=round(min(overall), 2),
        tokens_per_s_max=round(max(overall), 2),
        prefill_tokens_per_s=round(statistics.median(batch.prefill_tokens_per_s for batch in batches), 2),
        decode_tokens_per_s=round(statistics.median(decode), 2) if decode else None,
        ttft_ms=percentiles([ttft for batch in batches for ttft in batch.ttfts]),
        inter_token_ms=percentiles(gaps) if gaps else None,
        new_tokens=sum(batch.new_tokens for batch in batches),
        kv_blocks_used=used,
        kv_blocks_wasted=wasted,
    )


def percentiles(seconds: Sequence[float]) -> Percentiles:
    """By nearest rank: each is a time that was measured."""
    ordered = sorted(seconds)
    return Percentiles(*(round(_MS * ordered[-(-len(ordered) * share // 100) - 1], 3) for share in (50, 90, 99)))


def table_of(reports: Sequence[Report]) -> Table:
    """A column for each workload."""
    first = reports[0].settings
    table = Table(
        title=f"{first.model}: {first.dtype}, quantization {first.quantization}, batch {first.batch}, "
        f"{first.prompt_len} + {first.new_tokens} tokens, {first.threads} threads",
        caption=f"{reports[0].machine.cpu}, {reports[0].machine.cores} cores; rates are medians of {first.repeat}, "
        "tokens/s counts new tokens over wall time, prefill included",
    )
    table.add_column("")
    for report in reports:
        table.add_column(report.settings.popularity, justify="right")
    rows: dict[str, Callable[[Report], str]] = {
        "tokens/s": lambda report: f"{report.tokens_per_s:.1f}",
        "  min–max": lambda report: f"{report.tokens_per_s_min:.1f}–{report.tokens_per_s_max:.1f}",
        "prefill tokens/s": lambda report: f"{report.prefill_tokens_per_s:.1f}",
        "decode tokens/s": lambda report: _or_nothing(report.decode_tokens_per_s, "{:.1f}"),
        "TTFT p50, p90, p99 ms": lambda report: _three(report.ttft_ms),
        "between tokens, ms": lambda report: _three(report.inter_token_ms),
        "adapters used, loaded": lambda report: f"{report.distinct_adapters}, {report.adapters_loaded}",
        "an adapter's weights, KiB": lambda report: _or_nothing(report.adapter_weight_bytes, "{:.0f}", _KIB),
        "  and in memory, KiB": lambda report: _or_nothing(report.adapter_resident_bytes, "{:.0f}", _KIB),
        "KV blocks used, wasted": lambda report: f"{report.kv_blocks_used}, {report.kv_blocks_wasted}",
        "peak memory, MiB": lambda report: f"{report.peak_rss_bytes / _MIB:.0f}",
    }
    for name, cell in rows.items():
        table.add_row(name, *map(cell, reports))
    return table


def _three(found: Percentiles | None) -> str:
    return "" if found is None else f"{found.p50:.1f}, {found.p90:.1f}, {found.p99:.1f}"


def _or_nothing(value: float | None, form: str, unit: int = 1) -> str:
    return "" if value is None else form.format(value / unit)
