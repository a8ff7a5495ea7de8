"""What the settle commands print: tables for people, one JSON object with --json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from eth_utils import to_checksum_address
from rich.console import Console
from rich.table import Table

from .attestation import proposal_document
from .books import Books
from .chain_state import ChainState
from .epoch import Epoch
from .judge import REASONS
from .ledger import Tally
from .session import ChainSession


def print_epoch(books: Books, epoch: Epoch, as_json: bool, transaction: str | None = None) -> None:
    """An epoch, whom it pays, and what all of the logs' receipts up to their last good anchor came to."""
    tree, amounts = books.reward_tree(epoch.stops)
    _, before = books.reward_tree()
    judged = Tally()
    for log in books.logs.values():
        judged.add(log.tally(max(log.good_size, log.log.settled_size)))
    notes = [*books.notes, *epoch.notes]
    earners = [
        {"account": to_checksum_address(who), "earns": str(amount - before.get(who, 0)), "cumulative": str(amount)}
        for who, amount in sorted(amounts.items(), key=lambda item: (-item[1], item[0]))
    ]
    voids = {
        reason: {"receipts": judged.void_receipts[reason], "price": str(judged.void_price[reason])}
        for reason in REASONS
        if judged.void_receipts[reason]
    }
    if as_json:
        document: dict[str, Any] = {
            "head": books.facts.head,
            "proposal": proposal_document(epoch.proposal) if epoch.proposal else None,
            "root": "0x" + tree.root.hex(),
            "paid_receipts": judged.paid_receipts,
            "void": voids,
            "earners": earners,
            "notes": notes,
        }
        print(json.dumps(document if transaction is None else document | {"transaction": transaction}))
        return
    console = Console(soft_wrap=True)
    if epoch.proposal is None:
        console.print("nothing is to be settled")
    else:
        what = "proposed" if transaction else "to propose"
        title = f"epoch {epoch.proposal.epoch}, {what}: total {epoch.proposal.total}"
        table = _table(title, "log", "receipts", "amount")
        for one in epoch.proposal.allocations:
            table.add_row(one.log_id.hex(), f"{one.start} to {one.stop}", str(one.amount))
        console.print(table)
        console.print(f"root 0x{tree.root.hex()}")
    earned = _table("earners", "account", "earns now", "in all")
    for one in earners:
        earned.add_row(one["account"], one["earns"], one["cumulative"])
    console.print(earned)
    reasons = _table(f"void receipts ({judged.paid_receipts} are paid)", "reason", "receipts", "price")
    for reason, one in voids.items():
        reasons.add_row(reason, str(one["receipts"]), one["price"])
    if voids:
        console.print(reasons)
    for note in notes:
        console.print(note, style="yellow", markup=False, highlight=False)


def print_status(session: ChainSession, state: ChainState, amounts: Mapping[bytes, int] | None, as_json: bool) -> None:
    """Logs, epochs and, where exports were given, earners."""
    distributor = session.contracts.distributor
    totals, pending = distributor.totals(), distributor.pending()
    logs = [
        {
            "log_id": log_id.hex(),
            "deposited": str(log.deposited),
            "available": str(log.available),
            "anchored": log.anchors[-1].size if log.anchors else 0,
            "settled": log.settled_size,
        }
        for log_id, log in sorted(state.logs.items())
    ]
    document: dict[str, Any] = {
        "head": session.facts.head,
        "epoch": state.epoch,
        "total": str(totals.total),
        "claimed": str(totals.claimed),
        "paused": totals.paused,
        "pending": proposal_document(state.pending) if state.pending else None,
        "valid_at": pending.valid_at or None,
        "logs": logs,
    }
    if amounts is not None:
        document["earners"] = {to_checksum_address(who): str(amount) for who, amount in sorted(amounts.items())}
    if as_json:
        print(json.dumps(document))
        return
    console = Console(soft_wrap=True)
    table = _table(f"logs, up to block {session.facts.head}", "log", "deposited", "available", "anchored", "settled")
    for one in logs:
        table.add_row(*(str(value) for value in one.values()))
    console.print(table)
    paused = ", paused" if totals.paused else ""
    console.print(f"epoch {state.epoch}; total {totals.total}, claimed {totals.claimed}{paused}")
    if pending.valid_at:
        ripe = datetime.fromtimestamp(pending.valid_at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        console.print(f"a proposal is pending; it can be accepted from {ripe} on")
    if amounts is not None:
        earned = _table("earners", "account", "in all", "claimed")
        for who, amount in sorted(amounts.items(), key=lambda item: (-item[1], item[0])):
            account = to_checksum_address(who)
            earned.add_row(account, str(amount), str(state.claimed.get(account, 0)))
        console.print(earned)


def print_claims(paid: Sequence[Mapping[str, str]], as_json: bool) -> None:
    """Who got how much."""
    if as_json:
        print(json.dumps({"claims": list(paid)}))
        return
    console = Console(soft_wrap=True)
    if not paid:
        console.print("there was nothing to claim")
        return
    table = _table("claimed", "account", "amount", "in all")
    for one in paid:
        table.add_row(one["account"], one["amount"], one["cumulative"])
    console.print(table)


def print_sent(words: str, result: Mapping[str, Any], as_json: bool) -> None:
    """What was done."""
    if as_json:
        print(json.dumps(result))
    else:
        Console(soft_wrap=True).print(words, highlight=False, markup=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
