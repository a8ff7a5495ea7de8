"""From runs to figures: rates, medians with their extremes, ratios within one run, the table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table
from systems import BASE, DECODE, PREFILL, Claim


@dataclass(frozen=True)
class Row:
    """One job of one system: a JSON line. Round i of all systems ran side by side."""

    system: str
    workload: str
    round: int
    requests: int
    tokens: int  # that the rate counts: new ones, or those of the prompts where only prefill is measured
    seconds: float
    foreign_share: float  # of the machine's cores, taken by others meanwhile
    first_token_agreement: float | None  # with our engine, on the same prompts; None where it did not run them

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


Series = Mapping[tuple[str, str], Sequence[float]]
"""(system, workload) -> its rate in each round, tokens per second."""


def series_of(rows: Sequence[Row]) -> Series:
    """The measured rates, and "base decode": tokens after the first of each request over the time beyond prefill."""
    seconds: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.round):
        seconds.setdefault((row.system, row.workload), []).append(row)
    rates = {key: [row.tokens_per_s for row in found] for key, found in seconds.items()}
    for system in dict.fromkeys(row.system for row in rows):
        pairs = zip(seconds.get((system, BASE.name), []), seconds.get((system, PREFILL.name), []), strict=False)
        decode = [
            (whole.tokens - whole.requests) / (whole.seconds - prefill.seconds)
            for whole, prefill in pairs
            if whole.seconds > prefill.seconds
        ]
        if decode:
            rates[system, DECODE.name] = decode
    return rates


@dataclass(frozen=True)
class Ratio:
    """`median`, `low` and `high` are over the rounds: each compares runs that were neighbours in time."""

    name: str
    goal: float
    against: str  # the system with the best median among those compared
    median: float
    low: float
    high: float


def ratios_of(series: Series, claims: Sequence[Claim]) -> list[Ratio]:
    """The claims of which both sides were measured."""
    found = []
    for claim in claims:
        ours = series.get((claim.ours[0], claim.ours[1].name))
        others = [(system, workload.name) for system, workload in claim.others if (system, workload.name) in series]
        if ours is None or not others:
            continue
        best = max(others, key=lambda key: statistics.median(series[key]))
        rounds = [mine / theirs for mine, theirs in zip(ours, series[best], strict=False)]
        found.append(Ratio(claim.name, claim.goal, best[0], statistics.median(rounds), min(rounds), max(rounds)))
    return found


def rates_table(series: Series, order: Sequence[str], memory: Mapping[str, int]) -> Table:
    """Systems by workload, the workloads in `order`."""
    table = Table("workload", "system", caption="tokens/s: median of the rounds and its extremes")
    for name in ("tokens/s", "min–max", "GiB"):
        table.add_column(name, justify="right")
    for workload in order:
        for (system, of), rates in series.items():
            if of == workload:
                median, span = statistics.median(rates), f"{min(rates):.0f}–{max(rates):.0f}"
                table.add_row(workload, system, f"{median:.1f}", span, f"{memory[system] / (1 << 30):.2f}")
        table.add_section()
    return table


def ratios_table(ratios: Sequence[Ratio]) -> Table:
    table = Table("ratio in one run", "against")
    for name in ("median", "min–max", "goal"):
        table.add_column(name, justify="right")
    for ratio in ratios:
        style = "green" if ratio.median >= ratio.goal else "red"
        span = f"{ratio.low:.2f}–{ratio.high:.2f}"
        table.add_row(ratio.name, ratio.against, f"[{style}]{ratio.median:.2f}[/]", span, f"{ratio.goal:.2f}")
    return table
