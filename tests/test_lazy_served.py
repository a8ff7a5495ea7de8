"""Adapters whose bytes come when a request asks for them, through a real server from a real HTTP source."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from live_server import LiveServer
from process_watch import server_processes
from receipt_watch import CANCELLED, wait_for_receipt
from safetensors.torch import load_file, save_file
from scripted_source import Fault, ScriptedSource
from small_server import card, small_server
from test_metrics_live import scrape, value
from typer.testing import CliRunner
from waiting import wait_for

from openlora.adapters.commands import adapters_app
from openlora.adapters.manifest import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, adapter_manifest
from openlora.adapters.store import AdapterStore
from openlora_client import AdapterInvalid, Answer, DeadlineExceeded, OpenLoRAClient, Unavailable

EAGER = "eager"
PROMPT = "the cat sat"
LIMITS = {"ATTEMPTS": "3", "FIRST_WAIT_SECONDS": "0.01", "LONGEST_WAIT_SECONDS": "0.05", "KEEP_SECONDS": "1"}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    server = small_server(tmp_path_factory.mktemp("lazy"), {EAGER: ()}, {})
    with pytest.MonkeyPatch.context() as patch:
        for name, limit in LIMITS.items():
            patch.setenv(f"OPENLORA_SOURCES__{name}", limit)
        try:
            yield server.start()
        finally:
            server.stop()


@pytest.fixture
def http() -> Iterator[ScriptedSource]:
    source = ScriptedSource()
    try:
        yield source
    finally:
        source.close()


@pytest.fixture
def client(live: LiveServer) -> Iterator[OpenLoRAClient]:
    with OpenLoRAClient(live.grpc_url) as client:
        yield client


class Remote:
    """The adapter `eager` at a source, under another name and with a digest of its own, added lazily."""

    def __init__(self, live: LiveServer, http: ScriptedSource, folder: Path, name: str) -> None:
        self.live, self.http, self.name, self.folder = live, http, name, folder / name
        self.folder.mkdir()
        config = json.loads((live.adapters_dir / EAGER / CONFIG_FILE).read_bytes())
        (self.folder / CONFIG_FILE).write_text(json.dumps({**config, "revision": f"{name} of {folder.name}"}))
        (self.folder / WEIGHTS_FILE).write_bytes((live.adapters_dir / EAGER / WEIGHTS_FILE).read_bytes())
        (self.folder / CARD_FILE).write_text(json.dumps(card(["cooking"])))

    def add(self, *more: str) -> Remote:
        for file in self.folder.iterdir():
            self.http.files[f"/{self.name}/{file.name}"] = file.read_bytes()
        run(self.live, "add", f"{self.http.url}/{self.name}", "--lazy", "--digest", self.digest, *more)
        assert self.downloads == 0
        return self

    @property
    def digest(self) -> str:
        return adapter_manifest(self.folder).digest

    @property
    def weights(self) -> str:
        return f"/{self.name}/{WEIGHTS_FILE}"

    @property
    def downloads(self) -> int:
        return len(self.http.asked("GET", self.weights))

    @property
    def is_here(self) -> bool:
        return AdapterStore(self.live.state_dir / "adapters").holds(self.digest)

    def show(self) -> dict[str, Any]:
        return json.loads(run(self.live, "show", self.name, "--json"))


@pytest.fixture
def remote(live: LiveServer, http: ScriptedSource, tmp_path: Path, request: pytest.FixtureRequest) -> Remote:
    return Remote(live, http, tmp_path, request.node.name.replace("_", "-")[:60])


def run(live: LiveServer, *arguments: str) -> str:
    done = CliRunner().invoke(adapters_app, [*arguments, "--state-dir", str(live.state_dir)])
    assert done.exit_code == 0, done.stderr
    return done.stdout


def ask(client: OpenLoRAClient, adapter: str | None, **more: Any) -> Answer:
    return client.generate(PROMPT, adapter, max_tokens=8, temperature=0, ignore_eos=True, **more)


def held(gate: threading.Event) -> Fault:
    """An answer that comes when the test says so."""
    return Fault(before=lambda: gate.wait(60))


def left_over(live: LiveServer) -> list[str]:
    cache = live.state_dir / "adapters"
    return [entry.name for entry in (*cache.glob(".incoming-*"), *(cache / ".fetching").glob("*"))]


def test_a_lazy_adapter_answers_as_if_it_had_been_here(client: OpenLoRAClient, remote: Remote) -> None:
    remote.add()
    shown = remote.show()
    assert (shown["status"], shown["digest"], shown["rank"], shown["path"]) == ("ready", remote.digest, 8, None)
    assert shown["card"] == card(["cooking"])
    assert not remote.is_here

    answer = ask(client, remote.name)

    assert answer.token_ids == ask(client, EAGER).token_ids
    (used,) = answer.receipt["blobs"]["adapters"]["adapters"]
    assert used["digest"].removeprefix("0x") == remote.digest
    assert remote.is_here
    assert ask(client, remote.name).token_ids == answer.token_ids
    assert remote.downloads == 1
    assert left_over(remote.live) == []


def test_an_ensemble_waits_for_all_of_its_adapters(client: OpenLoRAClient, remote: Remote, tmp_path: Path) -> None:
    other = Remote(remote.live, remote.http, tmp_path, "another-one")
    remote.add()
    other.add()
    weighted = {remote.name: 0.5, other.name: 0.25, EAGER: 0.25}  # the same numbers three times
    answer = client.generate(PROMPT, weighted, max_tokens=8, temperature=0, ignore_eos=True)
    assert answer.token_ids == ask(client, EAGER).token_ids
    assert remote.is_here and other.is_here


def test_twenty_at_once_are_one_download(live: LiveServer, client: OpenLoRAClient, remote: Remote) -> None:
    gate = threading.Event()
    remote.add()
    remote.http.fail(remote.weights, held(gate))
    with ThreadPoolExecutor(20) as threads:
        answers = [threads.submit(ask, client, remote.name) for _ in range(20)]
        wait_for("its download", lambda: remote.downloads or None)
        gate.set()
        assert {answer.result().token_ids for answer in answers} == {ask(client, EAGER).token_ids}
    assert remote.downloads == 1
    wait_for("a count", lambda: value(scrape(live), "adapter_fetches_total", outcome="fetched") or None)
    assert value(scrape(live), "adapter_fetch_seconds_count") >= 1


def test_others_are_answered_while_a_download_hangs(client: OpenLoRAClient, remote: Remote) -> None:
    gate = threading.Event()
    remote.add()
    remote.http.fail(remote.weights, held(gate))
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(ask, client, remote.name)
        wait_for("its download", lambda: remote.downloads or None)
        for adapter in (None, EAGER, None):
            assert len(ask(client, adapter).token_ids) == 8
        assert not waiting.done()
        gate.set()
        assert waiting.result().token_ids == ask(client, EAGER).token_ids


def test_a_stream_that_decodes_goes_on_while_another_waits(client: OpenLoRAClient, remote: Remote) -> None:
    gate = threading.Event()
    remote.add()
    remote.http.fail(remote.weights, held(gate))
    with (
        client.stream(PROMPT, max_tokens=200, temperature=0, ignore_eos=True) as decoding,
        ThreadPoolExecutor(1) as pool,
    ):
        made = len(next(decoding).token_ids)
        waiting = pool.submit(ask, client, remote.name)
        wait_for("its download", lambda: remote.downloads or None)
        made += sum(len(chunk.token_ids) for chunk in decoding)
        assert made == 200
        assert not waiting.done()
        gate.set()
        waiting.result()


def test_who_leaves_while_waiting_is_cancelled_and_the_download_goes_on(
    live: LiveServer, client: OpenLoRAClient, remote: Remote
) -> None:
    gate = threading.Event()
    remote.add()
    remote.http.fail(remote.weights, held(gate))
    with client.stream(PROMPT, remote.name, max_tokens=8) as waiting:
        request_id = next(waiting).request_id  # an empty delta: it waits
        assert remote.downloads == 1
    logged = wait_for_receipt(live, request_id)
    assert (logged.receipt.status, logged.receipt.out_tokens) == (CANCELLED, 0)
    assert not remote.is_here
    gate.set()
    wait_for("its bytes", lambda: remote.is_here or None)
    assert ask(client, remote.name).token_ids == ask(client, EAGER).token_ids
    assert remote.downloads == 1


def test_a_deadline_holds_while_the_source_hangs(client: OpenLoRAClient, remote: Remote) -> None:
    gate = threading.Event()
    remote.add()
    remote.http.fail(remote.weights, held(gate))
    with pytest.raises(DeadlineExceeded, match="not finished in 700 ms"):
        ask(client, remote.name, timeout_ms=700)
    assert len(ask(client, None).token_ids) == 8
    gate.set()
    wait_for("its bytes", lambda: remote.is_here or None)


def test_a_source_that_is_down_is_named_with_a_hint_and_others_go_on(
    live: LiveServer, client: OpenLoRAClient, remote: Remote
) -> None:
    remote.add()
    remote.http.fail(remote.weights, Fault(status=503), for_ever=True)
    with pytest.raises(Unavailable, match=f"adapter {remote.name}: .*503 .* 3 times") as refused:
        ask(client, remote.name)
    assert refused.value.retry_after_ms > 0
    assert remote.downloads == 3
    assert len(ask(client, EAGER).token_ids) == 8
    wait_for("its count", lambda: value(scrape(live), "adapter_fetches_total", outcome="unavailable") or None)

    remote.http.fail(remote.weights)
    assert ask(client, remote.name).token_ids == ask(client, EAGER).token_ids
    assert left_over(live) == []


def test_other_bytes_are_refused_by_both_digests_and_the_version_stays(
    live: LiveServer, client: OpenLoRAClient, remote: Remote
) -> None:
    remote.add()
    right = remote.http.files[remote.weights]
    remote.http.files[remote.weights] = right[:-4] + bytes(4)
    for _ in range(2):
        with pytest.raises(
            AdapterInvalid, match=f"adapter {remote.name}: its digest is [0-9a-f]{{64}}, {remote.digest} was"
        ):
            ask(client, remote.name)
    assert remote.show()["status"] == "ready"
    assert left_over(live) == []
    remote.http.files[remote.weights] = right
    run(live, "fetch", remote.name)  # who knows better need not wait until the server looks again
    assert ask(client, remote.name).token_ids == ask(client, EAGER).token_ids


def test_what_its_source_lost_is_a_clear_error(client: OpenLoRAClient, remote: Remote) -> None:
    remote.add()
    del remote.http.files[remote.weights]
    with pytest.raises(AdapterInvalid, match=f"adapter {remote.name}: {WEIGHTS_FILE} is missing at {remote.http.url}"):
        ask(client, remote.name)
    assert remote.show()["status"] == "ready"


def test_weights_that_can_not_be_applied_are_quarantined_when_they_come(client: OpenLoRAClient, remote: Remote) -> None:
    tensors = load_file(remote.folder / WEIGHTS_FILE)
    name = min(tensors)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, remote.folder / WEIGHTS_FILE)
    remote.add()
    with ThreadPoolExecutor(2) as threads:
        refused = threads.submit(ask, client, remote.name)
        assert len(ask(client, EAGER).token_ids) == 8
        with pytest.raises(AdapterInvalid, match=f"adapter {remote.name}: .*holds NaN or Inf"):
            refused.result()
    shown = remote.show()
    assert shown["status"] == "quarantined"
    assert "holds NaN or Inf" in shown["reason"]
    with pytest.raises(AdapterInvalid, match="holds NaN or Inf"):
        ask(client, remote.name)
    assert remote.downloads == 1  # what is known isn't downloaded again
    assert not remote.is_here


def test_what_was_evicted_comes_back_for_a_request(client: OpenLoRAClient, remote: Remote) -> None:
    wanted = ask(client, remote.add().name)
    store = AdapterStore(remote.live.state_dir / "adapters")
    with store.writing():
        assert store.evict(remote.digest)
    assert ask(client, remote.name).token_ids == wanted.token_ids
    assert remote.downloads == 2


def test_a_living_request_keeps_its_adapter_in_the_cache(client: OpenLoRAClient, remote: Remote) -> None:
    remote.add()
    store = AdapterStore(remote.live.state_dir / "adapters")
    with client.stream(PROMPT, remote.name, max_tokens=200, ignore_eos=True) as running:
        next(running)
        with store.writing():
            assert not store.evict(remote.digest)
        assert remote.is_here
        assert sum(len(chunk.token_ids) for chunk in running) > 0

    def gone() -> bool | None:  # the last response is out a moment before the request is over
        with store.writing():
            return store.evict(remote.digest) or None

    wait_for("the end of its lease", gone)


def test_a_killed_fetcher_is_followed_by_one_that_goes_on(
    live: LiveServer, client: OpenLoRAClient, remote: Remote
) -> None:
    gate = threading.Event()
    remote.add()
    remote.http.fail(remote.weights, held(gate))
    victim = server_processes(live.launcher_pid)["fetcher"]
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(ask, client, remote.name)
        wait_for("its download", lambda: remote.downloads or None)
        victim.kill()
        wait_for("the next fetcher", lambda: _fetcher_after(live, victim))
        assert waiting.result().token_ids == ask(client, EAGER).token_ids
        gate.set()
    assert remote.downloads == 2
    assert left_over(live) == []


def test_an_adapter_over_which_two_die_is_refused(live: LiveServer, client: OpenLoRAClient, remote: Remote) -> None:
    gate = threading.Event()
    remote.add()
    remote.http.fail(remote.weights, held(gate), held(gate))
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(ask, client, remote.name)
        for downloads in (1, 2):
            wait_for("its download", lambda downloads=downloads: remote.downloads == downloads or None)
            server_processes(live.launcher_pid)["fetcher"].kill()
        with pytest.raises(Unavailable, match=f"adapter {remote.name}: the process that fetched it died, 2 times"):
            waiting.result()
        gate.set()
    live.wait_ready()
    assert ask(client, remote.name).token_ids == ask(client, EAGER).token_ids


def _fetcher_after(live: LiveServer, victim: psutil.Process) -> psutil.Process | None:
    found = server_processes(live.launcher_pid).get("fetcher")
    return None if found is None or found.pid == victim.pid else found
