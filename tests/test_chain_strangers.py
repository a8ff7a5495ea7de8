"""What strangers write on a chain stops nobody: texts that are not UTF-8, and documents nested as deep as they go."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from chain import Devnet
from chain_node import ChainNode
from eth_abi import encode
from eth_utils import keccak
from raw_chain import read_chain
from scripted_source import ScriptedSource
from second_settlement import in_force, read_parameters
from settlement_cases import PARAMETERS, ZERO32, canonical

from openlora.attribution.settlement.facts import ChainFacts
from openlora.attribution.settlement.registry import Registry
from openlora.errors import InvalidArgument, Unavailable
from openlora.network.chain_facts import read_facts
from openlora.network.deployment import Deployment
from openlora.network.event_decoder import EventDecoder
from openlora.network.registry_state import decoded, registry_view

NOT_UTF_8 = b"\xff{\xc3\xa9}\xed\xa0\x80"
MAX_DOCUMENT = 32_768
DEEP = b"[" * MAX_DOCUMENT
NUMBERS = count(1)

# Like every command of the chain's: with libraries that raise Python's recursion limit.
IN_A_CHILD = """
import sys
import eth_account
from openlora.attribution.settlement.facts import ChainFacts
from openlora.attribution.settlement.registry import Registry
from openlora.errors import InvalidArgument
from openlora.network.chain_card import chain_card
from openlora.network.registry_state import registry_view

facts = ChainFacts.from_json(sys.stdin.read())
head = facts.header(facts.head)
view = registry_view(facts.events, head)
assert view.parameters is None and Registry(facts).parameters(head) is None
refused = 0
for model in view.models:
    try:
        chain_card(model)
    except InvalidArgument as error:
        refused += "nested deeper than 32" in error.message
print(len(view.models), refused)
"""


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Devnet]:
    """Of this file's own: what is written on it stays for all who read it."""
    with Devnet(tmp_path_factory.mktemp("devnet")) as devnet:
        yield devnet


def call(chain: Devnet, role: str, signature: str, *values: Any) -> None:
    """Call the registry with these bytes as they are, where a string is wanted."""
    kinds = signature.partition("(")[2].rstrip(")").replace("string", "bytes").split(",")
    account, registry = chain.account(role), chain.deployment.contracts.AdapterRegistry.address
    data = keccak(text=signature)[:4] + encode(kinds, values)
    words = {"from": account.address, "to": registry, "data": data, "chainId": 31337, "gasPrice": 10**10}
    words |= {"nonce": chain.web3.eth.get_transaction_count(account.address), "gas": 25_000_000}
    sent = chain.web3.eth.send_raw_transaction(account.sign_transaction(words).raw_transaction)
    assert chain.web3.eth.wait_for_transaction_receipt(sent)["status"] == 1


def write(chain: Devnet, text: bytes, base: bytes = ZERO32, name: bytes = b"model", role: str = "owner-3") -> bytes:
    """A model all of whose documents are `text`, and parameters; its digest."""
    digest = next(NUMBERS).to_bytes(32, "big")
    call(chain, role, "register(bytes32,bytes32,string,string,string)", digest, base, name, b"https://x/y", text)
    call(chain, role, "publishTerms(bytes32,string)", digest, text)
    call(chain, role, "setAccess(bytes32,string)", digest, text)
    call(chain, "admin", "publishParameters(string)", text)
    chain.mine(60)
    return digest


def write_usual_parameters(chain: Devnet) -> None:
    chain.send("admin", chain.contracts.registry.publish_parameters(canonical(PARAMETERS)))
    chain.mine(60)


def test_text_that_is_not_utf_8_stops_nobody(chain: Devnet, tmp_path: Path) -> None:
    write(chain, NOT_UTF_8, name=b"\xff")
    cache = tmp_path / "facts.sqlite"
    facts = read_facts(chain.web3, chain.deployment, cache=cache)
    assert read_facts(chain.web3, chain.deployment, cache=cache) == facts  # from the file
    assert ChainFacts.from_json(facts.to_json()) == facts
    head = facts.headers[facts.head]
    published = list(facts.of("AdapterRegistry", "ParametersPublished"))[-1]
    assert published.args["document"].encode(errors="surrogateescape") == NOT_UTF_8
    assert Registry(facts).parameters(head) is None
    assert registry_view(facts.events, head).parameters is None
    second = read_chain(chain.web3, chain.deployment_file)
    assert [(one.name, one.arguments) for one in second.events] == [(one.name, one.args) for one in facts.events]
    assert read_parameters(in_force(second, "ParametersPublished", facts.head)["document"]) is None
    assert chain.ask("status", "--deployment", str(chain.deployment_file))["parameters"] is None
    command = [sys.executable, "-m", "openlora.cli", "settle", "status", "--json"]
    command += ["--deployment", str(chain.deployment_file), "--state-dir", str(tmp_path / "state")]
    assert json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["pending"] is None
    write_usual_parameters(chain)
    facts = read_facts(chain.web3, chain.deployment)
    assert Registry(facts).parameters(facts.headers[facts.head]) is not None


@pytest.mark.parametrize("text", [NOT_UTF_8, DEEP, b'{"mode":"\\ud800"}', b'{"\\udc80":1}'])
def test_a_followed_owner_can_write_what_he_likes(chain: Devnet, tmp_path: Path, text: bytes) -> None:
    """The one model is refused by name, and the others answer."""
    http = ScriptedSource()
    node = ChainNode(tmp_path, chain, http, seed=100 + next(NUMBERS))
    try:
        node.publish("poet")
        digest = write(chain, text, bytes.fromhex(node.base.digest), role="owner-1")
        right = node.publish("painter")
        access = "setAccess(bytes32,string)"
        call(chain, "owner-1", access, bytes.fromhex(right), text)
        synced = node.sync.once()
        assert node.names() == [f"{node.address()}/poet"]
        assert len([name for name in synced.refused if digest.hex()[:16] in name]) == 1
        assert len([name for name in synced.refused if right[:16] in name]) == 1
    finally:
        node.close()
        http.close()


def test_documents_as_deep_as_they_go_end_no_process(chain: Devnet) -> None:
    write(chain, DEEP)
    facts = read_facts(chain.web3, chain.deployment)
    head = facts.headers[facts.head]
    models = registry_view(facts.events, head).models
    deep = [one for one in models if DEEP.decode() in (one.terms.document, one.access)]
    done = subprocess.run([sys.executable, "-c", IN_A_CHILD], input=facts.to_json(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) == len(deep) > 0
    assert read_parameters(DEEP.decode()) is None
    assert chain.ask("status", "--deployment", str(chain.deployment_file))["parameters"] is None
    write_usual_parameters(chain)


@pytest.mark.parametrize("text", ["[" * 33 + "]" * 33, '{"a":' * 33 + "1" + "}" * 33, '["\\"]",' + "[" * 32 + "]" * 33])
def test_the_deepest_document(text: str) -> None:
    with pytest.raises(InvalidArgument, match="nested deeper than 32 levels"):
        decoded(text)


def test_brackets_in_strings_are_no_depth() -> None:
    assert decoded('["' + "[" * 100 + '\\"{"]') == ["[" * 100 + '"{']
    assert decoded("[" * 32 + "]" * 32)


@pytest.mark.parametrize("how", ["data cut off", "a topic short", "text without an end"])
def test_a_log_that_no_contract_wrote_is_an_answer_of_the_chains(chain: Devnet, how: str) -> None:
    deployment: Deployment = chain.deployment
    address = deployment.contracts.AdapterRegistry.address
    logs = chain.web3.eth.get_logs({"fromBlock": 0, "toBlock": "latest", "address": address})
    topic = keccak(text="TermsPublished(address,bytes32,uint32,bytes32,uint64,string)")
    changed = dict(next(log for log in logs if log["topics"][0] == topic))
    if how == "a topic short":
        changed["topics"] = changed["topics"][:-1]
    elif how == "data cut off":
        changed["data"] = changed["data"][:40]
    else:
        changed["data"] = changed["data"][:96] + b"\xff" * 32 + changed["data"][128:]
    with pytest.raises(Unavailable, match="which is no TermsPublished"):
        EventDecoder(deployment).event(changed)  # type: ignore[arg-type]
