"""`stop` and deadlines: who may end which request, what he is told, and what is left in the books."""

from __future__ import annotations

import json

from conftest import ALICE_KEY
from live_server import LiveServer
from raw_calls import ask, books, call, http_error, post, refusal, running, stop

from openlora.attribution.journal import STATUS_CANCELLED


def test_stop_ends_the_one_request_and_leaves_no_receipt_of_its_own(server: LiveServer) -> None:
    before = books(server)
    victim = running(server, "mine", tokens=1500)
    reply = stop(server, "mine")
    assert len(reply.responses) == 1
    assert (reply.text, reply.token_ids, reply.finish_reason) == ("", [], "")
    assert reply.strings("receipt") == []
    ended = victim.wait()
    assert ended.finish_reason == "cancelled"
    assert ended.receipt["status"] == STATUS_CANCELLED
    assert ended.receipt["out_tokens"] == len(ended.token_ids) < 1500
    assert books(server) == (before[0] + 1, before[1] + 1)
    assert stop(server, "mine").error == "[REQUEST_NOT_FOUND] 0 running requests of yours have the id 'mine'"


def test_stop_over_http(server: LiveServer) -> None:
    victim = running(server, "by-http", tokens=1500)
    response = post(server, {"text_input": "", "stop": True, "id": "by-http"})
    assert (response.status_code, response.json()["text_output"]) == (200, "")
    assert "receipt" not in response.json()
    assert victim.wait().finish_reason == "cancelled"


def test_stop_that_fits_none_or_several_stops_nothing(server: LiveServer) -> None:
    before = books(server)
    twins = [running(server, "twin", tokens=600) for _ in range(2)]
    mine = running(server, "alices", tokens=600, api_key=ALICE_KEY)
    words = "[REQUEST_NOT_FOUND] {} running requests of yours have the id {!r}"
    assert stop(server, "twin").error == words.format(2, "twin")
    assert stop(server, "alices").error == words.format(0, "alices")
    assert stop(server, "twin", api_key=ALICE_KEY).error == words.format(0, "twin")
    assert stop(server, "").error == words.format(0, "")
    assert stop(server, "nobody").error == words.format(0, "nobody")
    assert stop(server, "twin", api_key="bob").error == "[INVALID_ARGUMENT] api_key: unknown key"
    assert call(server, {"text_input": b"\xff", "stop": True}, label="twin").error.startswith("[INVALID_ARGUMENT]")
    for stream in (*twins, mine):
        ended = stream.wait()
        assert (ended.finish_reason, len(ended.token_ids)) == ("length", 600)
    assert books(server) == (before[0] + 3, before[1] + 3)


def test_the_right_caller_stops_the_right_one(server: LiveServer) -> None:
    of_alice = running(server, "same", tokens=1500, api_key=ALICE_KEY)
    of_nobody = running(server, "same", tokens=60)
    assert len(stop(server, "same", api_key=ALICE_KEY).responses) == 1
    assert of_alice.wait().finish_reason == "cancelled"
    assert of_nobody.wait().finish_reason == "length"


def test_a_deadline(server: LiveServer) -> None:
    before = books(server)
    sampling = {"ignore_eos": True, "timeout_ms": 100}
    words = "[DEADLINE_EXCEEDED] not finished in 100 ms"
    assert refusal(server, sampling=sampling, max_tokens=2000) == words
    streamed = ask(server, sampling=sampling, max_tokens=2000, stream=True)
    assert streamed.error == words
    over_http = post(server, {"text_input": "a", "max_tokens": 2000, "sampling_parameters": json.dumps(sampling)})
    assert (over_http.status_code, http_error(over_http)) == (400, words)
    assert books(server) == (before[0] + 3, before[1] + 3)
