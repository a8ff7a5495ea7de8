"""The anchor worker as a process: killed anywhere it goes on where it was; one at a time; it follows a lost devnet."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from anchor_cases import EAGER, check_history, register_log, serve_requests
from anvil_chain import ADMIN, OTHER, SUBMITTER, Anvil, anvil, deploy_contracts
from attribution_cases import python_environment

from openlora.attribution.log import ReceiptLog
from openlora.attribution.rotation import begin_rotation
from openlora.network.anchor.chain import AnchorChain, Sent
from openlora.network.anchor.local_log import LocalLog
from openlora.network.anchor.outbox import Outbox
from openlora.network.anchor.service import AnchorJob, outbox_path, run
from openlora.network.anchor.worker import AnchorWorker
from openlora.network.deployment import Deployment
from openlora.network.signer import write_key

PROCESSES = multiprocessing.get_context("forkserver")
# what takes seconds to import; the fork server finds installed packages only
PROCESSES.set_forkserver_preload(["pytest", "openlora.network.anchor.service", "openlora.network.deploy"])


@pytest.fixture
def chain() -> Iterator[Anvil]:
    with anvil() as one:
        yield one


@pytest.fixture
def state(chain: Anvil, tmp_path: Path) -> Path:
    """A registered log; the deployment file and the key lie beside it."""
    deployment = deploy_contracts(chain, tmp_path / "deployment.json")
    state = tmp_path / "state"
    ReceiptLog.open(state).close()
    register_log(chain, deployment, state)
    write_key(tmp_path / "keys" / "submitter.key", SUBMITTER)
    write_key(tmp_path / "keys" / "other.key", OTHER)
    return state


def command(state: Path, *options: str, key: str = "submitter") -> list[str]:
    root = state.parent
    files = ["--deployment", str(root / "deployment.json"), "--key", str(root / "keys" / f"{key}.key")]
    return [sys.executable, "-m", "openlora.cli", "settle", "anchor", "--state-dir", str(state), *files, *options]


def settle_anchor(state: Path, *options: str, key: str = "submitter") -> subprocess.CompletedProcess[str]:
    line = command(state, *options, key=key)
    return subprocess.run(line, env=python_environment(COLUMNS="200"), capture_output=True, text=True, timeout=120)


class Running:
    """`openlora settle anchor --json` and its reports."""

    def __init__(self, state: Path, *options: str) -> None:
        self.process = subprocess.Popen(
            command(state, "--json", *options), env=python_environment(), stdout=subprocess.PIPE, text=True
        )

    def wait_for(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Read on to a report that fits; the test's timeout is the limit."""
        for line in self.process.stdout:
            if wanted(report := json.loads(line)):
                return report
        raise AssertionError(f"the worker ended with status {self.process.wait()}")

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        self.process.stdout.read()
        return self.process.wait(30)


def test_once_and_status(chain: Anvil, state: Path) -> None:
    deployment = Deployment.load(state.parent / "deployment.json")
    serve_requests(state, 0, 5)
    done = settle_anchor(state, "--once", "--json")
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["phase"], last["final_size"]) == ("idle", 5)
    assert settle_anchor(state, "--once").returncode == 0  # nothing to do
    check_history(chain, deployment, state, 5)
    shown = json.loads(settle_anchor(state, "--status", "--json").stdout)
    assert (shown["log_size"], shown["head_size"], shown["final_size"], shown["verdict"]) == (5, 5, 5, "consistent")
    assert [(one["from"], one["to"], one["state"]) for one in shown["transactions"]] == [(0, 5, "final")]
    assert "consistent" in settle_anchor(state, "--status").stdout
    chain.stop()
    shown = json.loads(settle_anchor(state, "--status", "--json").stdout)
    assert "no chain answers" in shown["chain"] and shown["log_size"] == 5
    assert settle_anchor(state, "--once").returncode == 7


def test_errors_are_one_line_and_a_status(state: Path) -> None:
    serve_requests(state, 0, 2)
    for options, key, status, words in (
        (["--once"], "other", 7, "the log's submitter on the chain is"),
        (["--once"], "missing", 1, "missing.key can't be read"),
        (["--once", "--deployment", str(state / "nothing.json")], "submitter", 2, "can't read the deployment file"),
        (["--once", "--state-dir", str(state / "nowhere")], "submitter", 2, "no receipt log at"),
    ):
        done = settle_anchor(state, *options, key=key)
        assert (done.returncode, len(done.stderr.splitlines())) == (status, 1), done.stderr
        assert words in done.stderr
    file = state.parent / "deployment.json"
    Deployment.load(file).model_copy(update={"chain_id": 5}).save(file)
    assert settle_anchor(state, "--once").returncode == 2  # a key that everybody has, on a chain that is no devnet


def test_one_worker_per_log_and_key(state: Path) -> None:
    first = Running(state)
    first.wait_for(lambda report: report["phase"] == "idle")
    second = settle_anchor(state)
    assert second.returncode == 7 and "anchors this log with the key of" in second.stderr
    assert first.stop() == 0


def test_a_worker_follows_the_log_and_a_devnet_that_lost_its_state(chain: Anvil, state: Path) -> None:
    worker = Running(state, "--every", "0")
    serve_requests(state, 0, 3)
    worker.wait_for(lambda report: report["final_size"] == 3)
    serve_requests(state, 3, 3)
    worker.wait_for(lambda report: report["final_size"] == 6)
    chain.stop()
    worker.wait_for(lambda report: report["phase"] == "unreachable" and "no chain answers" in report["message"])
    with anvil(port=chain.port) as again:
        worker.wait_for(lambda report: "waiting until the devnet is deployed anew" in report["message"])
        again.rpc("eth_sendTransaction", {"from": ADMIN.address, "to": OTHER.address, "value": "0x1"})
        deployment = deploy_contracts(again, state.parent / "deployment.json")
        worker.wait_for(lambda report: report["phase"] == "blocked")
        register_log(again, deployment, state)
        worker.wait_for(lambda report: report["final_size"] == 6)
        assert worker.stop() == 0
        check_history(again, deployment, state, 6)


def test_a_closed_log_gets_its_last_anchor(chain: Anvil, state: Path) -> None:
    deployment = Deployment.load(state.parent / "deployment.json")
    serve_requests(state, 0, 3)
    worker = Running(state, "--every", "0")
    worker.wait_for(lambda report: report["final_size"] == 3)
    chain.hold()
    serve_requests(state, 3, 2)
    worker.wait_for(lambda report: report["phase"] == "sent")
    old = LocalLog(state).key
    begin_rotation(state)
    ReceiptLog.open(state).close()
    serve_requests(state, 5, 1)  # the log that follows signs before the worker looks again
    chain.release()
    worker.wait_for(lambda report: report["final_size"] == 5)
    assert worker.process.wait(60) == 0
    check_history(chain, deployment, state / "closed" / old.log_id.hex()[:16], 5)


# --- kill -9


class DiesBeforeSending(AnchorChain):
    def send(self, raw: bytes) -> Sent:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class DiesAfterSending(AnchorChain):
    def send(self, raw: bytes) -> Sent:
        super().send(raw)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def _one_step(kind: type[AnchorChain], state: Path) -> None:
    log = LocalLog(state)
    rpc = kind(Deployment.load(state.parent / "deployment.json"), log.key.log_id)
    AnchorWorker(rpc, log, Outbox(outbox_path(state)), SUBMITTER, EAGER).step(time.time())


def _anchor(state: Path, once: bool, begun: Any = None) -> None:
    job = AnchorJob(state.parent / "deployment.json", state, state.parent / "keys" / "submitter.key", EAGER)
    if begun is not None:
        begun.send("begun")
    run(job, once=once, show=lambda report: None, stopping=threading.Event())


@pytest.mark.parametrize("kind", [DiesBeforeSending, DiesAfterSending])
def test_killed_between_keeping_sending_and_recording(kind: type[AnchorChain], chain: Anvil, state: Path) -> None:
    deployment = Deployment.load(state.parent / "deployment.json")
    serve_requests(state, 0, 5)
    child = PROCESSES.Process(target=_one_step, args=(kind, state))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    (row,) = Outbox(outbox_path(state)).newest(LocalLog(state).key.log_id, 10)
    assert row.times_sent == 0
    _anchor(state, once=True)
    check_history(chain, deployment, state, 5)
    assert [one.anchor.raw for one in Outbox(outbox_path(state)).newest(LocalLog(state).key.log_id, 10)] == [
        row.anchor.raw
    ]


def kill_at_random(chain: Anvil, state: Path, rounds: int, seed: int) -> None:
    """Workers that live for a moment each, over a log that grows and a chain that sometimes waits or turns back."""
    deployment = Deployment.load(state.parent / "deployment.json")
    choose = random.Random(seed)
    served = 0
    for _ in range(rounds):
        serve_requests(state, served, 3)
        served += 3
        fate = choose.choice(["mine", "mine", "hold", "reorg"])
        if fate == "hold":
            chain.hold()
        here, there = PROCESSES.Pipe()
        child = PROCESSES.Process(target=_anchor, args=(state, False, there))
        child.start()
        here.recv()
        child.join(choose.uniform(0.0, 0.4))  # no synchronisation: a random moment
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        if fate == "hold":
            chain.release()
        if fate == "reorg" and chain.web3.eth.get_transaction_count(SUBMITTER.address) > 0:
            chain.rpc("anvil_reorg", 1, [])
    _anchor(state, once=True)
    sizes = check_history(chain, deployment, state, served)
    assert len(sizes) > 1, "the workers died before they did anything: nothing was tried"


def test_killed_at_random_moments(chain: Anvil, state: Path) -> None:
    kill_at_random(chain, state, rounds=20, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(2, 7))
def test_killed_at_random_moments_soak(chain: Anvil, state: Path, seed: int) -> None:
    kill_at_random(chain, state, rounds=100, seed=seed)
