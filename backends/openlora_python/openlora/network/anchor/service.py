"""The anchor worker's process: one per log and key, stepping until it is told to stop or its work is done."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event

from ...errors import ChainMismatch, Unavailable
from ...processes.lock_file import locked
from ..deployment import Deployment
from ..signer import load_signer
from .chain import AnchorChain
from .local_log import LocalLog
from .outbox import Outbox
from .worker import AnchorPolicy, AnchorWorker, Phase, Report

POLL_SECONDS = 12.0  # a block of the slowest chain that one would use
DEVNET_POLL_SECONDS = 0.5
LONGEST_WAIT = 5  # polls, between tries at a chain that does not answer


@dataclass(frozen=True)
class AnchorJob:
    """Whose log, on which chain, by which key."""

    deployment_file: Path
    state_dir: Path
    key_file: Path
    policy: AnchorPolicy


def outbox_path(state_dir: Path) -> Path:
    return state_dir / "settle" / "outbox.sqlite"


def run(job: AnchorJob, *, once: bool, show: Callable[[Report], None], stopping: Event) -> None:
    """Anchor until `stopping` is set or a closed log is anchored whole; with `once`, until what is signed now is final.

    Raises:
        LogConflict, ChainMismatch: as `AnchorWorker.step` does; a lost devnet is waited for instead.
        InvalidArgument: there is no log, or the deployment file or the key is not right.
        Unavailable: another process anchors this log with this key; with `once`, also when nothing goes on by itself.
    """
    policy = replace(job.policy, every_seconds=0.0, min_receipts=1) if once else job.policy
    log = LocalLog(job.state_dir)
    deployment = Deployment.load(job.deployment_file)
    account = load_signer(job.key_file, deployment.chain_id, deployment.rpc_url)
    with (
        _only_one(job.state_dir, log.key.log_id, account.address),
        closing(Outbox(outbox_path(job.state_dir))) as outbox,
    ):
        worker = AnchorWorker(AnchorChain(deployment, log.key.log_id), log, outbox, account, policy)
        failures, wanted = 0, None
        while not stopping.is_set():
            try:
                report = worker.step(time.time())
            except ChainMismatch as error:
                newer = _redeployed(deployment, job.deployment_file, error)
                if newer != deployment:
                    deployment = newer
                    worker = AnchorWorker(AnchorChain(deployment, log.key.log_id), log, outbox, account, policy)
                    continue
                report = Report(Phase.UNREACHABLE, f"{error.message}; waiting until the devnet is deployed anew")
            show(report)
            if once:
                if report.phase in (Phase.UNREACHABLE, Phase.BLOCKED):
                    raise Unavailable(report.message)
                wanted = report.checkpoint_size if wanted is None else wanted
                if report.final_size >= wanted:
                    return
            if log.is_closed and report.phase is Phase.IDLE and report.final_size == report.checkpoint_size:
                return  # its successor is another log, to be registered first
            failures = failures + 1 if report.phase is Phase.UNREACHABLE else 0
            poll = DEVNET_POLL_SECONDS if deployment.is_local_devnet else POLL_SECONDS
            stopping.wait(poll * min(2**failures, LONGEST_WAIT))


def _redeployed(known: Deployment, file: Path, error: ChainMismatch) -> Deployment:
    """What the file says now, if a devnet of this machine lost its chain. Anywhere else the mismatch ends the work."""
    if not known.is_local_devnet:
        raise error
    newer = Deployment.load(file)
    if not newer.is_local_devnet:
        raise error
    return newer


def _only_one(state_dir: Path, log_id: bytes, address: str) -> AbstractContextManager[None]:
    directory = state_dir / "settle"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return locked(
        directory / f"anchor-{log_id.hex()[:16]}-{address}.lock",
        lambda pid: f"another process (pid {pid}) anchors this log with the key of {address} already",
    )
