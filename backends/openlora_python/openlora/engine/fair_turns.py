"""Turns: requests that wait for different adapters are served in rotation, whatever the length of each one's queue."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from .api import EngineRequest

FRONT = -1.0
"""The turn of a sequence that ran before and was preempted."""

Flow = frozenset[str]
"""Digests of the adapters that requests share; empty for the base model."""


@dataclass
class _Level:
    """The waiting requests of one priority."""

    waiting: Counter[Flow] = field(default_factory=Counter)
    clock: float = 0.0
    last: dict[Flow, float] = field(default_factory=dict)  # the latest turn that was given out


class FairTurns:
    """Fair queuing by virtual time (Demers, Keshav, Shenker 1989), one unit a request, by the set of adapters.

    turn = max(clock, latest turn of the same adapters + 1), and the clock moves by 1/(adapter sets that wait) with each
    request served: the n-th waiting request of an adapter comes n rounds from now, the first one of any other
    adapter in this round. A request with the next turn is passed by at most one of each adapter set that waits, and
    by none that arrive later than a round after it. Priorities have clocks of their own, which start over when
    nobody waits.
    """

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}

    def enter(self, request: EngineRequest) -> float:
        """The turn of a request that begins to wait."""
        level, flow = self._levels.setdefault(request.priority, _Level()), flow_of(request)
        turn = max(level.clock, level.last.get(flow, -1.0) + 1)
        level.last[flow] = turn
        level.waiting[flow] += 1
        return turn

    def enter_again(self, request: EngineRequest) -> float:
        """The turn of a preempted request: it goes before all that have not run yet."""
        self._levels.setdefault(request.priority, _Level()).waiting[flow_of(request)] += 1
        return FRONT

    def leave(self, request: EngineRequest, turn: float, *, served: bool) -> None:
        """A request no longer waits; one that left unserved hands its turn to the next of its adapters."""
        level, flow = self._levels[request.priority], flow_of(request)
        if served:
            level.clock = max(level.clock + 1 / len(level.waiting), turn)
        elif level.last.get(flow) == turn:
            level.last[flow] = turn - 1
        level.waiting[flow] -= 1
        if not level.waiting[flow]:
            del level.waiting[flow]
        if not level.waiting:
            del self._levels[request.priority]
        elif len(level.last) > 2 * len(level.waiting) + 64:
            # Who stands more than a round behind is told no more by this than by the clock.
            level.last = {flow: last for flow, last in level.last.items() if last + 1 > level.clock}


def flow_of(request: EngineRequest) -> Flow:
    """Whose queue a request stands in."""
    return frozenset(use.digest for use in request.adapters)
