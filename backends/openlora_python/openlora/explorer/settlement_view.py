"""What the page shows of settlement, from the newest snapshot of the chain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import InvalidArgument
from .accounts import Accounts, Range
from .chain_summary import ChainSummary, Epoch

SHOWN_EPOCHS = 200


@dataclass(frozen=True)
class Snapshot:
    """What was known of the chain at a time."""

    state: Literal["none", "loading", "ready", "error"]
    message: str = ""  # of an error
    chain_id: int | None = None
    distributor: str | None = None
    head: int | None = None  # the newest final block
    summary: ChainSummary = field(default_factory=ChainSummary)
    accounts: Accounts | None = None
    note: str = ""  # on the accounts, or on why there are none


NO_CHAIN = Snapshot("none")


class SettlementView:
    """One deployment, or none. Thread-safe: a snapshot is replaced whole."""

    def __init__(self, snapshot: Snapshot = NO_CHAIN) -> None:
        self.snapshot = snapshot

    def overview(self, log_id: str | None) -> dict[str, Any]:
        """The state of the chain's view, and what it says of a log."""
        seen = self.snapshot
        deposited, settled = (amounts.get(log_id or "", 0) for amounts in (seen.summary.deposits, seen.summary.settled))
        return {
            **_state(seen),
            "anchor": seen.summary.anchors.get(log_id or ""),
            "deposited": str(deposited),
            "settled": str(settled),
        }

    def earners(self, wanted: str, after: int, limit: int) -> dict[str, Any]:
        """Up to `limit` accounts from place `after` on, by what they earned, whose address has `wanted` in it."""
        seen = self.snapshot
        known = {*(seen.accounts.earned if seen.accounts else ()), *seen.summary.claimed}
        rows = [_earner(seen, account) for account in known if wanted.lower() in account.lower()]
        rows.sort(key=lambda row: (-int(row["cumulative"] or row["claimed"]), row["account"]))
        more = after + limit if after + limit < len(rows) else None
        agrees = seen.accounts.agrees if seen.accounts else None
        page = {"earners": rows[after : after + limit], "count": len(rows), "after": more}
        return {**_state(seen), **page, "agrees": agrees}

    def earner(self, account: str) -> dict[str, Any]:
        """One account with the proof that a claim needs. InvalidArgument: it has earned nothing that is known here."""
        seen = self.snapshot
        if seen.accounts is None or account not in seen.accounts.earned:
            raise InvalidArgument(f"{account:.60} has earned nothing that is known here", field="account")
        proof = seen.accounts.tree.proof(bytes.fromhex(account[2:]))
        way = {"root": seen.accounts.root.hex(), "proof": [one.hex() for one in proof]}
        return {**_state(seen), **_earner(seen, account), **way}

    def epochs(self) -> dict[str, Any]:
        """The newest epochs, newest first."""
        seen = self.snapshot
        voids = seen.accounts.voids if seen.accounts else {}
        shown = [_epoch(one, voids) for one in seen.summary.epochs[: -SHOWN_EPOCHS - 1 : -1]]
        return {**_state(seen), "epochs": shown, "count": len(seen.summary.epochs)}


def _state(seen: Snapshot) -> dict[str, Any]:
    return {
        "state": seen.state,
        "message": seen.message,
        "chain_id": seen.chain_id,
        "distributor": seen.distributor,
        "head": seen.head,
        "note": seen.note,
    }


def _earner(seen: Snapshot, account: str) -> dict[str, str | None]:
    claimed = seen.summary.claimed.get(account, 0)
    earned = seen.accounts.earned.get(account, 0) if seen.accounts else None
    return {
        "account": account,
        "cumulative": None if earned is None else str(earned),
        "claimed": str(claimed),
        "pending": None if earned is None else str(earned - claimed),
    }


def _epoch(epoch: Epoch, voids: Mapping[Range, Mapping[str, int]]) -> dict[str, Any]:
    allocations = [part | {"voids": voids.get((part["log"], part["from"], part["to"]))} for part in epoch.allocations]
    return vars(epoch) | {"total": str(epoch.total), "allocations": allocations}
