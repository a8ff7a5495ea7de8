"""The fetcher process and its client, leases, and lazy adapters in the catalog; a real HTTP source, no server."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from access_cases import SetClock
from fetcher_process import running_fetcher
from scripted_source import Fault, ScriptedSource
from tiny_models import make_adapter
from typer.testing import CliRunner
from waiting import wait_for

from openlora.adapters.catalog import Catalog
from openlora.adapters.catalog_rows import AdapterRecord, BaseFacts
from openlora.adapters.commands import adapters_app
from openlora.adapters.ingest import ingest
from openlora.adapters.ingest_jobs import check_result, job_of
from openlora.adapters.ingest_worker import IngestResult, known_records
from openlora.adapters.leases import Leases, unleased
from openlora.adapters.manifest import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, adapter_manifest
from openlora.adapters.sources import SourceLimits
from openlora.adapters.store import AdapterStore
from openlora.engine.api import WEIGHT_ONE, AdapterUse
from openlora.errors import AdapterInvalid, OpenLoRAError, Overloaded, Unavailable
from openlora.serving.adapter_supply import AdapterSupply
from openlora.serving.fetch_client import FetchClient
from openlora.serving.ticket import Ticket
from openlora.serving.wrong_bytes import MOST_KEPT, WrongBytes

LIMITS = SourceLimits(attempts=2, first_wait_seconds=0.005, longest_wait_seconds=0.02, keep_seconds=1)
ADDRESS = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"  # from EIP-55
CARD = {"schema": 1, "owner": ADDRESS, "licence": "MIT", "prices": {"version": 1, "input": 1, "output": 2}}
NAMES = ("cook", "poet", "bard")
HOLD = (
    "import sys; from pathlib import Path; from openlora.adapters.leases import Leases\n"
    "leases = Leases(Path(sys.argv[1])); leases.take(sys.argv[2]); print(flush=True); sys.stdin.read()\n"
)


@pytest.fixture(scope="module")
def pristine(base: BaseFacts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    for number, name in enumerate(NAMES):
        make_adapter(base.path, folder / name, number, r=4, target_modules=["q_proj", "v_proj"])
    return folder


@pytest.fixture
def digests(pristine: Path) -> dict[str, str]:
    return {name: adapter_manifest(pristine / name).digest for name in NAMES}


@pytest.fixture
def http(pristine: Path) -> Iterator[ScriptedSource]:
    source = serving(pristine)
    try:
        yield source
    finally:
        source.close()


@pytest.fixture
def other_http(pristine: Path) -> Iterator[ScriptedSource]:
    source = serving(pristine)
    try:
        yield source
    finally:
        source.close()


def serving(pristine: Path) -> ScriptedSource:
    source = ScriptedSource()
    for file in pristine.glob("*/adapter_*"):
        source.files[f"/{file.parent.name}/{file.name}"] = file.read_bytes()
    return source


def add_lazily(
    state: Path, base: BaseFacts, http: ScriptedSource, digest: str, name: str, limits: SourceLimits = LIMITS
) -> IngestResult:
    (result,) = ingest(state, base, [job_of(f"{http.url}/{name}", None, digest, lazy=True)], limits=limits)
    return result


def known(state: Path, base: BaseFacts, http: ScriptedSource, digests: dict[str, str]) -> AdapterStore:
    """A catalog that has all of them lazily, without a worker's start for it; the cache, without any."""
    with Catalog(state / "catalog.sqlite") as catalog:
        catalog.set_base(base)
        for name, digest in digests.items():
            place = f"{http.url}/{name}"
            catalog.put(AdapterRecord(name, 0, digest, 4, "ready", "", None, base=base.digest, source=place))
    return AdapterStore(state / "adapters")


class Fetches:
    """What a client said of fetches that ended."""

    def __init__(self, client: FetchClient, ended: list[OpenLoRAError | None]) -> None:
        self.client = client
        self.ended = ended


@asynccontextmanager
async def client_of(address: str) -> AsyncIterator[Fetches]:
    ended: list[OpenLoRAError | None] = []
    client = FetchClient(address, lambda error, seconds: ended.append(error))
    running = asyncio.create_task(client.run())
    try:
        yield Fetches(client, ended)
    finally:
        running.cancel()


async def download_of(http: ScriptedSource, place: str) -> None:
    """Wait until it has begun."""
    await asyncio.to_thread(wait_for, "a download", lambda: http.asked("GET", place) or None)


async def test_one_download_for_all_clients_and_requests(state, base, http, digests):
    store, gate = known(state, base, http, digests), threading.Event()
    place = f"/poet/{WEIGHTS_FILE}"
    http.fail(place, Fault(before=lambda: gate.wait(60)))
    with running_fetcher(state, base, LIMITS) as fetcher:
        async with client_of(fetcher.address) as one, client_of(fetcher.address) as other:
            asked = [asyncio.create_task(one.client.fetch(digests["poet"], "poet")) for _ in range(5)]
            asked += [asyncio.create_task(other.client.fetch(digests["poet"], "poet")) for _ in range(5)]
            await download_of(http, place)
            await other.client.fetch(digests["bard"], "bard")  # so the fetcher has heard all that was asked before it
            assert not any(task.done() for task in asked)
            gate.set()
            await asyncio.gather(*asked)
            assert (one.ended, other.ended) == ([None], [None, None])
    assert len(http.asked("GET", place)) == 1
    assert store.holds(digests["poet"])
    assert adapter_manifest(store.path(digests["poet"])).digest == digests["poet"]


async def test_what_was_asked_before_there_is_a_fetcher_is_fetched(state, base, http, digests):
    known(state, base, http, digests)
    with running_fetcher(state, base, LIMITS) as fetcher:
        async with client_of(fetcher.address) as asking:
            await asking.client.fetch(digests["poet"], "poet")
            await asking.client.fetch(digests["poet"], "poet")  # is there
    assert len(http.asked("GET", WEIGHTS_FILE)) == 1


async def test_who_stops_waiting_leaves_the_download_to_the_others(state, base, http, digests):
    store, gate = known(state, base, http, digests), threading.Event()
    http.fail(f"/poet/{WEIGHTS_FILE}", Fault(before=lambda: gate.wait(60)))
    with running_fetcher(state, base, LIMITS) as fetcher:
        async with client_of(fetcher.address) as asking:
            first, second = (asyncio.create_task(asking.client.fetch(digests["poet"], "poet")) for _ in range(2))
            await download_of(http, WEIGHTS_FILE)
            first.cancel()
            gate.set()
            await second
            assert first.cancelled()
    assert store.holds(digests["poet"])
    assert len(http.asked("GET", WEIGHTS_FILE)) == 1


async def test_a_server_that_hangs_holds_up_no_other_server(state, base, http, other_http, digests):
    known(state, base, http, {name: digests[name] for name in ("poet", "cook")})
    known(state, base, other_http, {"bard": digests["bard"]})
    gate = threading.Event()
    http.fail(f"/poet/{WEIGHTS_FILE}", Fault(before=lambda: gate.wait(60)))
    with running_fetcher(state, base, replace(LIMITS, parallel=1)) as fetcher:
        async with client_of(fetcher.address) as asking:
            poet = asyncio.create_task(asking.client.fetch(digests["poet"], "poet"))
            await download_of(http, WEIGHTS_FILE)
            cook = asyncio.create_task(asking.client.fetch(digests["cook"], "cook"))
            await asking.client.fetch(digests["bard"], "bard")
            assert not http.asked("HEAD", f"/cook/{WEIGHTS_FILE}")  # its turn is not yet
            gate.set()
            await asyncio.gather(poet, cook)


async def test_a_damaged_copy_is_brought_anew(state, base, http, digests):
    store = known(state, base, http, {"poet": digests["poet"]})
    with running_fetcher(state, base, LIMITS) as fetcher:
        async with client_of(fetcher.address) as asking:
            await asking.client.fetch(digests["poet"], "poet")
            os.truncate(store.path(digests["poet"]) / WEIGHTS_FILE, 1000)
            assert not store.holds(digests["poet"])
            await asking.client.fetch(digests["poet"], "poet")
    assert adapter_manifest(store.path(digests["poet"])).digest == digests["poet"]
    assert [entry.name for entry in store.directory.glob("[!.]*")] == [digests["poet"]]


async def test_what_can_not_be_fetched_is_said_with_the_name(state, base, http, digests):
    known(state, base, http, {"poet": digests["poet"]})
    with Catalog(state / "catalog.sqlite") as catalog:
        local = AdapterRecord("cook", 0, digests["cook"], 4, "ready", "", None, base=base.digest, source="/models/cook")
        catalog.put(local)
        catalog.put(replace(local, name="bard", digest=digests["bard"], status="quarantined", reason="it is cursed"))
    cases = {
        "cook": (Unavailable, "adapter cook: its files are not in the cache and came from no URI"),
        "bard": (AdapterInvalid, "adapter bard: it is cursed"),
        "nobody": (OpenLoRAError, "adapter nobody: no adapter 'nobody'"),
    }
    with running_fetcher(state, base, LIMITS) as fetcher:
        async with client_of(fetcher.address) as asking:
            for name, (kind, words) in cases.items():
                with pytest.raises(kind, match=words):
                    await asking.client.fetch(digests.get(name, "ab" * 32), name)
            await asking.client.fetch(digests["poet"], "poet")


async def test_bytes_that_do_not_pass_quarantine_every_version_that_has_them(state, base, http, digests):
    store = known(state, base, http, digests)
    wrong = http.files[f"/poet/{CONFIG_FILE}"].replace(b'"r": 4', b'"r": 5')
    http.files[f"/poet/{CONFIG_FILE}"] = wrong
    weights = http.files[f"/poet/{WEIGHTS_FILE}"]
    digest = digest_of(wrong, weights, state)
    place = f"{http.url}/poet"
    with Catalog(state / "catalog.sqlite") as catalog:
        for name in ("poet", "again"):
            catalog.put(AdapterRecord(name, 0, digest, 5, "ready", "", None, base=base.digest, source=place))
    with running_fetcher(state, base, LIMITS) as fetcher:
        async with client_of(fetcher.address) as asking:
            for _ in range(2):
                with pytest.raises(AdapterInvalid, match="adapter poet: .* has rank 4, adapter_config.json says 5"):
                    await asking.client.fetch(digest, "poet")
    states = {(record.name, record.digest): record.status for record in known_records(state)}
    assert states["poet", digest] == states["again", digest] == "quarantined"
    assert states["poet", digests["poet"]] == states["cook", digests["cook"]] == "ready"
    assert len(http.asked("GET", f"/poet/{WEIGHTS_FILE}")) == 1
    assert not store.holds(digest)


async def test_wrong_bytes_are_downloaded_again_after_a_while_only_or_from_another_source(state, base, http, digests):
    store = known(state, base, http, {"poet": digests["poet"]})
    weights, words = f"/poet/{WEIGHTS_FILE}", f"adapter poet: its digest is [0-9a-f]{{64}}, {digests['poet']} was"
    right = http.files[weights]
    http.files[weights] = right[:-4] + bytes(4)
    with running_fetcher(state, base, LIMITS) as fetcher:
        async with client_of(fetcher.address) as asking:
            for _ in range(3):
                with pytest.raises(AdapterInvalid, match=words):
                    await asking.client.fetch(digests["poet"], "poet")
            assert len(http.asked("GET", weights)) == 1
            for file in (CONFIG_FILE, WEIGHTS_FILE):
                http.files[f"/moved/{file}"] = http.files[f"/poet/{file}"]
            http.files[f"/moved/{WEIGHTS_FILE}"] = right
            with Catalog(state / "catalog.sqlite") as catalog:
                catalog.put(replace(catalog.current("poet", ""), source=f"{http.url}/moved"))
            await asking.client.fetch(digests["poet"], "poet")
    assert store.holds(digests["poet"])


def test_the_time_until_wrong_bytes_are_looked_at_again_doubles_and_memory_has_a_bound():
    clock = SetClock(0.0)
    wrong = WrongBytes(clock)
    waits = []
    for _ in range(12):
        wrong.note("ab", "https://host/a", "other bytes")
        began = clock.now
        while wrong.reason("ab", "https://host/a"):
            clock.now += 1
        waits.append(clock.now - began)
    assert waits == [5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560, 3600, 3600]
    wrong.note("ab", "https://host/a", "other bytes")
    assert wrong.reason("ab", "https://host/a") == "other bytes"
    assert (wrong.reason("ab", "https://host/b"), wrong.reason("cd", "https://host/a")) == (None, None)
    wrong.forget("ab", "https://host/a")
    assert wrong.reason("ab", "https://host/a") is None
    for number in range(MOST_KEPT + 1):
        wrong.note(f"{number}", "https://host/a", "other bytes")
    assert (wrong.reason("0", "https://host/a"), wrong.reason("1", "https://host/a")) == (None, "other bytes")


def digest_of(config: bytes, weights: bytes, scratch: Path) -> str:
    (scratch / "made").mkdir()
    (scratch / "made" / CONFIG_FILE).write_bytes(config)
    (scratch / "made" / WEIGHTS_FILE).write_bytes(weights)
    return adapter_manifest(scratch / "made").digest


async def test_a_full_cache_evicts_what_nobody_needs(state, base, http, digests):
    """Of two copies that are old enough the older one has a lease."""
    store = known(state, base, http, digests)
    size = sum(len(http.files[f"/poet/{name}"]) for name in (CONFIG_FILE, WEIGHTS_FILE))
    leases = Leases(store.directory)
    with running_fetcher(state, base, replace(LIMITS, cache_bytes=2 * size + size // 2)) as fetcher:
        async with client_of(fetcher.address) as asking:
            leases.take(digests["cook"])
            for name, age in (("cook", 200), ("poet", 100)):
                await asking.client.fetch(digests[name], name)
                os.utime(store.path(digests[name]), (time.time() - age,) * 2)
            await asking.client.fetch(digests["bard"], "bard")
            assert [name for name in NAMES if store.holds(digests[name])] == ["cook", "bard"]
            leases.take(digests["bard"])
            os.utime(store.path(digests["bard"]), (time.time() - 100,) * 2)
            with pytest.raises(Unavailable, match="adapter poet: the adapter cache may hold .* in use") as refused:
                await asking.client.fetch(digests["poet"], "poet")
            assert refused.value.retry_after_ms > 0
            leases.give_back(digests["cook"])
            await asking.client.fetch(digests["poet"], "poet")
            assert [name for name in NAMES if store.holds(digests[name])] == ["poet", "bard"]


def test_a_lease_ends_with_its_process_and_counts_its_holders(tmp_path):
    store = AdapterStore(tmp_path)
    digest = "ab" * 32
    store.path(digest).mkdir()
    command = [sys.executable, "-c", HOLD, str(tmp_path), digest]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        assert store.is_leased(digest)
        assert not store.is_leased("cd" * 32)
        with store.writing():
            assert not store.evict(digest)
        assert store.path(digest).is_dir()
        holder.kill()
    assert not store.is_leased(digest)
    with store.writing():
        assert store.evict(digest)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".leases", ".lock"]


def test_of_two_leases_of_a_process_the_last_one_counts(tmp_path):
    store, leases, digest = AdapterStore(tmp_path), Leases(tmp_path), "ab" * 32
    leases.take(digest)
    leases.take(digest)
    leases.give_back(digest)
    assert store.is_leased(digest)
    leases.give_back(digest)
    assert not store.is_leased(digest)


def test_a_lease_waits_for_a_copy_that_is_leaving(tmp_path):
    store, leases, digest = AdapterStore(tmp_path), Leases(tmp_path), "ab" * 32
    with unleased(tmp_path, digest) as free:
        assert free
        taking = threading.Thread(target=leases.take, args=(digest,))
        taking.start()
        assert store.is_leased("cd" * 32) is False  # which opens and closes the same file
        taking.join(0.2)
        assert taking.is_alive()
    taking.join(10)
    assert store.is_leased(digest)


async def test_requests_that_wait_for_bytes_are_bounded(tmp_path):
    client = FetchClient(f"ipc://{tmp_path}/nobody", lambda error, seconds: None)
    supply = AdapterSupply(tmp_path, client, most_waiting=2)
    digest = "ab" * 32
    uses = (AdapterUse(digest, "", WEIGHT_ONE),)
    ticket = Ticket("generate", "1" * 64, "", "me", 0.0, "", adapters=uses, adapter_names=("poet",))
    missing = supply.lease(ticket)
    assert missing == [(digest, "poet")]
    waiting = [asyncio.create_task(supply.bring(missing)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="2 requests wait for adapters"):
        await supply.bring(missing)
    waiting[0].cancel()
    await asyncio.wait([waiting[0]])
    third = asyncio.create_task(supply.bring(missing))
    await asyncio.sleep(0)
    assert not third.done()
    for task in (waiting[1], third):
        task.cancel()
    supply.release(ticket.adapters)


def test_a_fetcher_ends_with_its_launcher(state, base, http, digests):
    known(state, base, http, digests)
    with (
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as launcher,
        running_fetcher(state, base, LIMITS, launcher.pid) as fetcher,
    ):
        assert fetcher.process.poll() is None
        launcher.kill()
        assert fetcher.process.wait(30) == 1


# --- adding lazily ----------------------------------------------------------------------------------------------------


def test_a_lazy_adapter_is_in_the_catalog_without_its_weights(state, base, http, digests):
    http.files[f"/poet/{CARD_FILE}"] = json.dumps({**CARD, "base": base.digest}).encode()
    result = add_lazily(state, base, http, digests["poet"], "poet")
    assert (result.status, result.change, result.digest, result.rank) == ("ready", "added", digests["poet"], 4)
    (record,) = known_records(state)
    assert (record.card, record.target_modules) == (CARD, ("q_proj", "v_proj"))
    assert record.source == f"{http.url}/poet"
    assert not AdapterStore(state / "adapters").holds(digests["poet"])
    assert http.asked("GET", WEIGHTS_FILE) == []
    assert list((state / "adapters" / ".fetching").iterdir()) == []
    assert add_lazily(state, base, http, digests["poet"], "poet").change == "unchanged"

    fetched = CliRunner().invoke(adapters_app, ["fetch", "poet", "--state-dir", str(with_base(state, base))])
    assert fetched.exit_code == 0, fetched.stderr
    assert AdapterStore(state / "adapters").holds(digests["poet"])
    again = add_lazily(state, base, http, digests["poet"], "poet")
    assert (again.status, again.change) == ("ready", "unchanged")


def with_base(state: Path, base: BaseFacts) -> Path:
    with Catalog(state / "catalog.sqlite") as catalog:
        catalog.set_base(base)
    return state


def test_a_lazy_adapter_of_bytes_that_are_here_is_here(state, base, http, digests):
    check_result(*ingest(state, base, [job_of(f"{http.url}/poet", None)], limits=LIMITS))
    (result,) = ingest(state, base, [job_of(f"{http.url}/poet", "bard", digests["poet"], lazy=True)], limits=LIMITS)
    assert (result.status, result.digest) == ("ready", digests["poet"])
    assert AdapterStore(state / "adapters").holds(digests["poet"])
    assert len(http.asked("GET", WEIGHTS_FILE)) == 1


REFUSED = {
    "DoRA": (CONFIG_FILE, lambda config: {**config, "use_dora": True}, "DoRA is not supported"),
    "rank": (CONFIG_FILE, lambda config: {**config, "r": 17}, "rank 17 is over the limit of 16"),
    "modules": (CONFIG_FILE, lambda config: {**config, "target_modules": ["qkv"]}, "match no module of the base model"),
    "base": (CARD_FILE, lambda config: {**CARD, "base": "ab" * 32}, "made for base model abab"),
    "card": (CARD_FILE, lambda config: {**CARD, "owner": "me"}, "openlora.json: card.owner"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_be_seen_without_weights_is_refused_and_not_recorded(state, base, http, digests, case):
    file, change, words = REFUSED[case]
    http.files[f"/poet/{file}"] = json.dumps(change(json.loads(http.files[f"/poet/{CONFIG_FILE}"]))).encode()
    result = add_lazily(state, base, http, digests["poet"], "poet")
    assert (result.status, result.version) == ("quarantined", 0)
    assert words in result.reason
    assert known_records(state) == []


def test_weights_that_are_missing_or_too_large_are_refused_unread(state, base, http, digests):
    http.fail(f"/poet/{WEIGHTS_FILE}", Fault(claim=1 << 40), methods=("HEAD",), for_ever=True)
    too_large = add_lazily(state, base, http, digests["poet"], "poet")
    assert (too_large.status, too_large.version) == ("quarantined", 0)
    assert f"{1 << 40} bytes or more" in too_large.reason
    del http.files[f"/cook/{WEIGHTS_FILE}"]
    missing = add_lazily(state, base, http, digests["cook"], "cook")
    assert missing.reason == f"{WEIGHTS_FILE} is missing at {http.url}/cook"
    assert known_records(state) == []
    assert http.asked("GET", WEIGHTS_FILE) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["http://127.0.0.1:1/poet"], "[INVALID_ARGUMENT] lazy: a digest is wanted, too (--digest)"),
        (["/models/poet", "--digest", "ab" * 32], "[INVALID_ARGUMENT] lazy: /models/poet is on this machine"),
        (["http://me:s3cr3t@127.0.0.1:1/poet", "--digest", "ab" * 32], "which are never stored"),
        (["http://127.0.0.1:1/poet?signature=s3cr3t", "--digest", "ab" * 32], "which are never stored"),
    ],
)
def test_what_can_not_be_lazy_is_refused_with_the_reason(state, base, arguments, words):
    done = CliRunner().invoke(adapters_app, ["add", *arguments, "--lazy", "--state-dir", str(with_base(state, base))])
    assert done.exit_code == 2
    assert words in " ".join(done.stderr.split())
    assert "s3cr3t" not in done.stderr
    assert known_records(state) == []


async def test_what_was_said_before_the_bytes_came_is_put_right_by_them(state, base, http, digests):
    """Terms are those of the day it was added; rank and modules those of the bytes."""
    right = http.files[f"/poet/{CONFIG_FILE}"]
    http.files[f"/poet/{CONFIG_FILE}"] = right.replace(b'"r": 4', b'"r": 2').replace(b'"v_proj"', b'"k_proj"')
    http.files[f"/poet/{CARD_FILE}"] = json.dumps(CARD).encode()
    assert add_lazily(state, base, http, digests["poet"], "poet").rank == 2
    http.files[f"/poet/{CONFIG_FILE}"] = right
    http.files[f"/poet/{CARD_FILE}"] = b"no card at all"
    with running_fetcher(state, base, LIMITS) as fetcher:
        async with client_of(fetcher.address) as asking:
            await asking.client.fetch(digests["poet"], "poet")
    (record,) = known_records(state)
    assert (record.status, record.rank, record.target_modules, record.card) == ("ready", 4, ("q_proj", "v_proj"), CARD)
