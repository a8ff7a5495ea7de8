"""Groups and tasks on a running server: by every door, without a restart, with receipts that name what was used."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from conftest import ALICE_KEY
from live_server import LiveServer, key_digest
from small_server import small_server

from openlora.adapters.catalog_reader import CatalogReader
from openlora.attribution.log_key import load_log_key
from openlora.attribution.verify import verify_receipt
from openlora.errors import AdapterNotFound, InvalidArgument
from openlora_client import OpenLoRAClient

PROMPT = "the cat sat"
GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
KEYS = [f"conversation {number}" for number in range(40)]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """`secret` is alice's. `v1` and `v2` are for sql, `v2` for poems."""
    access = {"callers": {"alice": key_digest(ALICE_KEY)}, "private": {"secret": ["alice"]}}
    adapters = {"v1": ["sql"], "v2": ["sql", "poems"], "secret": ["gossip"]}
    server = small_server(tmp_path_factory.mktemp("routing"), adapters, {"access": access})
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def client(live: LiveServer) -> Iterator[OpenLoRAClient]:
    with OpenLoRAClient(live.grpc_url) as made:
        yield made


@pytest.fixture(scope="module")
def alice(live: LiveServer) -> Iterator[OpenLoRAClient]:
    with OpenLoRAClient(live.grpc_url, api_key=ALICE_KEY) as made:
        yield made


@pytest.fixture(scope="module")
def texts(client: OpenLoRAClient, alice: OpenLoRAClient) -> dict[str, str]:
    """What each adapter answers by itself; all differ."""
    answers = {name: client.generate(PROMPT, name, **GREEDY).text for name in ("v1", "v2")}
    answers["secret"] = alice.generate(PROMPT, "secret", **GREEDY).text
    assert len({*answers.values(), client.generate(PROMPT, **GREEDY).text}) == 4
    return answers


def routes(live: LiveServer, *arguments: str) -> None:
    command = [sys.executable, "-m", "openlora.cli", "routes", *arguments, "--state-dir", str(live.state_dir)]
    subprocess.run(command, check=True, capture_output=True)


def digests(live: LiveServer) -> dict[str, str]:
    reader = CatalogReader(live.state_dir / "catalog.sqlite")
    try:
        return {record.name: record.digest for record in reader.records()}
    finally:
        reader.close()


def used(receipt: dict[str, Any], live: LiveServer, text: str) -> list[str]:
    """Names of the adapters that a receipt names by digest; it must verify."""
    assert verify_receipt(receipt, load_log_key(live.log_key), PROMPT, text).known
    names = {digest: name for name, digest in digests(live).items()}
    return [names[use["digest"]] for use in receipt["blobs"]["adapters"]["adapters"]]


def test_a_canary_is_moved_while_the_server_runs(
    live: LiveServer, client: OpenLoRAClient, alice: OpenLoRAClient, texts: dict[str, str]
) -> None:
    with pytest.raises(AdapterNotFound, match="no adapter 'support'"):
        client.generate(PROMPT, "support", **GREEDY)
    chosen: dict[tuple[int, str], str] = {}
    for part in (20, 60):
        routes(live, "set", "support", "--to", f"v1={100 - part}", "--to", f"v2={part}")
        for key in KEYS:
            answer = client.generate(PROMPT, "support", routing_key=key, **GREEDY)
            (name,) = used(answer.receipt, live, answer.text)
            assert answer.text == texts[name]
            chosen[part, key] = name
    counts = Counter(chosen[60, key] for key in KEYS)
    assert set(counts) == {"v1", "v2"}
    assert {key for key in KEYS if chosen[20, key] == "v2"} < {key for key in KEYS if chosen[60, key] == "v2"}
    ensemble = alice.generate(PROMPT, [("support", 0.5), ("secret", 0.25)], **GREEDY)
    assert used(ensemble.receipt, live, ensemble.text)[1] == "secret"
    routes(live, "remove", "support")
    with pytest.raises(AdapterNotFound, match="no adapter 'support'"):
        client.generate(PROMPT, "support", **GREEDY)


def test_tasks(live: LiveServer, client: OpenLoRAClient, alice: OpenLoRAClient, texts: dict[str, str]) -> None:
    poem = client.generate(PROMPT, '{"task": "poems"}', **GREEDY)
    assert (poem.text, used(poem.receipt, live, poem.text)) == (texts["v2"], ["v2"])
    with pytest.raises(InvalidArgument, match="several adapters are for the task 'sql': v1, v2; name one"):
        client.generate(PROMPT, '{"task": "sql"}', **GREEDY)
    routes(live, "prefer", "sql", "v1")
    assert client.generate(PROMPT, [{"task": "sql"}], **GREEDY).text == texts["v1"]
    with pytest.raises(AdapterNotFound, match="no adapter for the task 'gossip'"):
        client.generate(PROMPT, '{"task": "gossip"}', **GREEDY)
    assert alice.generate(PROMPT, '{"task": "gossip"}', **GREEDY).text == texts["secret"]


def test_the_gateway_lists_groups_and_takes_them_as_models(live: LiveServer, texts: dict[str, str]) -> None:
    routes(live, "set", "canary", "--to", "v1=1", "--to", "v2=1")
    routes(live, "set", "hidden", "--to", "secret=1")

    def listed(headers: dict[str, str]) -> dict[str, dict[str, Any]]:
        answer = httpx.get(f"{live.gateway_url}/v1/models", headers=headers).json()
        return {model["id"]: model for model in answer["data"]}

    assert set(listed({})) == {"base", "v1", "v2", "canary"}
    mine = listed({"authorization": f"Bearer {ALICE_KEY}"})
    assert set(mine) == {"base", "v1", "v2", "secret", "canary", "hidden"}
    for name, seen in (("canary", 200), ("hidden", 404), ("v1", 200), ("nobody", 404)):
        found = httpx.get(f"{live.gateway_url}/v1/models/{name}")
        assert found.status_code == seen
        assert seen == 404 or found.json() == mine[name]
    assert (mine["canary"]["parent"], mine["canary"]["root"]) == ("base", "model")
    with openai.OpenAI(base_url=f"{live.gateway_url}/v1", api_key=ALICE_KEY, max_retries=0) as gateway:

        def complete(model: str, **extra: str) -> str:
            options = {"ignore_eos": True, **extra}
            made = gateway.completions.create(
                model=model, prompt=PROMPT, temperature=0, max_tokens=8, extra_body=options
            )
            return made.choices[0].text

        assert complete("hidden") == texts["secret"]
        assert {complete("canary", routing_key=key) for key in KEYS[:20]} == {texts["v1"], texts["v2"]}
        assert len({complete("canary", routing_key="k") for _ in range(4)}) == 1
    refused = httpx.post(f"{live.gateway_url}/v1/completions", json={"model": "hidden", "prompt": PROMPT})
    unknown = httpx.post(f"{live.gateway_url}/v1/completions", json={"model": "nobody", "prompt": PROMPT})
    assert refused.status_code == unknown.status_code == 404
    assert json.loads(refused.text.replace("hidden", "nobody")) == unknown.json()
