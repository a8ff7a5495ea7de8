"""The checks behind the policies of adapters. Whatever a check does not know, it denies."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ...access_rule import ADDRESS, AccessRule, TokenTerms
from ...adapters.catalog_rows import AdapterRecord

CLOCK_TOLERANCE_SECONDS = 60.0  # a time further ahead than this means that the clock was set back


class AccessCheck(Protocol):
    """One policy in force for one adapter."""

    def allows(self, caller: str, adapter: AdapterRecord) -> bool:
        """May `caller` know of `adapter` and use it? Whatever is raised counts as no."""


@dataclass(frozen=True)
class Holding:
    """What a chain said of an address."""

    balance: int
    read_at: float  # seconds since the epoch, by this machine's clock


class HoldingsView(Protocol):
    """A cached view of a chain. It never waits for one."""

    def holding(self, token: TokenTerms, address: str) -> Holding | None:
        """The last known balance of `address`; None = never read."""


@dataclass(frozen=True)
class OpenToAll:
    def allows(self, caller: str, adapter: AdapterRecord) -> bool:
        return True


@dataclass(frozen=True)
class AllowList:
    callers: frozenset[str]

    def allows(self, caller: str, adapter: AdapterRecord) -> bool:
        return caller in self.callers


@dataclass(frozen=True)
class TokenGate:
    """Addresses that hold enough of a token, by a view that is not older than `max_age_seconds`."""

    token: TokenTerms
    view: HoldingsView | None
    max_age_seconds: float
    clock: Callable[[], float] = time.time

    def allows(self, caller: str, adapter: AdapterRecord) -> bool:
        if self.view is None or not ADDRESS.fullmatch(caller):
            return False
        holding = self.view.holding(self.token, caller)
        if holding is None:
            return False
        age = self.clock() - holding.read_at
        return -CLOCK_TOLERANCE_SECONDS <= age <= self.max_age_seconds and holding.balance >= self.token.minimum


def check_of(rule: AccessRule, view: HoldingsView | None, max_age_seconds: float) -> AccessCheck:
    """The check that a rule asks for."""
    match rule.policy:
        case "open":
            return OpenToAll()
        case "allow-list":
            return AllowList(frozenset(rule.callers))
        case "token-gated":
            return TokenGate(rule.token, view, max_age_seconds)
