"""The anchor worker as it runs for hours: real time, real patience, and something going wrong every few seconds."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from anchor_cases import check_history, register_log, serve_requests
from anvil_chain import OTHER, SUBMITTER, Anvil, FaultyRpc, anvil, deploy_contracts
from test_anchor_process import Running

from openlora.attribution.log import ReceiptLog
from openlora.network.anchor.fees import GWEI
from openlora.network.signer import write_key

SECONDS = 600
BLOCK_SECONDS = 1
FAULTS = ("hold", "drop", "reorg", "rollback", "fees", "500", "hang", "garbage", "kill", "foreign")


@pytest.fixture
def chain() -> Iterator[Anvil]:
    with anvil("--block-time", str(BLOCK_SECONDS)) as one:
        yield one


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 900)
def test_anchoring_goes_on_whatever_happens(chain: Anvil, tmp_path: Path) -> None:
    faulty = FaultyRpc(chain.url)
    state = tmp_path / "state"
    ReceiptLog.open(state).close()
    deployment = deploy_contracts(chain, tmp_path / "direct.json", confirmations=2)
    deployment.model_copy(update={"rpc_url": faulty.url}).save(tmp_path / "deployment.json")
    register_log(chain, deployment, state)
    write_key(tmp_path / "keys" / "submitter.key", SUBMITTER)
    choose, served, begun = random.Random(1), 0, time.monotonic()
    worker = Running(state, "--every", "0")
    while time.monotonic() - begun < SECONDS:
        serve_requests(state, served, 3)
        served += 3
        fault = choose.choice(FAULTS)
        if fault == "hold":
            chain.rpc("evm_setIntervalMining", 0)
        elif fault == "drop":
            chain.rpc("anvil_dropAllTransactions")
        elif fault in ("reorg", "rollback") and chain.web3.eth.block_number > deployment.start_block + 20:
            chain.rpc(*(("anvil_reorg", 3, []) if fault == "reorg" else ("anvil_rollback", 1)))
        elif fault == "fees":
            chain.rpc("anvil_setNextBlockBaseFeePerGas", hex(choose.choice((3, 30, 300)) * GWEI))
        elif fault == "kill":
            worker.process.kill()
            worker.process.wait()
            worker = Running(state, "--every", "0")
        elif fault == "foreign":
            chain.rpc(
                "eth_sendTransaction", {"from": SUBMITTER.address, "to": OTHER.address, "value": "0x1", "gas": "0x5208"}
            )
        else:
            faulty.mode = fault
        time.sleep(choose.uniform(0.5, 8))  # how long the fault lasts
        faulty.mode = "pass"
        chain.rpc("evm_setIntervalMining", BLOCK_SECONDS)
        print(f"{time.monotonic() - begun:.0f} s, {fault}: {served} receipts")
    chain.rpc("anvil_setNextBlockBaseFeePerGas", hex(GWEI))
    worker.wait_for(lambda report: report["final_size"] == served)
    assert worker.stop() == 0
    print(f"anchored at {len(check_history(chain, deployment, state, served))} sizes")
    faulty.close()
