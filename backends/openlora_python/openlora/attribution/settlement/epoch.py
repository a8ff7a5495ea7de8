"""An epoch: what is to be proposed, and whether a given proposal is right. docs/settlement.md, 5."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import SettlementDiffers
from .books import Books
from .chain_state import Allocation, Proposal
from .ledger import JudgedLog

MAX_ALLOCATIONS = 32


@dataclass(frozen=True)
class Epoch:
    """What would be proposed now (None: nothing is to be settled), and which logs wait for what."""

    proposal: Proposal | None
    notes: tuple[str, ...]

    @property
    def stops(self) -> dict[bytes, int]:
        """How far each log goes."""
        return stops_of(self.proposal) if self.proposal is not None else {}


def stops_of(proposal: Proposal) -> dict[bytes, int]:
    """How far each log of a proposal goes, by its id."""
    return {one.log_id: one.stop for one in proposal.allocations}


def next_epoch(books: Books, epoch_cap: int) -> Epoch:
    """Each log as far as its deposit and what is left of the cap allow, those that waited longest first.

    Logs that only void receipts would be settled of take the places that are left, or they could keep all others out.

    SettlementDiffers: what was accepted so far is not what is computed.
    """
    books.accepted_tree()
    allocations: list[Allocation] = []
    pending = books.state.pending
    notes = [f"epoch {pending.epoch} is pending, and this one would be in its place"] if pending else []
    unpaid: list[Allocation] = []
    later: list[bytes] = []
    left = epoch_cap
    for judged in sorted(_waiting(books), key=_waits_since):
        if len(allocations) == MAX_ALLOCATIONS:
            later.append(judged.log.log_id)
            continue
        allocation, note = _allocation(judged, left, epoch_cap)
        if note is not None:
            notes.append(note)
        if allocation is not None:
            (allocations if allocation.amount else unpaid).append(allocation)
            left -= allocation.amount
    if not allocations:
        return Epoch(None, tuple(notes))
    amount = sum(one.amount for one in allocations)
    places = MAX_ALLOCATIONS - len(allocations)
    allocations += unpaid[:places]
    for log_id in [one.log_id for one in unpaid[places:]] + later:
        notes.append(f"log {log_id.hex()} waits for the next epoch: {MAX_ALLOCATIONS} logs are in this")
    allocations.sort(key=lambda one: one.log_id)
    tree, _ = books.reward_tree({one.log_id: one.stop for one in allocations})
    state = books.state
    return Epoch(Proposal(state.epoch + 1, tree.root, state.total + amount, tuple(allocations)), tuple(notes))


def replacement_epoch(books: Books) -> Epoch:
    """An epoch without allocations, which puts the computed root in the place of a wrong one that was accepted."""
    tree, _ = books.reward_tree()
    state = books.state
    if tree.root == state.root:
        return Epoch(None, ("the accepted root is the computed one",))
    return Epoch(Proposal(state.epoch + 1, tree.root, state.total, ()), ())


def check_proposal(books: Books, proposal: Proposal) -> None:
    """Compute a proposal again, and what was accepted before. SettlementDiffers: it is not right, and where."""
    if proposal.allocations:  # one without moves nothing: it is the way back from a wrong root
        books.accepted_tree()
    log_ids = [one.log_id for one in proposal.allocations]
    if len(log_ids) > MAX_ALLOCATIONS:
        raise SettlementDiffers(f"{len(log_ids)} allocations, at most {MAX_ALLOCATIONS} are possible")
    if any(one >= other for one, other in zip(log_ids, log_ids[1:], strict=False)):
        raise SettlementDiffers("the allocations do not ascend by log")
    for allocation in proposal.allocations:
        _check_allocation(books, allocation)
    total = books.state.total + sum(one.amount for one in proposal.allocations)
    if proposal.total != total:
        raise SettlementDiffers(f"the total is {proposal.total}, with these allocations it is {total}")
    tree, _ = books.reward_tree(stops_of(proposal))
    if proposal.root != tree.root:
        raise SettlementDiffers(f"the root is {proposal.root.hex()}, computed is {tree.root.hex()}")


def _check_allocation(books: Books, allocation: Allocation) -> None:
    log_id = allocation.log_id
    judged = books.logs.get(log_id)
    if judged is None:
        raise SettlementDiffers(f"log {log_id.hex()} is not registered, or no export of it was given")
    log = judged.log
    if allocation.start != log.settled_size:
        raise SettlementDiffers(f"log {log_id.hex()} is settled up to {log.settled_size}, not {allocation.start}")
    if not allocation.start < allocation.stop <= judged.good_size:
        raise SettlementDiffers(
            f"log {log_id.hex()} can be settled from {allocation.start} up to {judged.good_size}, "
            f"not to {allocation.stop}" + (f": {judged.fault}" if judged.fault else "")
        )
    amount = judged.paid(allocation.start, allocation.stop)
    if allocation.amount != amount:
        raise SettlementDiffers(
            f"receipts {allocation.start} to {allocation.stop} of log {log_id.hex()} cost {amount}, "
            f"not {allocation.amount}"
        )
    if amount > log.available:
        raise SettlementDiffers(f"log {log_id.hex()} has {log.available} left of its deposits, {amount} are wanted")


def _waiting(books: Books) -> list[JudgedLog]:
    return [one for one in books.logs.values() if one.good_size > one.log.settled_size]


def _waits_since(judged: JudgedLog) -> tuple[int, bytes]:
    """The block in which its first receipt that is not settled was anchored."""
    anchor = judged.log.first_covering(judged.log.settled_size)
    return anchor.block if anchor is not None else 0, judged.log.log_id


def _allocation(judged: JudgedLog, left: int, epoch_cap: int) -> tuple[Allocation | None, str | None]:
    log = judged.log
    stop = judged.furthest(min(log.available, left))
    note = None
    if stop < judged.good_size:
        price = judged.price_at(stop)
        rest = log.available - judged.paid(log.settled_size, stop)
        if price > epoch_cap:
            why = f"the epoch's cap is {epoch_cap}, so that it can never be settled"
        elif price > rest:
            why = f"{rest} are left of the deposits"
        else:
            why = "the epoch's cap is reached"
        note = f"log {log.log_id.hex()} goes up to {stop} of {judged.good_size}: the next receipt costs {price}, {why}"
    if stop == log.settled_size:
        return None, note
    return Allocation(log.log_id, log.settled_size, stop, judged.paid(log.settled_size, stop)), note
