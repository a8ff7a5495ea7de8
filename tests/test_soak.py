"""Many requests for a long time: no error, one receipt each, and memory that stays where it is."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer
from load import Load, Outcome, Question, Stream, mixed_questions
from process_watch import MemoryWatch
from rich.console import Console
from rich.table import Table
from tritonclient.grpc.aio import InferenceServerClient
from usage_watch import UsageWatch, check_outcomes, logged_receipts, settled_receipts, verify_all

from openlora.attribution.journal import STATUS_CANCELLED, STATUS_COMPLETE

CONCURRENCY = 16
STREAMS = 64  # so many that their tokens travel together
STREAM_SECONDS = 600.0
REQUESTS = 3_000
SECONDS = 300.0
WARM_UP_SECONDS = 60.0  # memory is watched in minutes 2 to 5
SAMPLE_SECONDS = 5.0
SPREAD_SHARE, SPREAD_BYTES = 0.05, 20 << 20  # what the memory of a process may vary by: either is enough
CANCEL_SHARE = 0.3


async def test_short_load(server: LiveServer, prompts: list[str]) -> None:
    """150 requests at concurrency 16 on a server that other tests have used."""
    questions = mixed_questions(prompts, server.adapter_names, seed=150, max_tokens=(4, 24))
    async with Load(server.grpc_url, questions, CONCURRENCY, total=150) as load:
        outcomes = await load.complete()
    assert len(outcomes) == 150
    assert [outcome.error for outcome in outcomes if outcome.error] == []
    receipts = logged_receipts(server.state_dir)
    check_outcomes(outcomes, receipts)
    ids = {outcome.receipt["request_id"] for outcome in outcomes}
    labels = [intent.label for intent in UsageWatch(server.state_dir).read().intents.values()]
    assert len(ids) == sum(label.startswith("load-150-") for label in labels) == 150
    assert all(receipts[one.removeprefix("0x")].receipt.status == STATUS_COMPLETE for one in ids)


async def test_short_load_of_streams(server: LiveServer, prompts: list[str]) -> None:
    """64 at once: nothing is lost or told twice, tokens travel together, and the first one travels alone."""
    async with Load(server.grpc_url, streamed(prompts, server, seed=64), STREAMS, total=128) as load:
        outcomes = await load.complete()
    assert [outcome.error for outcome in outcomes if outcome.error] == []
    check_outcomes(outcomes, logged_receipts(server.state_dir))
    assert {outcome.first_tokens for outcome in outcomes} == {1}
    assert sum(outcome.tokens for outcome in outcomes) > 1.5 * sum(outcome.chunks for outcome in outcomes)


@pytest.fixture
def soaked(demo: Path, demo_adapters: list[str], tmp_path: Path) -> Iterator[LiveServer]:
    # The prefix cache fills the whole KV cache; this one is full before memory is watched.
    settings = {"engine": {"dtype": "float32", "kv_cache_tokens": 16_384}}
    live = LiveServer(demo / "model", demo / "adapters", tmp_path / "state", demo_adapters, settings)
    try:
        yield live.start()
    finally:
        live.stop()


@pytest.mark.soak
@pytest.mark.timeout(1200)
async def test_soak(soaked: LiveServer, prompts: list[str]) -> None:
    """3,000 requests in 5 minutes; memory in minutes 2 to 5."""
    questions = mixed_questions(prompts, soaked.adapter_names, seed=1)
    outcomes = await soak(soaked, questions, total=REQUESTS, seconds=SECONDS)
    assert [outcome.error for outcome in outcomes if outcome.error] == []
    assert all(outcome.delivered for outcome in outcomes)
    receipts = await settled_receipts(UsageWatch(soaked.state_dir))
    assert len(receipts) == REQUESTS
    assert all(one.receipt.status == STATUS_COMPLETE for one in receipts.values())
    check_outcomes(outcomes, receipts)
    verify_all(soaked.state_dir)


@pytest.mark.soak
@pytest.mark.timeout(1200)
async def test_soak_with_clients_that_leave(soaked: LiveServer, prompts: list[str]) -> None:
    """The same with almost every third client gone before its answer is whole."""
    questions = mixed_questions(prompts, soaked.adapter_names, seed=2)
    outcomes = await soak(soaked, questions, total=REQUESTS, seconds=SECONDS, asking=ask_and_perhaps_leave)
    assert [outcome.error for outcome in outcomes if outcome.error] == []
    assert all(outcome.delivered or outcome.cancelled for outcome in outcomes)
    receipts = await settled_receipts(UsageWatch(soaked.state_dir))
    cancelled = sum(one.receipt.status == STATUS_CANCELLED for one in receipts.values())
    print(f"{sum(outcome.cancelled for outcome in outcomes)} clients left, {cancelled} requests were stopped by it")
    assert cancelled
    assert {one.receipt.status for one in receipts.values()} == {STATUS_COMPLETE, STATUS_CANCELLED}
    check_outcomes(outcomes, receipts)
    verify_all(soaked.state_dir)


@pytest.mark.soak
@pytest.mark.timeout(1800)
async def test_soak_of_streams(soaked: LiveServer, prompts: list[str]) -> None:
    """64 streams at a time for 10 minutes, as fast as they are answered; memory in minutes 2 to 10."""
    outcomes = await soak(soaked, streamed(prompts, soaked, seed=3), seconds=STREAM_SECONDS, concurrency=STREAMS)
    assert [outcome.error for outcome in outcomes if outcome.error] == []
    assert all(outcome.delivered for outcome in outcomes)
    receipts = await settled_receipts(UsageWatch(soaked.state_dir))
    assert len(receipts) == len(outcomes)
    check_outcomes(outcomes, receipts)
    verify_all(soaked.state_dir)


def streamed(prompts: list[str], live: LiveServer, *, seed: int) -> Callable[[int], Question]:
    mixed = mixed_questions(prompts, live.adapter_names, seed=seed, max_tokens=(32, 96))
    return lambda number: dataclasses.replace(mixed(number), stream=True)


async def soak(
    live: LiveServer,
    questions: Callable[[int], Question],
    *,
    seconds: float,
    total: int | None = None,
    concurrency: int = CONCURRENCY,
    **how: Any,
) -> list[Outcome]:
    """Ask for `seconds`, `total` questions or as many as are answered; memory must stay after the warm-up."""
    memory = MemoryWatch(live.launcher_pid)
    begun = time.monotonic()

    async def watch() -> None:
        await asyncio.sleep(WARM_UP_SECONDS)
        while True:
            memory.sample()
            await asyncio.sleep(SAMPLE_SECONDS)

    watching = asyncio.create_task(watch())
    interval = seconds / total if total else 0.0
    async with Load(live.grpc_url, questions, concurrency, total=total, interval=interval, **how) as load:
        asking = asyncio.create_task(load.complete() if total else asyncio.sleep(seconds))
        await asyncio.wait([watching, asking], return_when=asyncio.FIRST_COMPLETED)
    assert not watching.done(), watching.exception()
    watching.cancel()
    print_load(load.outcomes, time.monotonic() - begun)
    print_memory(memory)
    unsteady = {part: sizes for part, sizes in memory.samples.items() if not is_steady(sizes)}
    assert not unsteady, unsteady
    return load.outcomes


def is_steady(sizes: list[int]) -> bool:
    spread = max(sizes) - min(sizes)
    return spread <= SPREAD_BYTES or spread <= SPREAD_SHARE * min(sizes)


async def ask_and_perhaps_leave(client: InferenceServerClient, question: Question) -> Outcome:
    """Leaves before or within the answer of a share of the questions, the same ones each time."""
    draw = random.Random(question.label)
    stream = Stream(client, question)
    reading = asyncio.create_task(stream.drain())
    if draw.random() < CANCEL_SHARE:
        await asyncio.wait([reading], timeout=draw.random() / 4)
        if not reading.done():
            stream.cancel()
    return await reading


def print_load(outcomes: list[Outcome], seconds: float) -> None:
    waits = sorted(outcome.ended_at - outcome.started_at for outcome in outcomes)
    tokens = sum(outcome.tokens for outcome in outcomes)
    errors = sum(bool(outcome.error) for outcome in outcomes)
    print(f"\n{len(outcomes)} requests in {seconds:.0f} s, {len(outcomes) / seconds:.1f}/s, {errors} errors;", end=" ")
    print(f"{tokens / seconds:.0f} tokens/s;", end=" ")
    print(f"seconds to the last word: median {waits[len(waits) // 2]:.2f}, 99 % {waits[len(waits) * 99 // 100]:.2f}")


def print_memory(memory: MemoryWatch) -> None:
    table = Table("process", "first", "lowest", "highest", "last", "spread", "", title="PSS in MB after the warm-up")
    for part, sizes in memory.samples.items():
        figures = [f"{size / (1 << 20):.1f}" for size in (sizes[0], min(sizes), max(sizes), sizes[-1])]
        spread = max(sizes) - min(sizes)
        share = f"{spread / (1 << 20):.1f} ({spread / min(sizes):.1%})"
        table.add_row(part, *figures, share, "steady" if is_steady(sizes) else "NOT STEADY")
    Console(width=100).print(table)
