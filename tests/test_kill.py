"""`kill -9` of any process under load: clears up by itself, loses no receipt, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, suppress
from functools import partial
from math import inf
from pathlib import Path

import httpx
import psutil
import pytest
from live_server import LiveServer
from load import Load, Outcome, Question, Stream, ask, ask_over_http, connect, mixed_questions
from process_watch import PARTS, leftovers, server_processes, wait_until_gone
from tritonclient.grpc.aio import InferenceServerClient
from usage_watch import UsageWatch, check_outcomes, settled_receipts, verify_all

from openlora.attribution.frames import ProgressFrame, encode_frame, list_segments, segment_path
from openlora.attribution.journal import STATUS_ABORTED, STATUS_ERROR
from openlora.attribution.log import ReceiptLog
from openlora.attribution.projection import Projector

CONCURRENCY = 8
GONE_SECONDS = 60.0  # how long processes may outlive their launcher: those that load their libraries look afterwards
VICTIMS = [part for part in PARTS if part not in ("fetcher", "gateway")]  # on which every answer depends
# What a client may be told: our codes, or a connection that closed or is refused.
CLEAR = re.compile(
    r"\[(ENGINE_RESTARTED|UNAVAILABLE)\]"
    r"|^UNAVAILABLE: |RST_STREAM|Stream removed|Internal error from Core"  # gRPC
    r"|^(ConnectError|ReadError|WriteError|RemoteProtocolError): "  # HTTP
)
RUNNING = "while this request ran"
# And what Triton may say to those who come too late: a stub is dead already, or it is on its way out.
TOO_LATE = re.compile(r"is not healthy|Server is stopping|has no available versions")


class Site:
    """A server that is killed again and again, with its books and everything that its clients saw."""

    def __init__(self, live: LiveServer, prompts: list[str]) -> None:
        self.live = live
        self.prompts = prompts
        self.watch = UsageWatch(live.state_dir)
        self.outcomes: list[Outcome] = []
        self.draw = random.Random()
        self.loads = 0

    @asynccontextmanager
    async def under_load(self) -> AsyncIterator[Load]:
        """A load that is well under way, and then some more: the moment is another one each time."""
        self.loads += 1
        questions = mixed_questions(self.prompts, self.live.adapter_names, seed=self.loads, max_tokens=(100, 400))
        limits = httpx.Limits(max_keepalive_connections=0)  # each request finds the server of the moment
        async with (
            httpx.AsyncClient(base_url=self.live.http_url, timeout=60, limits=limits) as http,
            Load(self.live.grpc_url, questions, CONCURRENCY, asking=partial(ask_either_way, http)) as load,
        ):
            enough = self.draw.randint(2, 12)
            await self.watch.until(lambda: len(load.outcomes) >= enough, 60, "the first answers")
            assert all(outcome.delivered for outcome in load.outcomes), [one.error for one in load.outcomes]
            await asyncio.sleep(self.draw.random() / 4)
            yield load
        self.outcomes += load.outcomes

    async def ready_again(self) -> None:
        await asyncio.to_thread(self.live.wait_ready)

    def check_waiting(self, what: str, outcomes: list[Outcome], killed_at: float, ready_at: float = inf) -> int:
        """Everybody was answered or told, those who waited at that moment before the server was ready again; how many
        these were."""
        told = [outcome for outcome in outcomes if outcome.ended_at > killed_at and not outcome.delivered]
        for outcome in told:
            too_late = outcome.started_at > killed_at and TOO_LATE.search(outcome.error)
            assert too_late or CLEAR.search(outcome.error), f"unclear: {outcome.error!r}"
        waits = [outcome.ended_at - max(outcome.started_at, killed_at) for outcome in told]
        worst = max(waits, default=0.0)
        # A stop takes a moment until it is felt: by then another request may run than when it was asked for.
        waited = sum(outcome.started_at < killed_at or RUNNING in outcome.error for outcome in told)
        words = Counter(re.sub(r"[0-9]+", "#", outcome.error)[:90] for outcome in told)
        print(f"\n{what}: {waited} clients waited, the last was told after {worst:.3f} s")
        for word, count in words.most_common():
            print(f"  {count:4} × {word}")
        assert not [one for one in told if one.started_at < killed_at and one.ended_at > ready_at]
        assert all(outcome.delivered for outcome in outcomes if outcome.ended_at <= killed_at)
        return waited

    async def check_service(self) -> None:
        """New requests work, for the base and every adapter."""
        client = connect(self.live.grpc_url)
        questions = [Question("Tell me about the cat.", name) for name in (None, *self.live.adapter_names)]
        answers = await asyncio.gather(*(ask(client, question) for question in questions))
        await client.close()
        assert [answer.error for answer in answers] == [""] * len(answers)
        assert all(answer.delivered for answer in answers)
        self.outcomes += answers

    async def check_books(self) -> None:
        """Every intent has one receipt; whatever was delivered, and whatever was seen, is in it."""
        check_outcomes(self.outcomes, await settled_receipts(self.watch))


@pytest.fixture(scope="module")
def site(
    demo: Path, demo_adapters: list[str], prompts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    live = LiveServer(
        demo / "model",
        demo / "adapters",
        tmp_path_factory.mktemp("kill") / "state",
        demo_adapters,
        {"engine": {"dtype": "float32"}, "restart": {"attempts": 1000, "longest_wait_seconds": 0.1}},
    )
    try:
        yield Site(live.start(), prompts)
    finally:
        live.stop()


async def ask_either_way(http: httpx.AsyncClient, client: InferenceServerClient, question: Question) -> Outcome:
    """Every second of those that are not streamed goes over HTTP."""
    number = int(question.label.rpartition("-")[2])
    return await (ask_over_http(http, question) if number % 2 and not question.stream else ask(client, question))


async def kill_once(site: Site, part: str) -> int:
    """How many clients waited: none, if what had passed the killed process was answered before its server was ended."""
    async with site.under_load() as load:
        victim = server_processes(site.live.launcher_pid)[part]
        os.kill(victim.pid, signal.SIGKILL)
        killed_at = time.monotonic()
        await site.watch.until(lambda: not is_running(victim), 30, f"the end of {part}")
        await site.watch.until(lambda: not site.live.readiness()["ready"], 30, "the word that it is not ready")
        await site.ready_again()
        ready_at = time.monotonic()
        again = len(load.outcomes)
        await site.watch.until(
            lambda: sum(one.delivered for one in load.outcomes[again:]) >= CONCURRENCY, 60, "answers after the restart"
        )
    waited = site.check_waiting(f"kill -9 {part} (pid {victim.pid})", load.outcomes, killed_at, ready_at)
    print(f"  ready again after {ready_at - killed_at:.1f} s")
    assert server_processes(site.live.launcher_pid)[part].pid != victim.pid
    await site.check_service()
    await site.check_books()
    return waited


def is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("part", VICTIMS)
async def test_a_killed_process_comes_back(site: Site, part: str) -> None:
    for _ in range(5):
        if await kill_once(site, part):
            return
    pytest.fail("nobody was waiting, five times: this showed nothing")


async def test_a_killed_gateway_comes_back_and_nobody_else_notices(site: Site) -> None:
    async with site.under_load() as load:
        victim = server_processes(site.live.launcher_pid)["gateway"]
        os.kill(victim.pid, signal.SIGKILL)
        await site.watch.until(lambda: not site.live.readiness()["ready"], 30, "the word that it is not ready")
        await site.ready_again()
    assert all(outcome.delivered for outcome in load.outcomes), {outcome.error for outcome in load.outcomes}
    assert server_processes(site.live.launcher_pid)["gateway"].pid != victim.pid


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", VICTIMS)
async def test_a_process_killed_ten_times_comes_back(site: Site, part: str) -> None:
    assert sum([await kill_once(site, part) for _ in range(10)]) > 0
    verify_all(site.live.state_dir)


async def kill_at_random(site: Site, kills: int, longest_pause: float) -> None:
    """Whatever runs at the moment is killed, restarts or not: stubs that load, servers without stubs."""
    async with site.under_load() as load:
        for _ in range(kills):
            await asyncio.sleep(site.draw.random() * longest_pause)
            victims = [process for part, process in server_processes(site.live.launcher_pid).items() if part in VICTIMS]
            with suppress(psutil.NoSuchProcess, ValueError, IndexError):  # gone by itself, or nothing runs just now
                site.draw.choice(victims).kill()
            site.watch.read()
        await site.ready_again()
        again = len(load.outcomes)
        await site.watch.until(
            lambda: sum(one.delivered for one in load.outcomes[again:]) >= 2 * CONCURRENCY, 60, "answers at last"
        )
    await site.ready_again()
    errors = {outcome.error for outcome in load.outcomes if not outcome.delivered}
    unclear = {error for error in errors if not CLEAR.search(error) and not TOO_LATE.search(error)}
    assert not unclear, unclear
    await site.check_service()
    await site.check_books()


async def test_processes_killed_while_they_start_come_back(site: Site) -> None:
    await kill_at_random(site, 8, 1.5)


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_processes_killed_all_the_time_come_back(site: Site) -> None:
    await kill_at_random(site, 150, 2.0)
    verify_all(site.live.state_dir)


async def test_a_killed_launcher_leaves_nothing_and_starts_again(site: Site) -> None:
    """With a torn tail in the journal, as a power cut would leave it, and killed once more while it starts."""
    async with site.under_load() as load:
        os.kill(site.live.launcher_pid, signal.SIGKILL)
        killed_at = time.monotonic()
        site.live.process.wait(10)
        took = await asyncio.to_thread(wait_until_gone, site.live.state_dir, GONE_SECONDS)
    assert site.check_waiting("kill -9 launcher", load.outcomes, killed_at) > 0
    print(f"  nothing was left after {took:.3f} s")

    journal = site.live.state_dir / "journal"
    tail = segment_path(journal, list_segments(journal)[-1])
    whole = tail.read_bytes()
    frame = encode_frame(ProgressFrame("0" * 64, 7, bytes(32)))
    torn = site.draw.choice([frame[: site.draw.randrange(1, len(frame))], site.draw.randbytes(100)])
    tail.write_bytes(whole + torn)
    killed = site.live.process
    starting = asyncio.create_task(asyncio.to_thread(site.live.start))
    await site.watch.until(lambda: site.live.process is not killed, 30, "the new launcher")
    await asyncio.sleep(site.draw.random() * 3)
    site.live.process.kill()
    with pytest.raises(RuntimeError, match="the server ended"):
        await starting
    await asyncio.to_thread(wait_until_gone, site.live.state_dir, GONE_SECONDS)
    await asyncio.to_thread(site.live.start)
    assert tail.read_bytes() == whole
    await site.check_service()
    await site.check_books()
    verify_all(site.live.state_dir)
    cut_off = sum(frame.status in (STATUS_ERROR, STATUS_ABORTED) for frame in site.watch.completions.values())
    print(f"  {len(site.watch.completions)} receipts so far, {cut_off} of them of killed requests")
    assert cut_off


async def test_a_stopped_server_leaves_nothing(site: Site) -> None:
    """SIGTERM under load: who waits is told, and the books are closed before the processes end."""
    async with site.under_load() as load:
        stopped_at = time.monotonic()
        await asyncio.to_thread(site.live.stop)
        assert not (found := leftovers(site.live.state_dir)), found
        took = time.monotonic() - stopped_at
    assert site.check_waiting("SIGTERM", load.outcomes, stopped_at) > 0
    print(f"  stopped in {took:.1f} s")
    assert site.live.process.returncode == 0
    assert not site.watch.read().unfinished
    with closing(ReceiptLog.open(site.live.state_dir, wait=False)) as log:
        projector = Projector(site.live.state_dir / "journal", log)
        while projector.project():
            """What was completed at the very end; the next start would do it."""
    await site.check_books()
    verify_all(site.live.state_dir)


async def test_hung_processes_are_restarted_and_one_that_dies_again_ends_the_server(
    demo: Path, demo_adapters: list[str], tmp_path: Path
) -> None:
    hang_seconds = 5
    settings = {"engine": {"dtype": "float32", "hang_seconds": hang_seconds}, "restart": {"attempts": 1}}
    live = LiveServer(demo / "model", demo / "adapters", tmp_path / "state", demo_adapters, settings).start()
    try:
        watch = UsageWatch(live.state_dir)
        outcomes = []
        for part, status in (("engine", STATUS_ERROR), ("generation", STATUS_ABORTED)):
            outcome = await hang(live, watch, part, hang_seconds)
            receipts = await settled_receipts(watch)
            assert receipts[outcome.request_id].receipt.status == status
            outcomes.append(outcome)
        check_outcomes(outcomes, receipts)

        server_processes(live.launcher_pid)["engine"].kill()
        status = await asyncio.to_thread(live.process.wait, 30)
        assert status > 0
        assert not (found := leftovers(live.state_dir)), found
        assert "engine died 2 times" in (live.state_dir / "launcher.log").read_text()
    finally:
        live.stop()


async def hang(live: LiveServer, watch: UsageWatch, part: str, hang_seconds: float) -> Outcome:
    """Stop a process within an answer; what its client got in the end, when the server is well again."""
    client = connect(live.grpc_url)
    sampling = {"ignore_eos": True, "max_tokens": 1900}
    running = Stream(client, Question("Tell me about the cat.", None, True, sampling, f"caught in {part}"))
    reading = asyncio.create_task(running.drain())
    await watch.until(lambda: running.outcome.tokens >= 3, 20, "the first tokens")
    victim = server_processes(live.launcher_pid)[part]
    victim.suspend()
    hung_at = time.monotonic()
    outcome = await asyncio.wait_for(reading, hang_seconds + 10)
    print(f"\nSIGSTOP of {part}: the client was told after {outcome.ended_at - hung_at:.1f} s: {outcome.error}")
    assert CLEAR.search(outcome.error)
    await watch.until(lambda: not is_running(victim), 10, f"the end of {part}")
    await client.close()
    await asyncio.to_thread(live.wait_ready)
    client = connect(live.grpc_url)
    answer = await ask(client, Question("Tell me about the cat.", "pirate"))
    assert answer.delivered, answer.error
    await client.close()
    return outcome
