"""Three nodes serve and settle: what everybody gets is the sum over the receipts, by the second implementation.

The tests are one story: the later ones go on where the earlier ones ended.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from chain import balance_of, deposit_of, terms_of
from raw_chain import read_chain
from second_settlement import (
    BILLION,
    Chain,
    Export,
    LogResult,
    address_bytes,
    cumulative_amounts,
    reward_root,
    settle_log,
    settled_sizes,
)
from settlement_cases import CaseLog, key_of, price_of, tree_root
from test_settlement_live import RealChain
from three_nodes import CLERKS_NEW_PRICE, ERROR, Node, ThreeNodes

from openlora.attribution.settlement.chain_state import Allocation
from openlora.errors import ContractRefused
from openlora.network.registration import registration_signature
from openlora.network.transactions import send


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreeNodes]:
    made = ThreeNodes(tmp_path_factory.mktemp("three"))
    try:
        yield made.start()
    finally:
        made.stop()


@dataclass(frozen=True)
class Books:
    """What the second implementation finds on the chain and in the exports."""

    chain: Chain
    results: list[LogResult]

    @property
    def sizes(self) -> dict[bytes, int]:
        return settled_sizes(self.chain)

    def ledger(self, below: dict[bytes, int], above: dict[bytes, int] | None = None) -> dict[bytes, int]:
        """10^9 times what each account earned by the receipts from `above` on and below `below`."""
        ledger: dict[bytes, int] = {}
        for result in self.results:
            for index in range((above or {}).get(result.log_id, 0), below.get(result.log_id, 0)):
                for account, share in result.shares[index].items():
                    ledger[account] = ledger.get(account, 0) + result.prices[index] * share
        return ledger


def books(network: ThreeNodes, exports: list[Path]) -> Books:
    chain = read_chain(network.devnet.web3, network.devnet.deployment_file)
    return Books(chain, [settle_log(chain, Export(export)) for export in exports])


def balances(network: ThreeNodes, accounts: set[bytes]) -> dict[bytes, int]:
    token = network.devnet.contracts.token
    return {account: balance_of(token, network.devnet.web3.to_checksum_address(account)) for account in accounts}


def check_epoch(network: ThreeNodes, found: Books, epoch: int) -> None:
    """The accepted root, the allocations, and the tokens that everybody has."""
    distributor = network.devnet.contracts.distributor
    amounts = cumulative_amounts(found.results, found.sizes)
    (accepted,) = found.chain.named("Accepted", epoch=epoch)
    assert reward_root(found.chain, amounts) == accepted.arguments["root"] == distributor.root()
    by_log = {result.log_id: result for result in found.results}
    settled = [one.arguments for one in found.chain.named("Settled") if one.block == accepted.block]
    assert [one["amount"] for one in settled] == [by_log[one["logId"]].paid(one["from"], one["to"]) for one in settled]
    total = sum(result.paid(0, found.sizes.get(result.log_id, 0)) for result in found.results)
    assert total == accepted.arguments["total"]
    # Nobody had tokens before, and everybody has what is theirs, rounded down once.
    assert balances(network, set(amounts)) == amounts
    ledger = found.ledger(found.sizes)
    assert sum(ledger.values()) == BILLION * total
    dust = sum(part % BILLION for part in ledger.values())
    assert distributor.totals().claimed == sum(amounts.values()) == (BILLION * total - dust) // BILLION
    for result in found.results:
        paid = result.paid(0, found.sizes.get(result.log_id, 0))
        deposits = found.chain.named("Deposited", logId=result.log_id)
        assert deposit_of(distributor, result.log_id) == sum(one.arguments["amount"] for one in deposits) - paid


class ForgedLog:
    """A log on the real chain whose operator invents receipts over other people's models.

    Its deposit is a unit short of the `price` of three of them.
    """

    def __init__(self, network: ThreeNodes) -> None:
        devnet = self.devnet = network.devnet
        documents = [terms_of(network.digests[name], network.cards[name]) for name in ("base", "poet", "clerk")]
        self.models = [json.loads(document) for document in documents]
        self.price = price_of({"base": self.models[0], "adapters": self.models[1:]}, 10, 20)
        amount = 3 * self.price - 1
        self.operator = network.give_account("forger", amount)
        parameters = devnet.contracts.registry.contract.functions.parameters().call()[1]
        self.log = CaseLog(RealChain(devnet, parameters), "forger", register=False)  # type: ignore[arg-type]
        self.anchored = (0, bytes(32))
        who, on = self.operator.address, devnet.contracts
        signature = registration_signature(devnet.deployment, key_of("forger signer"), self.log.key, who, who, who)
        self._send(on.log.register_log(self.log.key, who, who, signature))
        self._send(on.token.approve(on.distributor.address, amount))
        self._send(on.distributor.deposit(self.log.log_id, amount))

    def _send(self, call: Any) -> None:
        send(self.devnet.web3, self.operator, call)

    def invent(self, **tokens: int) -> None:
        """By default of 10 tokens and 20."""
        base, poet, clerk = self.models
        self.log.serve(base, (poet, 700_000), (clerk, -300_000), changes=tokens)

    def anchor(self) -> None:
        size, root = self.log.size, tree_root(self.log.rows)
        self._send(self.devnet.contracts.log.anchor(self.log.log_id, *self.anchored, size, root))
        self.anchored = (size, root)


def check_receipts(nodes: list[Node], found: Books) -> None:
    """Every receipt of a node is paid but those of errors, at the price that its client was told."""
    for node in nodes:
        (result,) = [one for one in found.results if one.log_id == node.log_id]
        assert result.good_size == len(node.statuses)
        assert result.reasons == ["status" if status == ERROR else None for status in node.statuses]
        assert {seq: result.prices[seq] for seq in node.prices} == node.prices
        assert all(price > 0 for price, status in zip(result.prices, node.statuses, strict=True) if status != ERROR)
        assert all(address_bytes(node.payee) in shares for shares in result.shares if shares)


def test_every_claim_is_the_sum_over_the_receipts(network: ThreeNodes) -> None:
    north, south, west = network.nodes
    poet, clerk = network.named("poet"), network.named("clerk")
    for node in network.nodes:
        node.ask()
        node.ask(poet)
        node.ask([(poet, 0.7), (clerk, -0.35)], tokens=9)  # thirds: shares that have to be rounded
    north.leave(clerk)
    north.fail()
    north.ask(clerk)
    south.fail()
    south.ask([(clerk, -1.5), (poet, 0)])
    south.leave([(clerk, 0.25), (poet, -0.45)])
    west.leave()
    west.ask(clerk, tokens=17)
    west.fail()
    exports = network.anchor_and_export()
    proposal = network.settle_epoch(exports)
    assert [one["from"] for one in proposal["allocations"]] == [0, 0, 0]
    found = books(network, exports)
    check_receipts(network.nodes, found)
    check_epoch(network, found, epoch=1)


def test_a_second_epoch_adds_exactly_the_new_receipts(network: ThreeNodes) -> None:
    """One node has nothing new; another one's receipts are of terms and parameters that changed in between."""
    north, south, _ = network.nodes
    exports = [network.root / "exports" / node.name for node in network.nodes]
    before = books(network, exports)
    old_sizes = before.sizes
    poet, clerk = network.named("poet"), network.named("clerk")
    north.ask(poet)
    north.leave([(poet, -0.5), (clerk, 0.5)])
    north.fail()
    network.change_terms()
    south.wait_for_chain()
    changed = south.ask([(poet, 1), (clerk, -2)])["blobs"]["terms"]
    assert changed["adapters"][1]["output"] == str(CLERKS_NEW_PRICE)
    assert changed["parameters"] == network.devnet.contracts.registry.contract.functions.parameters().call()[1].hex()
    exports = network.anchor_and_export()
    proposal = network.settle_epoch(exports)
    assert {one["log_id"] for one in proposal["allocations"]} == {"0x" + node.log_id.hex() for node in (north, south)}
    found = books(network, exports)
    check_receipts(network.nodes, found)
    check_epoch(network, found, epoch=2)
    old, new = before.ledger(old_sizes), found.ledger(found.sizes, above=old_sizes)
    gained = {who: (old.get(who, 0) + part) // BILLION - old.get(who, 0) // BILLION for who, part in new.items()}
    claims = [one for one in found.chain.named("Claimed") if one.block > before.chain.named("Claimed")[-1].block]
    claimed = {address_bytes(one.arguments["account"]): one.arguments["amount"] for one in claims}
    assert claimed == {account: amount for account, amount in gained.items() if amount}


def test_fabricated_receipts_spend_only_their_own_logs_deposit(network: ThreeNodes) -> None:
    """Nobody can tell them from real ones, so whoever invents them pays for them, and only as far as the money goes."""
    north, _, _ = network.nodes
    devnet = network.devnet
    distributor, token = devnet.contracts.distributor, devnet.contracts.token
    forged = ForgedLog(network)
    price = forged.price
    for _ in range(3):
        forged.invent()
    forged.invent(in_tokens=2**32 - 1, out_tokens=2**32 - 1)
    forged.anchor()
    north.ask(network.named("clerk"))
    deposits = {node.name: deposit_of(distributor, node.log_id) for node in network.nodes}
    exports = [*network.anchor_and_export(), forged.log.write(network.root / "exports" / "forger")]
    network.settle_epoch(exports)
    found = books(network, exports)
    result = found.results[-1]
    assert (result.reasons, result.prices[:3]) == ([None] * 4, [price] * 3)
    assert found.sizes[forged.log.log_id] == 2
    check_receipts(network.nodes, found)
    check_epoch(network, found, epoch=3)
    assert deposit_of(distributor, forged.log.log_id) == price - 1
    spent = {node.name: deposits[node.name] - deposit_of(distributor, node.log_id) for node in network.nodes}
    assert spent == {"north": north.prices[len(north.statuses) - 1], "south": 0, "west": 0}
    unclaimed = distributor.totals().total - distributor.totals().claimed
    left = sum(deposit_of(distributor, one.log_id) for one in found.results)
    assert balance_of(token, distributor.address) == left + unclaimed

    # What is left of them nobody pays for, not even if the publisher says so.
    logs = [word for export in exports for word in ("--export", str(export))]
    assert "nothing to settle" in network.refused("propose", "publisher", *logs)
    allocation = Allocation(forged.log.log_id, 2, 3, price)
    proposal = distributor.propose(bytes(32), distributor.totals().total + price, [allocation])
    with pytest.raises(ContractRefused, match="InsufficientDeposit"):
        devnet.send("publisher", proposal)
