"""The anchor worker with a chain that misbehaves: nothing is anchored twice, nothing is lost, nothing is given up.

The worker's clock is the test's; the same faults with real durations are in test_anchor_soak.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from anchor_cases import EAGER, AnchorCase, register_log
from anvil_chain import (
    ADMIN,
    ATTESTOR,
    OTHER,
    OWNER,
    PUBLISHER,
    SUBMITTER,
    Anvil,
    FaultyRpc,
    anvil,
    deploy_contracts,
)
from chain import settled_size_of

from openlora.attribution.log import ReceiptLog
from openlora.attribution.settlement.attestation import attest
from openlora.attribution.settlement.chain_state import Allocation, Proposal
from openlora.errors import ChainMismatch, ContractRefused
from openlora.network.anchor.fees import GWEI, FeePolicy
from openlora.network.anchor.outbox import DISPLACED, FINAL, OPEN, REVERTED
from openlora.network.anchor.worker import Phase
from openlora.network.contracts import contracts_of
from openlora.network.deployment import Deployment
from openlora.network.transactions import send


@pytest.fixture
def chain() -> Iterator[Anvil]:
    with anvil() as one:
        yield one


@pytest.fixture
def deployment(chain: Anvil, tmp_path: Path) -> Deployment:
    return deploy_contracts(chain, tmp_path / "deployment.json")


@pytest.fixture
def case(chain: Anvil, deployment: Deployment, tmp_path: Path) -> AnchorCase:
    state = tmp_path / "state"
    ReceiptLog.open(state).close()
    register_log(chain, deployment, state)
    return AnchorCase(chain, deployment, state)


def transfer(chain: Anvil, nonce: int, tip: int = GWEI) -> None:
    """The submitter's key used elsewhere."""
    fees = {"maxFeePerGas": 100 * GWEI + tip, "maxPriorityFeePerGas": tip}
    values = {"to": OTHER.address, "value": 1, "gas": 21_000, "nonce": nonce, "chainId": 31337, **fees}
    chain.web3.eth.send_raw_transaction(SUBMITTER.sign_transaction(values).raw_transaction)


def drop(case: AnchorCase) -> None:
    """The node forgets what it was sent last."""
    assert case.chain.rpc("anvil_dropTransaction", "0x" + case.rows()[-1].anchor.hash.hex()) is not None


# --- transactions that get into no block


def test_no_mining(case: AnchorCase) -> None:
    case.serve(5)
    case.chain.hold()
    assert case.step().phase is Phase.SENT
    assert case.step(10).phase is Phase.PENDING
    report = case.step(30)
    assert report.phase is Phase.RESENT and "known already" in report.message
    case.serve(3)  # serving doesn't wait
    # Where no blocks are made, more money helps nobody.
    assert {case.step(100).phase for _ in range(20)} == {Phase.RESENT}
    assert len(case.rows()) == 1
    case.chain.release()
    assert case.step().phase is Phase.SENT
    assert case.step().final_size == 8
    case.check_history(8)


def test_a_dropped_transaction_is_sent_again_byte_for_byte(case: AnchorCase) -> None:
    case.serve(5)
    case.chain.hold()
    case.step()
    drop(case)
    assert case.step(10).phase is Phase.PENDING
    report = case.step(30)
    assert report.phase is Phase.RESENT and "accepted" in report.message
    case.chain.release()
    assert case.step().final_size == 5
    (row,) = case.rows()
    assert (row.times_sent, row.state) == (2, FINAL)


def test_passed_over_by_blocks_it_is_replaced(case: AnchorCase) -> None:
    case.serve(5)
    case.chain.hold()
    case.step()
    drop(case)
    case.chain.mine(2)
    case.serve(2)
    assert case.step(60).phase is Phase.REPLACED
    first, second = (row.anchor for row in case.rows())
    assert first.nonce == second.nonce and (first.size, second.size) == (5, 7)
    assert 8 * second.max_fee >= 9 * first.max_fee and 8 * second.tip >= 9 * first.tip
    case.chain.release()
    assert case.step().final_size == 7
    case.check_history(7)
    assert [row.state for row in case.rows()] == [DISPLACED, FINAL]


def test_a_fee_spike_is_followed_up_to_the_cap(case: AnchorCase) -> None:
    case.policy = replace(EAGER, fees=FeePolicy(cap=50 * GWEI))
    case.restart()
    case.serve(5)
    case.chain.hold()
    case.step()
    base_fee = case.rows()[0].anchor.max_fee
    case.chain.rpc("anvil_setNextBlockBaseFeePerGas", hex(2 * base_fee))
    case.chain.mine()
    assert case.step().phase is Phase.REPLACED
    case.chain.rpc("anvil_setNextBlockBaseFeePerGas", hex(60 * GWEI))
    case.chain.mine()
    for _ in range(3):
        assert case.step(60).phase is Phase.RESENT  # over the cap nothing is offered
    assert len(case.rows()) == 2
    assert max(row.anchor.max_fee for row in case.rows()) <= 50 * GWEI
    case.chain.rpc("anvil_setNextBlockBaseFeePerGas", hex(GWEI))
    case.chain.release()
    case.step()
    assert case.step().final_size == 5
    case.check_history(5)


def test_a_key_without_money_blocks_until_it_has_some(case: AnchorCase) -> None:
    case.serve(5)
    case.chain.rpc("anvil_setBalance", SUBMITTER.address, "0x0")
    report = case.step()
    assert report.phase is Phase.BLOCKED and "too little money for gas" in report.message
    case.chain.rpc("anvil_setBalance", SUBMITTER.address, hex(10**18))
    case.step(60)
    assert case.step(60).final_size == 5
    case.check_history(5)


# --- re-orgs


def reorg(chain: Anvil, depth: int) -> None:
    chain.rpc("anvil_reorg", depth, [])


def rollback(chain: Anvil, depth: int) -> None:
    chain.rpc("anvil_rollback", depth)


REORGS = pytest.mark.parametrize("undo", [reorg, rollback])


@REORGS
def test_reorg_of_an_anchor(case: AnchorCase, undo: Callable[[Anvil, int], None]) -> None:
    case.serve(5)
    case.step()
    assert case.step().final_size == 5
    undo(case.chain, 1)
    assert case.head_size() == 0
    report = case.step()
    assert report.phase is Phase.RESENT
    assert case.step().final_size == 5
    assert len(case.rows()) == 1
    case.check_history(5)


@REORGS
def test_reorg_of_several_anchors_sends_each_again_in_order(
    case: AnchorCase, undo: Callable[[Anvil, int], None]
) -> None:
    for _ in range(4):
        case.serve(2)
        case.step()
    assert case.step().final_size == 8
    undo(case.chain, 3)
    assert case.head_size() == 2
    assert [case.step().phase for _ in range(4)] == [Phase.RESENT] * 3 + [Phase.IDLE]
    case.check_history(8)
    assert len(case.rows()) == 4 and {row.state for row in case.rows()} == {FINAL}


def test_reorg_by_snapshot_with_a_restart_between(case: AnchorCase) -> None:
    case.serve(2)
    case.step()
    snapshot = case.chain.rpc("evm_snapshot")
    case.serve(2)
    case.step()
    assert case.step().final_size == 4
    case.chain.rpc("evm_revert", snapshot)
    case.restart()
    case.serve(2)
    assert case.step().phase is Phase.RESENT
    assert case.step().phase is Phase.SENT
    case.step()
    case.check_history(6)


def test_reorg_that_takes_the_nonce_for_something_else(case: AnchorCase) -> None:
    case.serve(2)
    case.step()
    nonce = case.rows()[0].anchor.nonce
    rollback(case.chain, 1)
    transfer(case.chain, nonce)
    assert case.step().phase is Phase.SENT
    assert case.step().final_size == 2
    assert [(row.anchor.nonce, row.state) for row in case.rows()] == [(nonce, DISPLACED), (nonce + 1, FINAL)]
    case.check_history(2)


def test_nothing_is_final_before_its_confirmations(chain: Anvil, tmp_path: Path) -> None:
    deployment = deploy_contracts(chain, tmp_path / "confirmed.json", confirmations=3)
    ReceiptLog.open(tmp_path / "state").close()
    register_log(chain, deployment, tmp_path / "state")
    case = AnchorCase(chain, deployment, tmp_path / "state")
    case.serve(5)
    case.step()
    for _ in range(2):
        chain.mine()
        report = case.step()
        assert (report.head_size, report.final_size) == (5, 0)
        assert case.rows()[0].state == OPEN
    reorg(chain, 3)
    assert (report := case.step()).phase is Phase.RESENT and report.head_size == 0
    chain.mine(3)
    assert case.step().final_size == 5
    assert case.rows()[0].state == FINAL
    case.check_history(5)


def test_the_contract_is_younger_than_the_final_block(chain: Anvil, tmp_path: Path) -> None:
    deployment = deploy_contracts(chain, tmp_path / "confirmed.json", confirmations=50)
    ReceiptLog.open(tmp_path / "state").close()
    register_log(chain, deployment, tmp_path / "state")
    case = AnchorCase(chain, deployment, tmp_path / "state")
    case.serve(5)
    case.step()
    assert (report := case.step()).head_size == 5 and report.final_size == 0
    chain.mine(50)
    assert case.step().final_size == 5


@REORGS
def test_reorg_of_the_registration(case: AnchorCase, undo: Callable[[Anvil, int], None]) -> None:
    case.serve(5)
    case.step()
    undo(case.chain, 2)
    report = case.step()
    assert report.phase is Phase.BLOCKED and "submitter on the chain is nobody" in report.message
    register_log(case.chain, case.deployment, case.state)
    assert case.step(30).phase is Phase.RESENT
    assert case.step().final_size == 5
    case.check_history(5)


@REORGS
def test_reorg_of_an_accept(case: AnchorCase, undo: Callable[[Anvil, int], None]) -> None:
    """What was accepted is pending again, and the same call accepts it, once."""
    case.serve(5)
    case.step()
    web3, on = case.chain.web3, contracts_of(case.chain.web3, case.deployment)
    send(web3, ADMIN, on.token.mint(OWNER.address, 1_000))
    send(web3, OWNER, on.token.approve(on.distributor.address, 1_000))
    send(web3, OWNER, on.distributor.deposit(case.key.log_id, 1_000))
    allocation = Allocation(case.key.log_id, 0, 5, 600)
    proposal = Proposal(on.distributor.epoch() + 1, bytes(32), 600, (allocation,))
    values = (proposal.root, proposal.total, [Allocation(case.key.log_id, 0, 5, 600)])
    send(web3, PUBLISHER, on.distributor.propose(*values))
    case.chain.rpc("evm_increaseTime", 10)
    case.chain.mine()
    signed = attest(ATTESTOR, case.deployment.chain_id, on.distributor.address, proposal)
    accept = on.distributor.accept(proposal.epoch, *values, [signed.signature])
    send(web3, OTHER, accept)
    assert (on.distributor.totals().total, settled_size_of(on.distributor, case.key.log_id)) == (600, 5)
    undo(case.chain, 1)
    assert (on.distributor.totals().total, settled_size_of(on.distributor, case.key.log_id)) == (0, 0)
    case.chain.rpc("evm_increaseTime", 10)
    case.chain.mine()
    send(web3, OTHER, accept)
    assert (on.distributor.totals().total, settled_size_of(on.distributor, case.key.log_id)) == (600, 5)
    with pytest.raises(ContractRefused):
        send(web3, OTHER, accept)


# --- keys


def test_a_foreign_nonce(case: AnchorCase) -> None:
    case.serve(5)
    case.chain.hold()
    case.step()
    nonce = case.rows()[0].anchor.nonce
    drop(case)
    transfer(case.chain, nonce)
    case.chain.release()
    assert case.step().phase is Phase.SENT
    assert case.step().final_size == 5
    assert [(row.anchor.nonce, row.state) for row in case.rows()] == [(nonce, DISPLACED), (nonce + 1, FINAL)]
    case.check_history(5)


def test_a_foreign_transaction_waits_with_our_nonce(case: AnchorCase) -> None:
    nonce = case.chain.web3.eth.get_transaction_count(SUBMITTER.address)
    case.serve(5)
    case.chain.hold()
    transfer(case.chain, nonce, tip=2 * GWEI)
    phases = [case.step(60).phase for _ in range(10)]
    assert phases[0] is Phase.SENT and Phase.REPLACED in phases
    case.chain.release()
    case.step(60)
    assert case.step(60).final_size == 5
    case.check_history(5)


def test_two_keys_on_one_log(case: AnchorCase) -> None:
    """The owner changes the submitter while an anchor of the old one waits: the contract takes one of the two."""
    case.serve(5)
    case.chain.hold()
    case.step()
    contract = contracts_of(case.chain.web3, case.deployment).log
    values = {"from": OWNER.address, "gas": 100_000, "maxFeePerGas": 200 * GWEI, "maxPriorityFeePerGas": 100 * GWEI}
    call = contract.set_submitter(case.key.log_id, OTHER.address)
    nonce = case.chain.web3.eth.get_transaction_count(OWNER.address)
    signed = OWNER.sign_transaction(call.build_transaction({**values, "nonce": nonce, "chainId": 31337}))
    case.chain.web3.eth.send_raw_transaction(signed.raw_transaction)
    case.chain.release()
    second = AnchorCase(case.chain, case.deployment, case.state, OTHER)
    second.requests = case.requests
    second.serve(2)
    assert second.step().phase is Phase.SENT
    report = case.step()
    assert report.phase is Phase.BLOCKED and OTHER.address in report.message
    assert second.step().final_size == 7
    case.check_history(7)
    assert {row.anchor.size: row.state for row in case.rows()} == {5: REVERTED, 7: FINAL}


def test_the_submitter_comes_back(case: AnchorCase) -> None:
    contract = contracts_of(case.chain.web3, case.deployment).log
    for submitter, size in ((OTHER, 2), (SUBMITTER, 4), (OTHER, 6)):
        send(case.chain.web3, OWNER, contract.set_submitter(case.key.log_id, submitter.address))
        other = AnchorCase(case.chain, case.deployment, case.state, submitter)
        other.requests = case.requests
        other.serve(2)
        case.requests = other.requests
        other.step()
        assert other.step().final_size == size
    case.check_history(6)


def test_two_workers_with_one_key_on_two_copies(case: AnchorCase, tmp_path: Path) -> None:
    """The lock is per machine; where it can't hold, compare-and-set does."""
    case.serve(5)
    twin = AnchorCase(case.chain, case.deployment, shutil.copytree(case.state, tmp_path / "twin"))
    twin.now += 7
    case.chain.hold()
    first, second = case.step(), twin.step()
    assert {first.phase, second.phase} == {Phase.SENT}
    for _ in range(5):
        case.step(60)
        twin.step(60)
    case.chain.release()
    for _ in range(3):
        report = case.step(60)
        twin.step(60)
    assert report.final_size == 5
    case.check_history(5)


# --- the node between


@pytest.fixture
def faulty(case: AnchorCase) -> Iterator[FaultyRpc]:
    rpc = FaultyRpc(case.chain.url)
    case.deployment = case.deployment.model_copy(update={"rpc_url": rpc.url})
    case.restart()
    case.rpc.web3.provider._request_kwargs = {"timeout": 0.3}
    yield rpc
    rpc.close()


@pytest.mark.parametrize("mode", ["hang", "500", "garbage"])
def test_a_node_that_fails(case: AnchorCase, faulty: FaultyRpc, mode: str) -> None:
    case.serve(5)
    faulty.mode = mode
    assert [case.step().phase for _ in range(2)] == [Phase.UNREACHABLE] * 2
    case.serve(1)  # receipts keep coming
    faulty.mode = "pass"
    assert case.step().phase is Phase.SENT
    faulty.mode = mode
    assert case.step().phase is Phase.UNREACHABLE
    faulty.mode = "pass"
    assert case.step().final_size == 6
    case.check_history(6)


def test_nobody_listens(case: AnchorCase) -> None:
    case.serve(5)
    case.chain.stop()
    report = case.step()
    assert report.phase is Phase.UNREACHABLE and f"127.0.0.1:{case.chain.port}" in report.message
    case.serve(1)
    assert case.log.size == 0 or case.step().phase is Phase.UNREACHABLE


def test_the_answer_to_a_send_is_lost(case: AnchorCase, faulty: FaultyRpc) -> None:
    case.serve(5)
    faulty.lose_answer_to = "eth_sendRawTransaction"
    assert case.step().phase is Phase.UNREACHABLE
    (row,) = case.rows()
    assert row.times_sent == 0  # nobody told whether it arrived; it did
    faulty.lose_answer_to = None
    assert case.step().final_size == 5
    assert [row.state for row in case.rows()] == [FINAL]
    case.check_history(5)


def test_another_chain_behind_the_url(case: AnchorCase, faulty: FaultyRpc) -> None:
    case.serve(5)
    with anvil("--chain-id", "1") as stranger:
        faulty.upstream = stranger.url
        with pytest.raises(ChainMismatch, match="chain id is 1 on this chain, 31337"):
            case.step()
        assert stranger.web3.eth.block_number == 0
    assert case.rows() == []


def test_another_contract_at_the_address(case: AnchorCase) -> None:
    case.serve(5)
    case.chain.rpc("anvil_setCode", case.deployment.contracts.AttributionLog.address, "0x00")
    with pytest.raises(ChainMismatch, match="code hash of AttributionLog"):
        case.step()
    assert case.rows() == []


def test_lost_devnet(case: AnchorCase, tmp_path: Path) -> None:
    """The chain begins anew: the contracts are deployed again and the log is anchored again, whole."""
    case.serve(5)
    case.step()
    case.step()
    case.chain.stop()
    with anvil(port=case.chain.port) as again:
        with pytest.raises(ChainMismatch, match="genesis|code hash"):
            case.step()
        send_something = {"from": ADMIN.address, "to": OTHER.address, "value": "0x1"}
        again.rpc("eth_sendTransaction", send_something)  # other addresses than before
        case.chain, case.deployment = again, deploy_contracts(again, tmp_path / "deployment.json")
        register_log(again, case.deployment, case.state)
        case.restart()
        case.serve(2)
        assert case.step().phase is Phase.SENT
        assert case.step().final_size == 7
        case.check_history(7)
