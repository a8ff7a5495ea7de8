"""All logs of a deployment, checked and judged: what epochs, attestations and claims are computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from ...errors import InvalidArgument, SettlementDiffers
from .chain_state import ChainState, LogState, read_state
from .facts import ChainFacts
from .history import Advance, StoredFrontier, check_history
from .judge import Export, Headers, LogJudge
from .ledger import JudgedLog, Tally, cumulative
from .prefix_store import Prefix, PrefixStore
from .registry import Registry
from .reward_tree import RewardTree

Started = Callable[[str, int], Advance]
"""Told what is begun and of how many leaves; what it returns is told how they go."""

_STEP = 1024


@dataclass
class Books:
    """The logs by id, and notes on what can't be settled and why."""

    facts: ChainFacts
    state: ChainState
    logs: dict[bytes, JudgedLog] = field(default_factory=dict)
    prefixes: dict[bytes, Prefix] = field(default_factory=dict)  # what was not judged again
    notes: list[str] = field(default_factory=list)

    def ledger(self, stops: Mapping[bytes, int] | None = None) -> Tally:
        """The sums over all logs, each up to its settled size or as far as `stops` says."""
        stops = stops or {}
        whole = Tally()
        for log_id, judged in self.logs.items():
            whole.add(judged.tally(stops.get(log_id, judged.log.settled_size)))
        return whole

    def reward_tree(self, stops: Mapping[bytes, int] | None = None) -> tuple[RewardTree, dict[bytes, int]]:
        """The tree of rewards over `ledger(stops)`, and the amounts in it."""
        amounts = cumulative(self.ledger(stops))
        return RewardTree(self.facts.chain_id, self.facts.distributor, amounts), amounts

    def accepted_tree(self) -> tuple[RewardTree, dict[bytes, int]]:
        """The same at the settled sizes. SettlementDiffers: its root is not the one that was accepted."""
        tree, amounts = self.reward_tree()
        if tree.root != self.state.root:
            raise SettlementDiffers(
                f"the accepted root is {self.state.root.hex()}, computed is {tree.root.hex()}: these are not the logs "
                "that were settled, or a wrong epoch was accepted"
            )
        return tree, amounts


def open_books(
    exports: Iterable[Export],
    facts: ChainFacts,
    headers: Headers | None = None,
    store: PrefixStore | None = None,
    started: Started = lambda what, leaves: lambda count: None,
) -> Books:
    """Check and judge every log that has an export.

    Args:
        headers: where headers come from that the facts lack; default: nowhere.
        store: where prefixes come from and go to; default: everything is computed from the first leaf on.

    Raises:
        InvalidArgument: an export is there twice; one is missing, or is not the one that was settled (an anchor
            differs, or what its receipts pay), so that what has been earned can't be computed; the facts lack a
            header, or their events don't fit each other.
    """
    by_log: dict[bytes, Export] = {}
    for export in exports:
        if export.key.log_id in by_log:
            raise InvalidArgument(f"two exports are of log {export.key.log_id.hex()}", field="export")
        by_log[export.key.log_id] = export
    try:
        books, registry = Books(facts, read_state(facts)), Registry(facts)
    except (KeyError, TypeError) as error:
        raise InvalidArgument(f"the facts' events do not fit each other: {error!r}", field="facts") from error
    for log_id in by_log.keys() - books.state.logs.keys():
        books.notes.append(f"log {log_id.hex()} is not registered on this chain: left out")
    for log_id, log in sorted(books.state.logs.items()):
        prefix = store.load(facts, log) if store is not None else None
        args = (by_log.get(log_id), log, facts, registry, headers or facts.header)
        judged = _judged(*args, prefix, started)
        if prefix is not None and judged is not None and not _is_as_settled(judged):
            prefix = None  # kept of an export that lacked something
            judged = _judged(*args, None, started)
        if prefix is not None:
            books.prefixes[log_id] = prefix
        if judged is None:
            if log.anchors:
                books.notes.append(f"log {log_id.hex()} is anchored, but no export of it was given")
            continue
        if judged.fault is not None:
            books.notes.append(f"log {log_id.hex()}: {judged.fault}; settles up to {judged.good_size}")
        if judged.judged < log.settled_size:
            raise InvalidArgument(
                f"log {log_id.hex()} is settled up to {log.settled_size}, but its export is good up to {judged.judged} "
                f"only: it is not the one that was settled",
                field="export",
            )
        if not _is_as_settled(judged):
            raise InvalidArgument(
                f"of log {log_id.hex()} {log.settled_amount} is settled for its first {log.settled_size} receipts, its "
                f"export pays {judged.paid_so_far()} for them: it is not the export that was settled, something in it "
                "is missing",
                field="export",
            )
        books.logs[log_id] = judged
    return books


def keep_prefixes(
    books: Books, exports: Iterable[Export], store: PrefixStore, stops: Mapping[bytes, int] | None = None
) -> None:
    """Put away the prefixes at the logs' settled sizes and at `stops`, for the next time."""
    by_log = {export.key.log_id: export for export in exports}
    for log_id, judged in books.logs.items():
        if log_id not in by_log:
            continue
        sizes = {judged.log.settled_size, (stops or {}).get(log_id, judged.log.settled_size)} - {0}
        begun = books.prefixes.get(log_id)
        if begun is not None and sizes == {begun.size}:
            continue
        frontier = StoredFrontier.at(begun.size, begun.peaks) if begun else StoredFrontier()
        known = set(begun.request_ids) if begun else set()
        prefixes = []
        for size in sorted(sizes):
            known.update(one for one in judged.request_ids[frontier.size - judged.start : size - judged.start] if one)
            frontier.extend(by_log[log_id], size)
            prefixes.append(Prefix(size, frontier.peaks, judged.tally(size), frozenset(known)))
        if prefixes:
            store.save(books.facts, judged.log, prefixes)


def _is_as_settled(judged: JudgedLog) -> bool:
    size = judged.log.settled_size
    return judged.judged >= size and judged.paid_so_far() == judged.log.settled_amount


def _judged(
    export: Export | None,
    log: LogState,
    facts: ChainFacts,
    registry: Registry,
    headers: Headers,
    prefix: Prefix | None,
    started: Started,
) -> JudgedLog | None:
    start = prefix.size if prefix else 0
    before = prefix.tally if prefix else Tally()
    if export is None:
        if log.settled_size == 0:
            return None
        if start == log.settled_size:
            return JudgedLog(log, start, before, start, "no export of it was given")
        raise InvalidArgument(
            f"what was settled of log {log.log_id.hex()} can't be computed without its export", field="export"
        )
    frontier = StoredFrontier.at(prefix.size, prefix.peaks) if prefix else StoredFrontier()
    anchored = log.anchors[-1].size if log.anchors else 0
    name = log.log_id.hex()[:8]
    history = check_history(export, log.anchors, frontier, started(f"history of {name}…", anchored - start))
    judged = JudgedLog(log, start, before, max(history.good_size, start), history.fault)
    judge = LogJudge(export, log, facts, registry, headers, set(prefix.request_ids) if prefix else None)
    advance = started(f"receipts of {name}…", judged.good_size - start)
    for begin in range(start, judged.good_size, _STEP):
        end = min(begin + _STEP, judged.good_size)
        judged.take(judge.judge(begin, end), judge.shares)
        advance(end - begin)
    return judged
