"""The resolver and access: what a stranger is told, what a ticket is booked on, and how often one may ask."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from access_cases import adapter, fill_catalog, make_run
from hypothesis import given
from hypothesis import strategies as st
from live_server import key_digest

from openlora.config import UsageLimits
from openlora.errors import AdapterInvalid, AdapterNotFound, InvalidArgument, OpenLoRAError, QuotaExceeded, Unavailable
from openlora.serving.access.caller_store import CallerStore
from openlora.serving.resolve import ResolverStep
from openlora.serving.seal import Seal
from openlora.serving.ticket import Quota, Ticket, TicketOffice

PRIVATE = {"policy": "allow-list", "callers": ["alice"]}
TEXT = b"Hello."
# Two versions whose digests begin alike, one in quarantine, one closed by the operator, one that a chain would open.
TWIN_DIGESTS = ("abcdef12" + "0" * 56, "abcdef12" + "1" * 56)
CLOSED = ("secret", "broken", "byword", "gated1")
NOWHERE = "nosuch"  # as long as they are


class Node:
    def __init__(self, root: Path, **access: Any) -> None:
        callers = {name: key_digest(name) for name in ("alice", "bob")}
        private = {"byword": ["alice"]}
        self.run = make_run(root, callers=callers, private=private, **access)
        token = {"chain_id": 1, "contract": "0x" + "ab" * 20}
        fill_catalog(
            self.run,
            *(adapter("secret", PRIVATE, digest=digest) for digest in TWIN_DIGESTS),
            adapter("broken", PRIVATE, status="quarantined", reason="it holds NaN"),
            adapter("byword"),
            adapter("gated1", {"policy": "token-gated", "token": token}),
            adapter("public"),
            adapter("second"),
        )
        self.step = ResolverStep(self.run)
        self.office = TicketOffice(Seal(self.run.run_key_path, "ticket"))

    def ask(self, caller: str | None = None, **inputs: Any) -> Ticket:
        given = {"text_input": TEXT, **({} if caller is None else {"api_key": caller.encode()})}
        given |= {name: value.encode() if isinstance(value, str) else value for name, value in inputs.items()}
        return self.office.redeem(self.step.resolve(given, {}, "label"), TEXT)

    def answer(self, caller: str | None, **inputs: Any) -> tuple[type[BaseException], str] | str:
        """What a client can see of an answer."""
        try:
            return self.ask(caller, **inputs).kind
        except OpenLoRAError as error:
            return type(error), str(error)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    yield Node(tmp_path_factory.mktemp("node"))


WAYS = {
    "bare name": "{}",
    "version": '[{{"name":"{}","version":1}}]',
    "no such version": '[{{"name":"{}","version":77}}]',
    "digest": f'[{{{{"name":"{{}}","version":"{TWIN_DIGESTS[0]}"}}}}]',
    "ambiguous digest": '[{{"name":"{}","version":"abcdef12"}}]',
    "no version at all": '[{{"name":"{}","version":"???"}}]',
    "weight": '[{{"name":"{}","weight":0.5}}]',
    "ensemble, first": '["{}","public"]',
    "ensemble, last": '["public",{{"name":"{}","weight":-2}}]',
    "ensemble, with one that is not there": '["{}","absent"]',
    "object": '{{"adapters":["{}"],"method":"cat"}}',
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("caller", [None, "bob"])
def test_a_stranger_gets_what_a_name_that_does_not_exist_gets(
    node: Node, caller: str | None, name: str, way: str
) -> None:
    for more in ({}, {"max_tokens": 5}, {"sampling_parameters": '{"response_format":{"type":"nonsense"}}'}):
        answers = [node.answer(caller, adapters=WAYS[way].format(one), **more) for one in (name, NOWHERE)]
        kind, words = answers[1]
        assert kind in (AdapterNotFound, InvalidArgument)
        assert answers[0] == (kind, words.replace(NOWHERE, name))


@pytest.mark.parametrize("name", CLOSED)
def test_lora_name_tells_a_stranger_no_more(node: Node, name: str) -> None:
    answers = [node.answer("bob", sampling_parameters=json.dumps({"lora_name": one})) for one in (name, NOWHERE)]
    assert answers[1] == (AdapterNotFound, f"[ADAPTER_NOT_FOUND] no adapter '{NOWHERE}'")
    assert answers[0] == (AdapterNotFound, f"[ADAPTER_NOT_FOUND] no adapter '{name}'")


@given(
    version=st.one_of(st.none(), st.integers(-5, 10), st.text(max_size=9), st.sampled_from(["abcdef12", "ABCDEF12"])),
    weight=st.sampled_from([1, 0.25, -3, 0]),
    beside=st.lists(st.sampled_from(["public", "absent", "second", "broken"]), max_size=2),
)
def test_no_spec_tells_a_stranger_more(node: Node, version: Any, weight: float, beside: list[str]) -> None:
    answers = []
    for name in ("secret", NOWHERE):
        entry = {"name": name, "weight": weight, "version": version}
        answers.append(node.answer("bob", adapters=json.dumps([entry, *beside])))
    assert answers[0] == (answers[1][0], answers[1][1].replace(NOWHERE, "secret"))


def test_whoever_is_listed_is_answered(node: Node) -> None:
    for name in ("secret", "byword", '["secret","public"]', '[{"name":"secret","version":1}]'):
        assert node.ask("alice", adapters=name).kind == "generate"
    assert node.answer("alice", adapters="broken") == (
        AdapterInvalid,
        "[ADAPTER_INVALID] adapter 'broken': it holds NaN",
    )
    assert node.answer("alice", adapters='[{"name":"secret","version":"abcdef12"}]')[0] is InvalidArgument
    assert node.answer("alice", adapters="gated1")[0] is AdapterNotFound  # no chain view: nobody's


def test_a_ticket_names_its_accounts_and_quotas(tmp_path: Path) -> None:
    node = Node(tmp_path, adapters={"public": {"tokens_per_day": 9}}, default_limits={"tokens_per_day": 50})
    with CallerStore(node.run.callers_path) as store:
        store.set_limits("bob", UsageLimits(tokens_per_day=7))
    assert node.ask().quotas == (Quota("caller:anonymous", 50),)
    assert node.ask("bob", adapters='["public","second"]').quotas == (
        Quota("caller:bob", 7),
        Quota("adapter:public", 9),
        Quota("adapter:second", None),
    )


def test_request_rates(tmp_path: Path) -> None:
    node = Node(
        tmp_path,
        caller_limits={"bob": {"requests_per_minute": 3}},
        adapters={"public": {"requests_per_minute": 2}, "secret": {"requests_per_minute": 0}},
    )
    for _ in range(2):
        node.ask("alice", adapters="public")
    for _ in range(3):
        with pytest.raises(QuotaExceeded, match="adapter 'public': at most 2 requests a minute"):
            node.ask("alice", adapters='["second","public"]')
    assert node.ask("alice", adapters="second").kind == "generate"
    # A request that is refused counts as well; who may not use an adapter isn't told of its limits.
    for _ in range(3):
        assert node.answer("bob", adapters="secret")[0] is AdapterNotFound
    answers = {node.answer("bob", adapters=name)[0] for name in ("secret", NOWHERE, "public")}
    assert answers == {QuotaExceeded}
    assert node.ask("bob", stop=True).kind == "stop"  # stopping is always possible
    assert node.ask(None).kind == "generate"


def test_a_store_that_can_not_be_read_refuses_even_who_has_no_key(tmp_path: Path) -> None:
    node = Node(tmp_path)
    with CallerStore(node.run.callers_path) as store:
        _, api_key = store.add_key("carol")
    assert node.ask(api_key).caller == "carol"
    node.run.callers_path.unlink()
    for caller in (None, api_key, "alice"):
        with pytest.raises(Unavailable):
            node.ask(caller)
