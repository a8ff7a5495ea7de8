"""Reads the chain of a deployment on a thread of its own, so that the page never waits for it."""

from __future__ import annotations

import logging
import tempfile
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..attribution.log import ReceiptLog
from ..attribution.settlement.facts import BlockHeader, ChainFacts
from ..errors import InvalidArgument, OpenLoRAError
from ..network.chain_facts import header_of, read_facts
from ..network.deployment import Deployment
from .accounts import Accountant
from .chain_summary import ChainSummary, summarise
from .local_export import LocalExport
from .settlement_view import SettlementView, Snapshot

if TYPE_CHECKING:
    from web3 import Web3

REFRESH_SECONDS = 5.0

logger = logging.getLogger(__name__)


class SettlementReader:
    """Keeps a view up to date until it is closed. What it has read lies in a temporary directory."""

    def __init__(self, state_dir: Path, deployment: Deployment, view: SettlementView) -> None:
        self._state_dir = state_dir
        self._deployment = deployment
        self._view = view
        self._directory = tempfile.TemporaryDirectory(prefix="openlora-explorer-")
        self._accountant = Accountant(Path(self._directory.name) / "prefixes")
        self._seen: tuple[object, ...] = ()  # what the view's amounts go by
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="settlement", daemon=True)

    def __enter__(self) -> SettlementReader:
        distributor = self._deployment.contracts.RewardDistributor.address
        self._view.snapshot = Snapshot("loading", chain_id=self._deployment.chain_id, distributor=distributor)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join(timeout=REFRESH_SECONDS)
        if not self._thread.is_alive():  # else it is in the middle of a long computation, and ends with the process
            self._directory.cleanup()

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self._look()
            except OpenLoRAError as error:
                self._view.snapshot = replace(self._view.snapshot, state="error", message=error.message)
            except Exception as error:  # the page goes on, and says so
                logger.exception("settlement")
                self._view.snapshot = replace(self._view.snapshot, state="error", message=type(error).__name__)
            self._closed.wait(REFRESH_SECONDS)

    def _look(self) -> None:
        web3 = self._deployment.connect()
        facts = read_facts(web3, self._deployment, cache=Path(self._directory.name) / "facts.sqlite")
        before = self._view.snapshot
        # Receipts that came since are not anchored: they change nothing before the next event.
        seen = (len(facts.events), facts.events[-1:], (self._state_dir / "log" / "receipts.sqlite").exists())
        if before.state == "ready" and seen == self._seen:
            self._view.snapshot = replace(before, head=facts.head)
            return
        summary = summarise(facts.events)
        fresh = replace(before, state="ready", message="", head=facts.head, summary=summary)
        self._view.snapshot = fresh if fresh.accounts else replace(fresh, note="amounts are being computed …")
        self._view.snapshot = self._with_accounts(fresh, web3, facts, summary)
        self._seen = seen

    def _with_accounts(self, fresh: Snapshot, web3: Web3, facts: ChainFacts, summary: ChainSummary) -> Snapshot:
        def header(number: int) -> BlockHeader:
            known = facts.headers.get(number) if number <= facts.head else None
            return known or header_of(web3, self._deployment, number) or facts.header(number)

        try:
            with closing(ReceiptLog.open(self._state_dir, read_only=True)) as log:
                accounts = self._accountant.compute(facts, [LocalExport(log)], summary.ranges, header)
        except InvalidArgument as error:
            return replace(fresh, accounts=None, note=f"what was earned can’t be computed here: {error.message}")
        return replace(fresh, accounts=accounts, note="; ".join(accounts.notes))
