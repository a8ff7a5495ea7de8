"""`openlora settle anchor`: the log's checkpoints onto the chain, in a process of its own."""

from __future__ import annotations

import json
import signal
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ...attribution.chain_check import ChainCheck
from ...errors import InvalidArgument, Unavailable
from ..arguments import DeploymentFile, deployment_file

_SHOWN = 20
_POLICY_EVERY, _POLICY_RECEIPTS = 600.0, 10_000

StateDir = Annotated[Path, typer.Option(help="The server's state directory.")]
Key = Annotated[Path | None, typer.Option(metavar="FILE", help="The submitter's key: 64 hex digits, mode 0600.")]
Every = Annotated[float, typer.Option(min=0, help="Seconds between anchors.")]
MinReceipts = Annotated[int, typer.Option(min=1, help="Anchor before that when so many new receipts are signed.")]
MaxFee = Annotated[float, typer.Option(min=0, help="The most to offer for a unit of gas, in gwei.")]
Once = Annotated[bool, typer.Option("--once", help="Anchor what is signed now, wait until that is final, and end.")]
Status = Annotated[bool, typer.Option("--status", help="Show what was sent and what is anchored; change nothing.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object per line.")]


def anchor(
    deployment: DeploymentFile = None,
    state_dir: StateDir = Path("var"),
    key: Key = None,
    every: Every = _POLICY_EVERY,
    min_receipts: MinReceipts = _POLICY_RECEIPTS,
    max_fee: MaxFee = 200.0,
    once: Once = False,
    status: Status = False,
    as_json: Json = False,
) -> None:
    """Anchor the receipt log's signed checkpoints on the chain, until SIGTERM or Ctrl-C.

    Exits 7 if --once can't get on, 9 at another chain than the deployment's, 12 at a log that is not what was anchored.
    """
    from .fees import GWEI, FeePolicy
    from .service import AnchorJob, run
    from .worker import AnchorPolicy

    if status:
        _print_status(deployment_file(deployment), state_dir, as_json)
        return
    if key is None:
        raise InvalidArgument("anchoring needs the submitter's key: --key FILE", field="key")
    stopping = Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stopping.set())
    policy = AnchorPolicy(every, min_receipts, fees=FeePolicy(cap=int(max_fee * GWEI)))
    job = AnchorJob(deployment_file(deployment), state_dir, key, policy)
    run(job, once=once, show=_Progress(as_json), stopping=stopping)


class _Progress:
    """Prints a report that says something new."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._last: Any = None
        self._console = Console(soft_wrap=True, highlight=False)

    def __call__(self, report: Any) -> None:
        if report == self._last:
            return
        self._last = report
        now = datetime.now(UTC)
        if self._as_json:
            print(json.dumps({"time": now.timestamp(), **asdict(report)}), flush=True)
            return
        sizes = f"{report.final_size} final, {report.head_size} anchored, {report.checkpoint_size} signed"
        self._console.print(f"{now:%H:%M:%S} {report.phase:<11} {report.message} ({sizes})", markup=False)


def _print_status(file: Path, state_dir: Path, as_json: bool) -> None:
    from ..deployment import Deployment
    from .chain import NOBODY, AnchorChain
    from .local_log import LocalLog
    from .outbox import Outbox
    from .service import outbox_path

    log = LocalLog(state_dir)
    log.refresh()
    rows = []
    if outbox_path(state_dir).exists():
        with closing(Outbox(outbox_path(state_dir))) as outbox:
            rows = outbox.newest(log.key.log_id, _SHOWN)
    head: dict[str, Any] = {}
    try:
        view = AnchorChain(Deployment.load(file), log.key.log_id).look(NOBODY)
        head = {"block": view.block, "head_size": view.head.size, "final_size": view.final_head.size}
        head["submitter"] = view.head.submitter
    except Unavailable as error:
        head = {"chain": error.message}
    check = ChainCheck.load(state_dir)
    figures = {
        "log": log.key.log_id.hex(),
        "log_size": log.size,
        "checkpoint_size": log.checkpoint.size if log.checkpoint else 0,
        **head,
        "verdict": check.verdict if check else "never compared",
    }
    sent = [
        {
            "transaction": "0x" + row.anchor.hash.hex(),
            "nonce": row.anchor.nonce,
            "from": row.anchor.previous_size,
            "to": row.anchor.size,
            "max_fee": row.anchor.max_fee,
            "tip": row.anchor.tip,
            "created_at": row.anchor.created_at,
            "times_sent": row.times_sent,
            "state": row.state,
            "answer": row.answer,
        }
        for row in rows
    ]
    if as_json:
        print(json.dumps({**figures, "transactions": sent}))
        return
    table = Table(show_header=False)
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), str(value))
    console = Console()
    console.print(table)
    if sent:
        newest = Table("nonce", "from", "to", "fee (gwei)", "sent", "state", "the node said")
        for one in sent:
            fee = f"{one['max_fee'] / 10**9:g}"
            times = f"{one['times_sent']}×"
            newest.add_row(*map(str, (one["nonce"], one["from"], one["to"], fee, times, one["state"], one["answer"])))
        console.print(newest)
