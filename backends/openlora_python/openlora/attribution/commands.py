"""`openlora receipts …`: one place for its commands; list and show are here, the others beside it."""

from __future__ import annotations

import json
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..command_group import command_group
from .frames import STATUS_NAMES
from .log import LoggedReceipt, ReceiptLog
from .log_commands import export, forget, fsck, rotate
from .proof_commands import checkpoint, cosign, prove
from .receipt_lookup import find_receipt
from .verify_command import verify

receipts_app = command_group("Receipts: list, show, verify, prove and export them.")

StateDir = Annotated[Path, typer.Option(help="The server's state directory.")]
Json = Annotated[bool, typer.Option("--json", help="JSON, one receipt per line.")]

for _command in (verify, prove, checkpoint, cosign, export, fsck, forget, rotate):
    receipts_app.command()(_command)


@receipts_app.command("list")
def list_receipts(
    state_dir: StateDir = Path("var"),
    limit: Annotated[int, typer.Option(min=1, help="At most this many, the newest.")] = 20,
    as_json: Json = False,
) -> None:
    """The newest receipts, oldest first."""
    with closing(ReceiptLog.open(state_dir, read_only=True)) as log:
        logged = log.list(max(0, log.size() - limit), limit)
        if as_json:
            for one in logged:
                print(json.dumps(log.receipt_json(one.seq)))
            return
        table = Table("seq", "request", "status", "adapters", "in", "out", "price", "ended (UTC)")
        for one in logged:
            table.add_row(*_row(one, log.receipt_json(one.seq)["blobs"]["adapters"]["adapters"]))
        Console().print(table)


@receipts_app.command("show")
def show_receipt(
    which: Annotated[str, typer.Argument(metavar="SEQ|REQUEST_ID")],
    state_dir: StateDir = Path("var"),
    as_json: Json = False,
    salts: Annotated[bool, typer.Option("--salts", help="With the salts, which open the texts' commitments.")] = False,
) -> None:
    """One receipt with its blobs."""
    with closing(ReceiptLog.open(state_dir, read_only=True)) as log:
        document = log.receipt_json(find_receipt(log, which), with_salts=salts)
    if as_json:
        print(json.dumps(document))
        return
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # a digest that is cut short is of no use
    for name, value in document.items():
        if name in ("blobs", "salts"):
            for part, content in value.items():
                table.add_row(part, escape(content if name == "salts" else json.dumps(content, indent=1)))
        elif name != "leaf":
            table.add_row(name, escape(str(value)))
    Console().print(table)


def _row(logged: LoggedReceipt, adapters: list[dict[str, Any]]) -> list[str]:
    receipt = logged.receipt
    return [
        str(logged.seq),
        receipt.request_id.hex()[:12] + "…",
        STATUS_NAMES[receipt.status],
        " ".join(f"{one['digest'][:8]}×{one['weight'] / 1_000_000:g}" for one in adapters) or "base",
        str(receipt.in_tokens),
        str(receipt.out_tokens),
        str(receipt.price),
        datetime.fromtimestamp(receipt.ended_at, UTC).strftime("%Y-%m-%d %H:%M:%S"),
    ]
