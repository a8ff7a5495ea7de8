"""Access on a real server, by all its doors: what strangers see, keys that end, quotas under load and crashes."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import ALICE_KEY
from live_server import LiveServer, key_digest
from process_watch import server_processes
from raw_calls import LONG, Reply, Stream, ask, http_error, post, refusal, running
from waiting import wait_for

from openlora.attribution.journal import CompletionFrame, IntentFrame, JournalReader
from openlora_client import InvalidArgument, OpenLoRAClient, OpenLoRAError, login_token

PROMPT = "Tell me about the cat."
PRIVATE_KEY = "33" * 32
CLOSED = ("secret", "carded")
NOWHERE = "nosuch"
MAX_TOKENS = 24
STREAMS = 20
SHOUTS = 200


@pytest.fixture(scope="module")
def guarded(demo: Path, demo_adapters: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """`secret` is private by the settings, `carded` by its card; `shout` has a quota."""
    root = tmp_path_factory.mktemp("guarded")
    adapters = root / "adapters"
    shutil.copytree(demo / "adapters", adapters)
    for name in CLOSED:
        shutil.copytree(demo / "adapters" / "emoji", adapters / name)
    card = adapters / "carded" / "openlora.json"
    rule = {"policy": "allow-list", "callers": ["alice"]}
    card.write_text(json.dumps({**json.loads(card.read_text()), "access": rule}))
    live = LiveServer(
        demo / "model",
        adapters,
        root / "state",
        demo_adapters,
        {
            "engine": {"dtype": "float32", "threads": 1},
            "access": {
                "callers": {"alice": key_digest(ALICE_KEY)},
                "private": {"secret": ["alice"]},
                "adapters": {"shout": {"tokens_per_day": SHOUTS}},
            },
        },
    )
    try:
        yield live.start()
    finally:
        live.stop()


def keys(server: LiveServer, *arguments: str) -> Any:
    """`openlora keys … --json`, beside the running server."""
    command = [sys.executable, "-m", "openlora.cli", "keys", *arguments, "--json", "--state-dir", str(server.state_dir)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, env=dict(os.environ)).stdout)


def gateway(server: LiveServer, path: str, api_key: str | None = None, body: Any = None) -> httpx.Response:
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    with httpx.Client(base_url=f"{server.gateway_url}/v1", headers=headers, timeout=60) as client:
        return client.get(path) if body is None else client.post(path, json=body)


def completion(server: LiveServer, api_key: str | None, model: str = "base", **more: Any) -> httpx.Response:
    return gateway(server, "/completions", api_key, {"model": model, "prompt": PROMPT, "max_tokens": 2, **more})


# --- what strangers see -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLOSED)
def test_no_door_tells_a_stranger_of_an_adapter(guarded: LiveServer, name: str) -> None:
    stranger = keys(guarded, "add", "stranger")["key"]
    message = {"role": "user", "content": "Hello."}
    for api_key in (None, stranger):
        key = {} if api_key is None else {"api_key": api_key}

        def seen(one: str, api_key: str | None = api_key, key: dict[str, str] = key) -> list[tuple[int, bytes] | str]:
            """Everything that comes back, byte for byte."""
            versions = [f'[{{"name":"{one}","version":{version}}}]' for version in ("1", "9", '"0123456789"', '"?"')]
            specs = [one, *versions, f'["{one}","emoji"]', f'["emoji",{{"name":"{one}","weight":-1}}]']
            answers: list[Any] = [refusal(guarded, adapters=spec, max_tokens=2, **key) for spec in specs]
            answers.append(refusal(guarded, sampling={"lora_name": one}, **key))
            over_http = [
                post(guarded, {"text_input": "Hello.", "adapters": one, **key}),
                post(guarded, {"text_input": "Hello.", "lora_name": one, **key}),
                post(guarded, {"text_input": "Hello.", "adapters": one, "stream": True, **key}, verb="generate_stream"),
                completion(guarded, api_key, one),
                completion(guarded, api_key, one, stream=True),
                gateway(guarded, "/chat/completions", api_key, {"model": one, "messages": [message]}),
                gateway(guarded, f"/models/{one}", api_key),
            ]
            return answers + [(answer.status_code, answer.content) for answer in over_http]

        expected = [
            (status, body.replace(NOWHERE.encode(), name.encode()))
            for status, body in (
                (answer if isinstance(answer, tuple) else (0, answer.encode())) for answer in seen(NOWHERE)
            )
        ]
        got = [answer if isinstance(answer, tuple) else (0, answer.encode()) for answer in seen(name)]
        assert got == expected
        assert got[0][1] == f"[ADAPTER_NOT_FOUND] no adapter '{name}'".encode()
        listed = gateway(guarded, "/models", api_key).content
        assert name.encode() not in listed
        assert b'"emoji"' in listed
    assert name.encode() in gateway(guarded, "/models", ALICE_KEY).content
    assert len(ask(guarded, adapters=name, api_key=ALICE_KEY, max_tokens=2).token_ids) == 2
    assert completion(guarded, ALICE_KEY, name).status_code == 200


# --- keys -------------------------------------------------------------------------------------------------------------


def test_a_key_works_at_once_and_ends_at_once(guarded: LiveServer) -> None:
    """`keys revoke` has returned: no door takes the key any more, and no restart was needed."""
    added = keys(guarded, "add", "bob")
    api_key = added["key"]
    assert len(ask(guarded, api_key=api_key, max_tokens=2).token_ids) == 2
    assert post(guarded, {"text_input": "Hello.", "api_key": api_key, "max_tokens": 2}).status_code == 200
    assert completion(guarded, api_key).status_code == 200
    under_way = running(guarded, "bobs", tokens=200, api_key=api_key)
    keys(guarded, "revoke", str(added["id"]))
    assert refusal(guarded, api_key=api_key) == "[INVALID_ARGUMENT] api_key: unknown key"
    assert http_error(post(guarded, {"text_input": "Hello.", "api_key": api_key})).endswith("api_key: unknown key")
    assert completion(guarded, api_key).status_code == 401
    assert gateway(guarded, "/models", api_key).status_code == 401
    ended = under_way.wait()  # what was accepted is answered
    assert (ended.finish_reason, len(ended.token_ids)) == ("length", 200)


def test_signed_requests(guarded: LiveServer) -> None:
    log_id = guarded.log_key.split(" log=")[1].split(" ")[0]
    token = login_token(PRIVATE_KEY, log_id)
    address = token.split(":")[1]
    assert refusal(guarded, api_key=token) == f"[INVALID_ARGUMENT] api_key: {address} is no caller of this server"
    added = keys(guarded, "add", address)
    with OpenLoRAClient(guarded.grpc_url, api_key=token) as client:
        answer = client.generate(PROMPT, max_tokens=2)
        assert answer.receipt["log_id"] == "0x" + log_id
        assert completion(guarded, token).status_code == 200
        elsewhere = login_token(PRIVATE_KEY, "00" * 32)
        assert completion(guarded, elsewhere).status_code == 401
        keys(guarded, "revoke", str(added["id"]))
        with pytest.raises(InvalidArgument, match="is no caller of this server"):
            client.generate(PROMPT, max_tokens=2)
    assert completion(guarded, token).status_code == 401


def test_without_its_callers_a_server_takes_nobody(guarded: LiveServer) -> None:
    api_key = keys(guarded, "add", "bob")["key"]
    assert len(ask(guarded, api_key=api_key, max_tokens=2).token_ids) == 2
    store = guarded.state_dir / "callers.sqlite"
    store.rename(store.with_name("aside"))
    try:
        for key in ({}, {"api_key": api_key}, {"api_key": ALICE_KEY}):
            assert refusal(guarded, **key).startswith("[UNAVAILABLE] the callers' file can't be read")
            assert completion(guarded, key.get("api_key")).status_code == 503
    finally:
        store.with_name("aside").rename(store)
    assert len(ask(guarded, api_key=api_key, max_tokens=2).token_ids) == 2


# --- limits -----------------------------------------------------------------------------------------------------------


def test_request_rates_of_a_running_server(guarded: LiveServer) -> None:
    api_key = keys(guarded, "add", "dave", "--requests-per-minute", "2")["key"]
    answers = [completion(guarded, api_key) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    error = answers[-1].json()["error"]
    assert (error["code"], error["type"]) == ("QUOTA_EXCEEDED", "rate_limit_error")
    assert 1 <= int(answers[-1].headers["Retry-After"]) <= 30
    assert refusal(guarded, api_key=api_key).startswith(
        "[QUOTA_EXCEEDED] caller 'dave': at most 2 requests a minute retry_after_ms="
    )
    keys(guarded, "limit", "dave", "--requests-per-minute", "100")
    assert completion(guarded, api_key).status_code == 200


def test_an_adapters_quota_is_shared_by_all_callers(guarded: LiveServer) -> None:
    first = ask(guarded, PROMPT, adapters="shout", max_tokens=4, api_key=ALICE_KEY, sampling={"ignore_eos": True})
    taken = first.receipt["in_tokens"] + first.receipt["out_tokens"]
    left = SHOUTS - taken - first.receipt["in_tokens"]
    too_much = refusal(guarded, PROMPT, adapters='["emoji","shout"]', max_tokens=left + 1)
    assert too_much.startswith(
        f"[QUOTA_EXCEEDED] adapter 'shout': {SHOUTS} tokens a day do not leave {SHOUTS - taken + 1} "
    )
    assert "retry_after_ms=" in too_much
    assert completion(guarded, None, "shout", max_tokens=left + 1).status_code == 429
    last = ask(guarded, PROMPT, adapters="shout", max_tokens=left, sampling={"ignore_eos": True})
    assert last.receipt["in_tokens"] + last.receipt["out_tokens"] == SHOUTS - taken
    assert refusal(guarded, PROMPT, adapters="shout", max_tokens=1).startswith("[QUOTA_EXCEEDED]")
    assert len(ask(guarded, PROMPT, adapters="emoji", max_tokens=2).token_ids) == 2


class Books:
    """What one caller took, read from the journal in its order, and from the receipts."""

    def __init__(self, server: LiveServer, caller: str) -> None:
        self.receipts = 0
        self.highest = 0  # of booked + reserved, at any moment
        self.request_ids: set[str] = set()
        booked = 0
        running: dict[str, int] = {}
        prompts: dict[str, int] = {}
        for frame, _, _ in JournalReader(server.state_dir / "journal").read():
            if isinstance(frame, IntentFrame) and frame.caller == caller:
                assert f"caller:{caller}" in frame.accounts
                prompts[frame.request_id] = frame.in_tokens
                running[frame.request_id] = frame.in_tokens + MAX_TOKENS
            elif isinstance(frame, CompletionFrame) and frame.request_id in running:
                booked += prompts[frame.request_id] + frame.out_tokens
                del running[frame.request_id]
            self.highest = max(self.highest, booked + sum(running.values()))
        assert running == {}
        self.request_ids = set(prompts)
        for receipt in server.receipts():
            if receipt["request_id"].removeprefix("0x") in self.request_ids:
                self.receipts += receipt["in_tokens"] + receipt["out_tokens"]
        assert self.receipts == booked


def used_today(server: LiveServer, key_id: int, expected: int) -> int:
    """What `keys show` says, once the ledger was saved: within a second or so."""

    def used() -> int:
        return keys(server, "show", str(key_id))["tokens_used_today"]

    wait_for(f"{expected} tokens used", lambda: used() == expected, words=used)
    return expected


def prompt_tokens(server: LiveServer) -> int:
    return ask(server, PROMPT, max_tokens=1).receipt["in_tokens"]


def start(server: LiveServer, api_key: str, label: str) -> Stream:
    return Stream(server).start(
        {"text_input": PROMPT, "max_tokens": MAX_TOKENS, "api_key": api_key, **LONG}, label=label
    )


def exactly_left(server: LiveServer, api_key: str, quota: int, used: int, prompt: int) -> None:
    """One token more than what is left is refused, and all of what is left is granted and taken."""
    left = quota - used - prompt
    assert left > 0
    with_all = {"sampling": {"ignore_eos": True, "temperature": 0}, "api_key": api_key}
    assert refusal(server, PROMPT, max_tokens=left + 1, **with_all).startswith("[QUOTA_EXCEEDED] caller ")
    assert len(ask(server, PROMPT, max_tokens=left, **with_all).token_ids) == left
    assert refusal(server, PROMPT, max_tokens=1, **with_all).startswith("[QUOTA_EXCEEDED] caller ")


def test_a_quota_holds_under_concurrent_streams_and_a_restart(guarded: LiveServer) -> None:
    prompt = prompt_tokens(guarded)
    each = prompt + MAX_TOKENS
    quota = 12 * each + each // 2
    added = keys(guarded, "add", "erin", "--tokens-per-day", str(quota))
    api_key = added["key"]
    replies: list[Reply] = []

    def client(number: int) -> None:
        """Several one after the other; some are stopped by a word of theirs, and give back what they did not take."""
        for turn in range(3):
            stream = start(guarded, api_key, f"erin-{number}-{turn}")
            if number % 3 == 0:
                stream.arrived()
                ask(guarded, "", stop=True, label=f"erin-{number}-{turn}", api_key=api_key)
            replies.append(stream.wait())

    clients = [threading.Thread(target=client, args=(number,)) for number in range(STREAMS)]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    assert len(replies) == 3 * STREAMS
    refused = [reply.error for reply in replies if reply.errors]
    answered = [reply for reply in replies if not reply.errors]
    assert all(words.startswith("[QUOTA_EXCEEDED] caller 'erin': ") for words in refused)
    assert len(refused) >= 3 * STREAMS - quota // prompt
    books = Books(guarded, "erin")
    assert len(books.request_ids) == len(answered) >= 12
    assert books.highest <= quota
    assert used_today(guarded, added["id"], books.receipts) == books.receipts
    guarded.stop()
    guarded.start()
    # Raised to what makes room for one more, which shows that not a token was forgotten or made up.
    quota = books.receipts + prompt + 7
    keys(guarded, "limit", "erin", "--tokens-per-day", str(quota))
    exactly_left(guarded, api_key, quota, books.receipts, prompt)


def test_a_quota_is_exact_after_a_kill(guarded: LiveServer) -> None:
    """kill -9 of the generation step with streams under way: they are booked as their receipts say."""
    prompt = prompt_tokens(guarded)
    added = keys(guarded, "add", "fred", "--tokens-per-day", "100000")
    api_key = added["key"]
    with OpenLoRAClient(guarded.grpc_url, api_key=api_key) as client:
        streams = [client.stream(PROMPT, max_tokens=1500, ignore_eos=True, temperature=0) for _ in range(6)]
        for stream in streams:
            next(stream)
        server_processes(guarded.launcher_pid)["generation"].kill()
        for stream in streams:
            with pytest.raises(OpenLoRAError):
                for _ in stream:
                    pass
    guarded.wait_ready()
    used = _receipts_of(guarded, "fred", len(streams))
    quota = used + prompt + 9
    keys(guarded, "limit", "fred", "--tokens-per-day", str(quota))
    exactly_left(guarded, api_key, quota, used, prompt)


def test_a_quota_is_exact_after_the_journal_failed(guarded: LiveServer) -> None:
    """A disk without room ends streams with an error; what their receipts say is booked, and the rest given back."""
    prompt = prompt_tokens(guarded)
    added = keys(guarded, "add", "gina", "--tokens-per-day", "100000")
    api_key = added["key"]
    streams = [running(guarded, f"gina-{number}", tokens=1500, api_key=api_key) for number in range(6)]
    pid = server_processes(guarded.launcher_pid)["generation"].pid
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (16, hard))
    try:
        errors = [stream.wait().error for stream in streams]
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
    assert all(error.startswith("[UNAVAILABLE]") for error in errors)
    guarded.wait_ready()
    used = _receipts_of(guarded, "gina", len(streams))
    quota = used + prompt + 5
    keys(guarded, "limit", "gina", "--tokens-per-day", str(quota))
    exactly_left(guarded, api_key, quota, used, prompt)


def _receipts_of(server: LiveServer, caller: str, count: int) -> int:
    """The tokens of the caller's receipts, once it has so many."""
    intents = {
        frame.request_id
        for frame, _, _ in JournalReader(server.state_dir / "journal").read()
        if isinstance(frame, IntentFrame) and frame.caller == caller
    }

    def all_of_them() -> list[dict[str, Any]] | None:
        found = [one for one in server.receipts() if one["request_id"].removeprefix("0x") in intents]
        return found if len(found) == count else None

    return sum(one["in_tokens"] + one["out_tokens"] for one in wait_for(f"{count} receipts", all_of_them))
