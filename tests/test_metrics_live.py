"""The metrics port of a running server after known traffic, to the last token."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from live_server import LiveServer
from process_watch import server_processes
from receipt_watch import CANCELLED, wait_for_receipt
from small_server import small_server
from waiting import wait_for

from openlora.errors import AdapterNotFound, InvalidArgument
from openlora_client import Answer, OpenLoRAClient

LINE = re.compile(r"(?P<name>\w+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")
LABEL = re.compile(r'(\w+)="([^"]*)"')
OWN_LABELS = 2
LONGEST = 200  # tokens: what the context has room for beside the prompt
NAMES = ("one", "tw.o-2_", "three", "four", "five")
Scrape = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    settings = {"metrics": {"adapter_labels": OWN_LABELS}}
    server = small_server(tmp_path_factory.mktemp("metrics"), dict.fromkeys(NAMES, ()), settings)
    try:
        yield server.start()
    finally:
        server.stop()


def scrape(server: LiveServer) -> Scrape:
    text = httpx.get(f"http://{server.host}:{server.metrics_port}/metrics", timeout=10).text
    found = [LINE.fullmatch(line) for line in text.splitlines() if line.startswith("openlora_")]
    return {(one["name"], frozenset(LABEL.findall(one["labels"] or ""))): float(one["value"]) for one in found}


def value(scraped: Scrape, name: str, **labels: str) -> float:
    return scraped.get((f"openlora_{name}", frozenset(labels.items())), 0.0)


def total(scraped: Scrape, name: str) -> float:
    return sum(amount for (found, _), amount in scraped.items() if found == f"openlora_{name}")


def test_counts_are_those_of_the_answers(live: LiveServer) -> None:
    asked: list[tuple[tuple[str, ...], int]] = [((), 3)]  # adapters, output tokens
    asked += [((name,), 2 + place) for place, name in enumerate(NAMES)]
    asked += [(("one", "tw.o-2_"), 9), (("one", "five"), 4), (("three", "four"), 6)]
    with OpenLoRAClient(live.grpc_url) as client:

        def ask(adapters: tuple[str, ...], tokens: int) -> Answer:
            return client.generate("the cat sat", list(adapters) or None, max_tokens=tokens, ignore_eos=True)

        client.generate("the cat sat", "one", max_tokens=1)  # the first two of these names get labels of their own
        wait_for("its label", lambda: value(scrape(live), "adapter_first_tokens_total", adapter="one") or None)
        client.generate("the cat sat", "tw.o-2_", max_tokens=1)
        asked += [(("one",), 1), (("tw.o-2_",), 1)]
        with ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(ask, *zip(*asked[:-2], strict=True)))
        for _ in range(2):
            with pytest.raises(AdapterNotFound):
                client.generate("the cat sat", "nobody")
        with pytest.raises(InvalidArgument):
            client.generate("the cat sat", top_p=7)
        with pytest.raises(InvalidArgument):  # the resolver does not know the model's limit, generation does
            client.generate("the cat sat" * 100, "one")
    prompt_tokens = answers[0].usage.input_tokens
    assert [answer.usage.output_tokens for answer in answers] == [tokens for _, tokens in asked[:-2]]

    expected: Counter[tuple[str, str]] = Counter()
    for adapters, tokens in asked:
        own = {name if name in NAMES[:OWN_LABELS] else "other" for name in adapters} or {"base"}
        for label in own:
            expected["requests", label] += 1
            expected["prompt_tokens", label] += prompt_tokens
            expected["output_tokens", label] += tokens

    def counted() -> Scrape | None:
        found = scrape(live)
        return found if total(found, "requests_total") == len(asked) + 1 else None

    found = wait_for("all requests on the metrics port", counted)
    for label in ("base", "other", *NAMES[:OWN_LABELS]):
        length = value(found, "adapter_requests_total", adapter=label, outcome="length")
        stop = value(found, "adapter_requests_total", adapter=label, outcome="stop")
        assert length + stop == expected["requests", label]
        assert value(found, "adapter_first_tokens_total", adapter=label) == expected["requests", label]
        for name in ("prompt_tokens", "output_tokens"):
            assert value(found, f"adapter_{name}_total", adapter=label) == expected[name, label]
        waited = value(found, "adapter_queue_seconds_total", adapter=label)
        assert 0 < waited < value(found, "adapter_time_to_first_token_seconds_total", adapter=label)
    assert value(found, "adapter_requests_total", adapter="one", outcome="invalid_argument") == 1
    assert value(found, "prompt_tokens_total") == prompt_tokens * len(asked)
    assert value(found, "output_tokens_total") == sum(tokens for _, tokens in asked)
    for name in ("queue_seconds", "time_to_first_token_seconds"):
        assert value(found, f"{name}_count") == value(found, f"{name}_bucket", le="+Inf") == len(asked)
        parts = sum(value(found, f"adapter_{name}_total", adapter=label) for label in ("base", "other"))
        assert parts <= value(found, f"{name}_sum")
    assert value(found, "requests_refused_total", code="adapter_not_found") == 2
    assert value(found, "requests_refused_total", code="invalid_argument") == 1

    labels = {dict(labels)["adapter"] for _, labels in found if "adapter" in dict(labels)}
    assert labels == {"base", "other", *NAMES[:OWN_LABELS]}


def test_the_engines_statistics_come_through(live: LiveServer) -> None:
    before = scrape(live)
    with OpenLoRAClient(live.grpc_url) as client:
        answer = client.generate("the cat sat", "one", max_tokens=50, ignore_eos=True)
    assert answer.usage.output_tokens == 50

    def stepped() -> Scrape | None:
        found = scrape(live)
        steps = value(found, "engine_steps_total") - value(before, "engine_steps_total")
        return found if steps >= 50 and not value(found, "engine_running_requests") else None

    found = wait_for("the engine's steps", stepped)
    assert value(found, "engine_up") == 1
    assert value(found, "engine_kv_blocks") > 0
    assert value(found, "engine_adapters_loaded") >= 1
    assert value(found, "engine_adapter_loads_total", to="host") == len(NAMES)  # each once, by the test before
    assert value(found, "engine_adapter_uses_total", tier="disk") >= len(NAMES)
    assert 0 < value(found, "engine_host_adapter_bytes") <= value(found, "engine_host_adapter_limit_bytes")
    assert value(found, "engine_waiting_requests") == 0
    looked_up = value(found, "engine_prefix_lookup_tokens_total") - value(before, "engine_prefix_lookup_tokens_total")
    assert looked_up == answer.usage.input_tokens


def test_a_cancelled_answer_counts_what_its_receipt_says(live: LiveServer) -> None:
    before = scrape(live)
    with OpenLoRAClient(live.grpc_url) as client:
        stream = client.stream("the cat sat", "one", max_tokens=LONGEST, ignore_eos=True)
        request_id = next(stream).request_id
        stream.close()
    receipt = wait_for_receipt(live, request_id).receipt
    assert receipt.status == CANCELLED and receipt.out_tokens < LONGEST
    labels = {"adapter": "one", "outcome": "cancelled"}
    found = wait_for("the request", lambda: later(live, before, "adapter_requests_total", **labels))
    for name, tokens in (("prompt_tokens", receipt.in_tokens), ("output_tokens", receipt.out_tokens)):
        for metric, of in ((f"{name}_total", {}), (f"adapter_{name}_total", {"adapter": "one"})):
            assert value(found, metric, **of) - value(before, metric, **of) == tokens


def test_counters_go_on_when_the_engine_dies(live: LiveServer) -> None:
    before = scrape(live)
    server_processes(live.launcher_pid)["engine"].kill()
    wait_for("word of its death", lambda: value(scrape(live), "engine_up") == 0 or None)
    live.wait_ready()
    with OpenLoRAClient(live.grpc_url) as client:
        client.generate("the cat sat", max_tokens=20, ignore_eos=True)
    found = wait_for("more steps", lambda: later(live, before, "engine_steps_total", by=20))
    assert value(found, "engine_up") == 1
    for (name, labels), amount in before.items():
        if name.endswith("_total"):
            assert found[name, labels] >= amount


def later(server: LiveServer, before: Scrape, name: str, by: float = 1, **labels: str) -> Scrape | None:
    """What the port says once a counter is so much further than it was."""
    found = scrape(server)
    return found if value(found, name, **labels) >= value(before, name, **labels) + by else None
