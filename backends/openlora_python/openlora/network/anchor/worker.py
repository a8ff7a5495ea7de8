"""The anchor worker: one look at chain, log and outbox per step, and at most one transaction sent in it.

Truth is the contract's head, never what a node once answered. The contract takes an anchor only on the head that it
names (compare-and-set), so nothing that is sent twice, late or by two workers anchors twice. One nonce is followed at a
time: the next one is used when the chain has taken the last one in.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from eth_account.signers.local import LocalAccount

from ...errors import ContractRefused, Unavailable
from .chain import NOBODY, AnchorChain, Answer, ChainView
from .fees import FeePolicy, Fees
from .local_log import LocalLog
from .outbox import DISPLACED, FINAL, REVERTED, Outbox, OutboxRow, Scope, SignedAnchor


@dataclass(frozen=True)
class AnchorPolicy:
    """When to anchor and when to lose patience. Seconds, receipts and blocks."""

    every_seconds: float = 600.0
    min_receipts: int = 10_000  # at so many new ones, anchor at once
    resend_seconds: float = 30.0  # a node that lost the transaction gets the same bytes again
    replace_seconds: float = 48.0  # in no block for so long: offer more,
    replace_blocks: int = 2  # if there were blocks to be in
    fees: FeePolicy = FeePolicy()


class Phase(StrEnum):
    """What a step found or did."""

    IDLE = "idle"  # nothing is due
    SENT = "sent"
    RESENT = "resent"
    REPLACED = "replaced"
    PENDING = "pending"  # in no block yet
    BLOCKED = "blocked"  # somebody has to act: the message says what is wrong
    UNREACHABLE = "unreachable"


@dataclass(frozen=True)
class Report:
    """A step in figures. Sizes count receipts; `final_size` of them are anchored for good."""

    phase: Phase
    message: str
    log_size: int = 0
    checkpoint_size: int = 0
    head_size: int = 0
    final_size: int = 0
    transaction: str | None = None


class AnchorWorker:
    """Anchors one log with one key. The caller holds the lock of both, and gives the time (seconds since 1970)."""

    def __init__(
        self, chain: AnchorChain, log: LocalLog, outbox: Outbox, account: LocalAccount, policy: AnchorPolicy
    ) -> None:
        self._chain, self._log, self._outbox = chain, log, outbox
        self._account, self._policy = account, policy
        deployment = chain.deployment
        self.scope = Scope(
            deployment.chain_id,
            bytes.fromhex(deployment.genesis[2:]),
            deployment.contracts.AttributionLog.address,
            chain.log_id,
            account.address,
        )
        self._sent: dict[int, Answer] = {}  # by row: what this process has sent since the nonce last fell
        self._nonce = 0

    def step(self, now: float) -> Report:
        """Look, and do the next thing.

        Raises:
            LogConflict: the log is not the one that was anchored, or not the one that it signed.
            ChainMismatch: the chain is not that of the deployment.
        """
        try:
            view = self._chain.look(self._account.address)
            self._log.refresh()
            for head in (view.head, view.final_head):
                self._log.compare(head.size, head.root, now)
            self._close_rows(view)
            phase, message, row = self._act(view, now)
        except Unavailable as error:
            return Report(Phase.UNREACHABLE, error.message)
        return Report(
            phase,
            message,
            self._log.size,
            self._log.checkpoint.size if self._log.checkpoint else 0,
            view.head.size,
            view.final_head.size,
            "0x" + row.anchor.hash.hex() if row else None,
        )

    def _act(self, view: ChainView, now: float) -> tuple[Phase, str, OutboxRow | None]:
        if view.nonce < self._nonce:  # a re-org: what was in a block may be nowhere now
            self._sent.clear()
        self._nonce = view.nonce
        if view.head.submitter != self._account.address:
            who = "nobody" if view.head.submitter == NOBODY else view.head.submitter
            return (
                Phase.BLOCKED,
                f"the log's submitter on the chain is {who}, this key's is {self._account.address}",
                None,
            )
        rows = self._outbox.with_nonce(self.scope, view.nonce)
        valid = [row for row in rows if _extends_head(row, view)]
        if valid:
            return self._follow(valid[-1], rows[-1], view, now)
        checkpoint = self._log.checkpoint
        if checkpoint is None or checkpoint.size <= view.head.size:
            return Phase.IDLE, "everything that is signed is anchored", None
        if rows:  # the head moved under it: its nonce is of use for an anchor on the new head
            return self._sign_and_send(view, now, rows[-1])
        if not self._is_due(checkpoint.size - view.head.size, now):
            return Phase.IDLE, f"{checkpoint.size - view.head.size} receipts wait for the next anchor", None
        return self._sign_and_send(view, now, None)

    def _follow(self, row: OutboxRow, dearest: OutboxRow, view: ChainView, now: float) -> tuple[Phase, str, OutboxRow]:
        """A transaction that would anchor is in no block: send it again, or one that pays more."""
        anchor, policy = row.anchor, self._policy
        answer = self._sent.get(row.id)
        waited = not 0 <= now - anchor.created_at < policy.replace_seconds
        passed_over = waited and view.block - anchor.created_block >= policy.replace_blocks
        if answer is not None and (
            passed_over or answer in (Answer.UNDERPRICED, Answer.FEE_TOO_LOW) or view.base_fee > anchor.max_fee
        ):
            done = self._sign_and_send(view, now, dearest)
            if done[0] is not Phase.BLOCKED:
                return done
        if answer is None or row.last_sent_at is None or not 0 <= now - row.last_sent_at < policy.resend_seconds:
            return self._send(row, now, Phase.RESENT if row.times_sent else Phase.SENT)
        return Phase.PENDING, f"the anchor of {anchor.size} receipts is in no block yet: {row.answer}", row

    def _sign_and_send(
        self, view: ChainView, now: float, replaced: OutboxRow | None
    ) -> tuple[Phase, str, OutboxRow | None]:
        """A new transaction for the newest checkpoint, with this nonce: kept first, sent then."""
        checkpoint, head = self._log.checkpoint, view.head
        if checkpoint is None or checkpoint.size <= head.size:
            return Phase.BLOCKED, "no signed checkpoint is over the head", replaced
        fees = self._fees(view, replaced.anchor.fees if replaced else None)
        if fees is None:
            return Phase.BLOCKED, f"the chain wants more than the cap of {self._policy.fees.cap} wei per gas", replaced
        batch = (head.size, head.root, checkpoint.size, checkpoint.root)
        calldata = self._chain.calldata(*batch)
        try:
            gas = self._chain.gas(self._account.address, calldata)
        except ContractRefused as error:
            return Phase.PENDING, f"the contract would refuse the anchor now: {error.message}", replaced
        raw, transaction_hash = self._chain.sign(self._account, view.nonce, calldata, gas, fees)
        anchor = SignedAnchor(
            view.nonce, *batch, calldata, raw, transaction_hash, gas, fees.max_fee, fees.tip, now, view.block
        )
        row = self._outbox.add(self.scope, anchor)
        return self._send(row, now, Phase.REPLACED if replaced else Phase.SENT)

    def _send(self, row: OutboxRow, now: float, phase: Phase) -> tuple[Phase, str, OutboxRow]:
        sent = self._chain.send(row.anchor.raw)
        self._outbox.record_sent(row, now, str(sent))
        self._sent[row.id] = sent.answer
        words = f"anchor {row.anchor.previous_size} → {row.anchor.size} {phase}: {sent}"
        return (Phase.BLOCKED if sent.answer in (Answer.NO_FUNDS, Answer.REFUSED) else phase), words, row

    def _fees(self, view: ChainView, replaced: Fees | None) -> Fees | None:
        tip = self._chain.suggested_tip()
        if replaced is None:
            return self._policy.fees.quote(view.base_fee, tip)
        return self._policy.fees.replacement(replaced, view.base_fee, tip)

    def _is_due(self, waiting: int, now: float) -> bool:
        last = self._outbox.last_created_at(self.scope)
        recent = (
            last is not None and 0 <= now - last < self._policy.every_seconds
        )  # a clock that was set back: not recent
        return waiting >= self._policy.min_receipts or not recent

    def _close_rows(self, view: ChainView) -> None:
        """Say of the rows with a nonce in final blocks what became of them. History only: nothing is decided by it."""
        for row in self._outbox.open_rows(self.scope):
            if row.anchor.nonce >= view.final_nonce:
                break
            receipt = self._chain.receipt(row.anchor.hash)
            if receipt is None:
                self._outbox.close_row(row, DISPLACED)
            elif receipt["blockNumber"] <= view.final_block:
                self._outbox.close_row(row, FINAL if receipt["status"] == 1 else REVERTED)


def _extends_head(row: OutboxRow, view: ChainView) -> bool:
    return (row.anchor.previous_size, row.anchor.previous_root) == (view.head.size, view.head.root)
