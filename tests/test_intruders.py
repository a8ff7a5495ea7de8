"""Whoever calls a step by itself, or brings it what another step did not make, gets no tokens, no receipt, no cancel.

Not refused, and documented so: a caller with a genuine ticket who also carries every hand-over himself gets what the
ensemble would have given him, with its one receipt. He could have asked the ensemble.
"""

from __future__ import annotations

import json
import queue
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import msgspec
import psutil
import pytest
import tritonclient.grpc as grpcclient
from conftest import ALICE_KEY
from live_server import LiveServer
from raw_calls import Reply, Stream, ask, books, call, events, http_error, post
from tritonclient.utils import InferenceServerException
from usage_watch import UsageWatch

from openlora.serving.chunk import Chunk, seal_chunk
from openlora.serving.seal import Seal
from openlora.serving.ticket import Ticket, TicketOffice

TEXT = "Tell me about the cat."
VICTIM_TOKENS = 100
NOT_MADE_HERE = "[NOT_AUTHENTICATED] this {} was not made by this server: call the ensemble `openlora`"
ONLY_THROUGH = "[NOT_AUTHENTICATED] generation is a step of the ensemble `openlora` and answers only through it"
USED = "[NOT_AUTHENTICATED] the ticket was used before: call the ensemble `openlora`"
OTHER_TEXT = "[NOT_AUTHENTICATED] the ticket was made for another text: call the ensemble `openlora`"
EXPIRED = "[NOT_AUTHENTICATED] the ticket has expired: call the ensemble `openlora`"
PASSED_ON = "[NOT_AUTHENTICATED] this response was passed on before: call the ensemble `openlora`"


@contextmanager
def undisturbed(server: LiveServer, also: int = 0) -> Iterator[None]:
    """Somebody's request runs meanwhile and ends as if nothing was; but for `also` requests nothing else is written."""
    before = books(server)
    prompt = {"text_input": TEXT, "stream": True, "max_tokens": VICTIM_TOKENS}
    victim = Stream(server).start({**prompt, "sampling_parameters": '{"ignore_eos":true}'}, label="victim").arrived()
    yield
    ended = victim.wait()
    assert (ended.finish_reason, len(ended.token_ids)) == ("length", VICTIM_TOKENS)
    assert books(server) == (before[0] + 1 + also, before[1] + 1 + also)
    assert ask(server, max_tokens=2).finish_reason == "length"  # and the server still answers


def resolve(server: LiveServer, text: str = TEXT, label: str = "", **inputs: Any) -> bytes:
    """A genuine ticket: the resolver is a public model, and gives nothing else."""
    reply = call(server, {"text_input": text, **inputs}, model="adapter_resolver", label=label)
    (response,) = reply.responses
    assert [output.name for output in response.get_response().outputs] == ["ticket"]
    return response.as_numpy("ticket").flat[0]


def generate(server: LiveServer, ticket: bytes, text: str = TEXT) -> Reply:
    return call(server, {"ticket": ticket, "text_input": text}, model="generation")


def attribute(server: LiveServer, chunk: bytes) -> Reply:
    return call(server, {"chunk": chunk}, model="attribution")


def chunks(reply: Reply) -> list[bytes]:
    return [response.as_numpy("chunk").flat[0] for response in reply.responses]


def opened(chunk: bytes) -> dict[str, Any]:
    return json.loads(chunk[64:])


# --- the resolver ---------------------------------------------------------------------------------------------------


def test_the_resolver_alone_gives_a_ticket_and_nothing_else(server: LiveServer) -> None:
    with undisturbed(server):
        ticket = resolve(server, api_key=ALICE_KEY, adapters="secret")
        assert TEXT.encode() not in ticket
        assert ALICE_KEY.encode() not in ticket
        over_http = post(server, {"text_input": TEXT}, model="adapter_resolver")
        assert over_http.json().keys() == {"model_name", "model_version", "ticket"}


def test_the_resolver_alone_refuses_what_the_ensemble_refuses(server: LiveServer) -> None:
    for inputs, words in (
        ({"text_input": TEXT, "adapters": "secret"}, "[ADAPTER_NOT_FOUND] no adapter 'secret'"),
        ({"text_input": TEXT, "api_key": "bob"}, "[INVALID_ARGUMENT] api_key: unknown key"),
        ({"text_input": b"\xff"}, "[INVALID_ARGUMENT] text_input: not UTF-8: byte 0 is 0xff"),
        ({"max_tokens": 3}, "[INVALID_ARGUMENT] text_input: missing"),
    ):
        assert call(server, inputs, model="adapter_resolver").error == words


# --- generation -----------------------------------------------------------------------------------------------------


def test_generation_without_a_ticket(server: LiveServer) -> None:
    with undisturbed(server):
        reply = call(server, {"text_input": TEXT}, model="generation")
        assert "missing required input(s) ['ticket']" in str(reply.errors[0])
        for garbage in (b"", b"ticket", b"\xff" * 100, b"0" * 64, b"0" * 64 + b"{}"):
            reply = generate(server, garbage)
            assert (reply.error, reply.responses) == (NOT_MADE_HERE.format("ticket"), [])
        over_http = post(server, {"text_input": TEXT, "ticket": "x"}, model="generation")
        assert (over_http.status_code, http_error(over_http)) == (400, NOT_MADE_HERE.format("ticket"))


def test_generation_with_a_forged_ticket(server: LiveServer) -> None:
    with undisturbed(server):
        genuine = resolve(server, max_tokens=1)
        ticket = msgspec.json.decode(genuine[64:], type=Ticket)
        richer = msgspec.structs.replace(ticket, caller="alice", timeout_ms=10**9)
        for forged in (
            genuine[:64] + msgspec.json.encode(richer),
            genuine.replace(b'"max_tokens":1', b'"max_tokens":9'),
            bytes([genuine[0] ^ 1]) + genuine[1:],
            genuine + b" ",
            TicketOffice(_seal_of_another_run(server)).issue(ticket),
        ):
            assert forged != genuine
            reply = generate(server, forged)
            assert (reply.error, reply.responses) == (NOT_MADE_HERE.format("ticket"), [])


def _seal_of_another_run(server: LiveServer) -> Seal:
    """With a key of the right shape that is not this run's."""
    file = server.state_dir / "another.key"
    file.write_bytes(b"k" * 32)
    return Seal(file, "ticket")


def test_generation_with_an_expired_ticket(server: LiveServer) -> None:
    """Sealed with the server's own key, which only its owner can read, because a real one takes 30 s to expire."""
    seal = Seal(server.state_dir / "run" / "run.key", "ticket")
    ticket = msgspec.json.decode(resolve(server)[64:], type=Ticket)
    stale = msgspec.structs.replace(ticket, expires_at=time.time() - 1)
    with undisturbed(server):
        reply = generate(server, TicketOffice(seal).issue(stale))
        assert (reply.error, reply.responses) == (EXPIRED, [])


def test_generation_with_a_genuine_ticket(server: LiveServer) -> None:
    """The resolver gives it to anybody; without attribution behind it no token is made for it, once or twice."""
    with undisturbed(server):
        ticket = resolve(server, max_tokens=4, stream=True)
        other = generate(server, ticket, "Another text.")
        assert (other.error, other.responses) == (OTHER_TEXT, [])
        first = generate(server, ticket)
        assert first.error == ONLY_THROUGH
        assert [opened(chunk)["kind"] for chunk in chunks(first)] == ["hello"]
        assert opened(chunks(first)[0]).keys() == {"kind", "request_id", "index"}
        again = generate(server, ticket)
        assert (again.error, again.responses) == (USED, [])
        body = {"text_input": TEXT, "ticket": resolve(server).decode()}
        hello, error = events(post(server, body, model="generation", verb="generate_stream"))
        assert opened(hello["chunk"].encode())["kind"] == "hello"
        assert error == {"error": ONLY_THROUGH}


def test_generation_with_a_genuine_stop_ticket_stops_nobody(server: LiveServer) -> None:
    prompt = {"text_input": TEXT, "stream": True, "max_tokens": 2000, "sampling_parameters": '{"ignore_eos":true}'}
    victim = Stream(server).start(prompt, label="long").arrived()
    ticket = resolve(server, "", label="long", stop=True)
    assert msgspec.json.decode(ticket[64:], type=Ticket).kind == "stop"
    reply = generate(server, ticket, "")
    assert reply.error == ONLY_THROUGH
    assert [opened(chunk)["kind"] for chunk in chunks(reply)] == ["hello"]
    assert victim.reply.finals == 0  # it still runs
    assert ask(server, "", stop=True, label="long").errors == []
    assert victim.wait().finish_reason == "cancelled"


# --- attribution ----------------------------------------------------------------------------------------------------


def test_attribution_with_garbage(server: LiveServer) -> None:
    with undisturbed(server):
        reply = call(server, {}, model="attribution")
        assert "missing required input(s) ['chunk']" in str(reply.errors[0])
        for garbage in (b"", b"chunk", b"\xff" * 100, b"0" * 64 + b"{}"):
            reply = attribute(server, garbage)
            assert (reply.error, reply.responses) == (NOT_MADE_HERE.format("usage"), [])
        over_http = post(server, {"chunk": "x"}, model="attribution")
        assert (over_http.status_code, http_error(over_http)) == (400, NOT_MADE_HERE.format("usage"))


def test_attribution_with_forged_chunks(server: LiveServer) -> None:
    """Somebody's running request, and a receipt that somebody else has: neither can be touched by naming it."""
    theirs = ask(server, max_tokens=2).receipt
    with undisturbed(server):
        victim = UsageWatch(server.state_dir).read().unfinished[-1]
        forger = Seal(_write(server, b"f" * 32), "usage")
        for chunk in (
            Chunk("last", theirs["request_id"].removeprefix("0x"), 1, text="mine", seq=theirs["seq"]),
            Chunk("probe", victim, 1 << 40),
            Chunk("last", victim, 1 << 40, finish_reason="cancelled", seq=0),
            Chunk("stopped", victim, 1 << 40),
            Chunk("delta", victim, 0, text="forged"),
        ):
            for forged in (seal_chunk(forger, chunk), b"0" * 64 + msgspec.json.encode(chunk)):
                reply = attribute(server, forged)
                assert (reply.error, reply.responses) == (NOT_MADE_HERE.format("usage"), [])


def _write(server: LiveServer, key: bytes) -> Any:
    file = server.state_dir / "forged.key"
    file.write_bytes(key)
    return file


def test_a_hand_over_of_one_step_is_none_for_another(server: LiveServer) -> None:
    with undisturbed(server):
        ticket = resolve(server)
        reply = attribute(server, ticket)
        assert (reply.error, reply.responses) == (NOT_MADE_HERE.format("usage"), [])
        (hello,) = chunks(generate(server, ticket))
        reply = generate(server, hello)
        assert (reply.error, reply.responses) == (NOT_MADE_HERE.format("ticket"), [])
        altered = hello.replace(b'"hello"', b'"probe"')
        assert attribute(server, altered).error == NOT_MADE_HERE.format("usage")


def test_a_hello_that_comes_too_late_or_twice(server: LiveServer) -> None:
    with undisturbed(server):
        (hello,) = chunks(generate(server, resolve(server)))
        late = attribute(server, hello)
        assert (late.errors, late.responses) == ([], [])
        again = attribute(server, hello)
        assert (again.error, again.responses) == (PASSED_ON, [])


class Carrier(Stream):
    """Calls generation and carries each hand-over to attribution by hand."""

    def __init__(self, server: LiveServer, ticket: bytes) -> None:
        super().__init__(server)
        self._server = server
        self._made: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.carried: list[bytes] = []
        self.answers: list[Reply] = []
        self.start({"ticket": ticket, "text_input": TEXT}, model="generation")

    def carry(self) -> Carrier:
        while not self.carried or opened(self.carried[-1])["kind"] != "last":
            self.carried.append(self._made.get(timeout=30))
            self.answers.append(attribute(self._server, self.carried[-1]))
        self.wait()
        return self

    def _take(self, result: grpcclient.InferResult | None, error: InferenceServerException | None) -> None:
        super()._take(result, error)
        if result is not None and result.get_response().outputs:
            self._made.put(result.as_numpy("chunk").flat[0])


def test_what_was_carried_by_hand_cannot_be_replayed(server: LiveServer) -> None:
    with undisturbed(server, also=1):
        carrier = Carrier(server, resolve(server, max_tokens=5, stream=True)).carry()
        receipts = [text for answer in carrier.answers for text in answer.strings("receipt")]
        assert len(receipts) == 1
        for chunk in carrier.carried:
            again = attribute(server, chunk)
            assert (again.error, again.responses) == (PASSED_ON, [])
        # The receipt's salts, which open its commitments, were given out that once.
        assert json.loads(receipts[0])["salts"]


def test_many_intruders_at_once(server: LiveServer) -> None:
    """None of them hangs, none gets a token, and none is in anybody's way."""
    with undisturbed(server):
        streams: list[tuple[Stream, str]] = []
        for number in range(8):
            ticket = resolve(server, label=str(number))
            for sealed, words in ((ticket, ONLY_THROUGH), (ticket[:-1], NOT_MADE_HERE.format("ticket"))):
                inputs = {"ticket": sealed, "text_input": TEXT}
                streams.append((Stream(server).start(inputs, model="generation"), words))
            inputs = {"chunk": ticket}
            streams.append((Stream(server).start(inputs, model="attribution"), NOT_MADE_HERE.format("usage")))
        for stream, words in streams:
            reply = stream.wait()
            assert reply.error == words
            assert all(opened(chunk)["kind"] == "hello" for chunk in chunks(reply))


# --- the server's own doors -----------------------------------------------------------------------------------------

EVIL_MODEL = {"parameters": {"config": '{"backend":"python"}', "file:1/model.py": "aW1wb3J0IG9z"}}
CLOSED_HTTP: list[tuple[str, str, Any]] = [
    ("POST", "/v2/repository/index", {}),
    ("POST", "/v2/repository/models/openlora/load", {}),
    ("POST", "/v2/repository/models/generation/load", EVIL_MODEL),
    ("POST", "/v2/repository/models/evil/load", EVIL_MODEL),
    ("POST", "/v2/repository/models/attribution/unload", {}),
    ("GET", "/v2/systemsharedmemory/status", None),
    ("POST", "/v2/systemsharedmemory/region/x/register", {"key": "/x", "byte_size": 64}),
    ("POST", "/v2/systemsharedmemory/unregister", {}),
    ("GET", "/v2/cudasharedmemory/status", None),
    (
        "POST",
        "/v2/cudasharedmemory/region/x/register",
        {"raw_handle": {"b64": "AAAA"}, "device_id": 0, "byte_size": 64},
    ),
    ("POST", "/v2/cudasharedmemory/unregister", {}),
    ("GET", "/v2/models/openlora/config", None),
    ("GET", "/v2/models/generation/versions/1/config", None),
    ("GET", "/v2/trace/setting", None),
    ("POST", "/v2/trace/setting", {"trace_level": ["TIMESTAMPS"], "trace_file": "/x"}),
    ("POST", "/v2/models/openlora/trace/setting", {"trace_level": ["TENSORS"]}),
    ("GET", "/v2/logging", None),
    ("POST", "/v2/logging", {"log_file": "/x", "log_verbose_level": 9}),
]


@pytest.mark.parametrize(
    ("method", "path", "body"), CLOSED_HTTP, ids=lambda part: part if isinstance(part, str) else ""
)
def test_closed_over_http(server: LiveServer, method: str, path: str, body: Any) -> None:
    for headers in ({}, {"openlora-admin": ""}, {"openlora-admin": "true"}):
        answer = httpx.request(method, server.http_url + path, json=body, headers=headers, timeout=20)
        assert (answer.status_code, answer.json()) == (
            403,
            {"error": "This API is restricted, expecting header 'openlora-admin'"},
        )


CLOSED_GRPC: dict[str, Callable[[grpcclient.InferenceServerClient], Any]] = {
    "index": lambda client: client.get_model_repository_index(),
    "load": lambda client: client.load_model("openlora"),
    "load with a file": lambda client: client.load_model("evil", config="{}", files={"file:1/model.py": b"import os"}),
    "unload": lambda client: client.unload_model("generation"),
    "system status": lambda client: client.get_system_shared_memory_status(),
    "system register": lambda client: client.register_system_shared_memory("x", "/x", 64),
    "system unregister": lambda client: client.unregister_system_shared_memory(),
    "cuda status": lambda client: client.get_cuda_shared_memory_status(),
    "cuda register": lambda client: client.register_cuda_shared_memory("x", b"AAAA", 0, 64),
    "cuda unregister": lambda client: client.unregister_cuda_shared_memory(),
    "trace": lambda client: client.get_trace_settings(),
    "trace of a model": lambda client: client.update_trace_settings("openlora", {"trace_level": ["TIMESTAMPS"]}),
    "logging": lambda client: client.get_log_settings(),
    "verbose logging": lambda client: client.update_log_settings({"log_verbose_level": 9}),
}


@pytest.mark.parametrize("name", CLOSED_GRPC)
def test_closed_over_grpc(server: LiveServer, name: str) -> None:
    with grpcclient.InferenceServerClient(server.grpc_url) as client, pytest.raises(InferenceServerException) as caught:
        CLOSED_GRPC[name](client)
    assert caught.value.status() == "StatusCode.UNAVAILABLE"
    assert caught.value.message().startswith("This protocol is restricted, expecting header ")


def test_shared_memory_in_place_of_tensors_is_refused(server: LiveServer) -> None:
    """No region can be registered, so naming one in a request reads nothing."""
    tensor = grpcclient.InferInput("text_input", [1], "BYTES")
    tensor.set_shared_memory("openlora_region", 64)
    errors: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with grpcclient.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: errors.put(error), stream_timeout=20)
        client.async_stream_infer("openlora", [tensor])
        client.stop_stream()
    assert "Unable to find shared memory region: 'openlora_region'" in str(errors.get_nowait())


def test_the_model_config_that_grpc_gives_holds_nothing_of_this_run(server: LiveServer) -> None:
    """perf_analyzer needs it, so it stays open there: it is the committed text, without parameters."""
    with grpcclient.InferenceServerClient(server.grpc_url) as client:
        for model in ("openlora", "adapter_resolver", "generation", "attribution"):
            config = client.get_model_config(model, as_json=True)["config"]
            assert not config.get("parameters")
            assert str(server.state_dir) not in json.dumps(config)


def test_secrets_are_in_one_file_that_only_the_owner_reads(server: LiveServer) -> None:
    run = server.state_dir / "run"
    key = (run / "run.key").read_bytes()
    assert stat.S_IMODE(run.stat().st_mode) == 0o700
    assert stat.S_IMODE((run / "run.key").stat().st_mode) == 0o600
    launcher = psutil.Process(server.launcher_pid)
    family = [launcher, *launcher.children(recursive=True)]
    assert len(family) >= 6  # launcher, tritonserver, three stubs, engine
    for process in family:
        seen = json.dumps([process.cmdline(), process.environ()])
        assert key.hex() not in seen
        assert key.decode("latin-1") not in seen
    for file in (run / "run.json", run / "engine.json"):
        assert key.hex() not in file.read_text()


def test_only_this_machine_is_listened_to_and_models_cannot_be_changed(server: LiveServer) -> None:
    launcher = psutil.Process(server.launcher_pid)
    family = [launcher, *launcher.children(recursive=True)]
    listening = {
        (connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port)
        for process in family
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {("127.0.0.1", port) for port in server.ports.values()}
    (triton,) = [process for process in family if process.name() == "tritonserver"]
    assert "--model-control-mode=none" in triton.cmdline()
