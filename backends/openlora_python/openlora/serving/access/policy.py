"""The access policy: who a caller is, which adapters it may know of, and how much it may use."""

from __future__ import annotations

import hmac
import logging
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ...access_rule import AccessRule, canonical_caller
from ...adapters.catalog_rows import AdapterRecord
from ...attribution.log_key import load_log_key
from ...config import Access, RunConfig, UsageLimits
from ...errors import InvalidArgument, Unavailable
from .caller_directory import CallerDirectory
from .caller_store import ANONYMOUS, digest_of
from .checks import AccessCheck, HoldingsView, OpenToAll, check_of
from .signed_login import FIELD, LoginToken, is_login_token, read_token, verify_token

__all__ = ["ANONYMOUS", "AccessPolicy"]

KEPT_CHECKS = 16_384
LOG_RETRY_MS = 2000

log = logging.getLogger(__name__)


class AccessPolicy:
    """One for the resolver, one for the gateway; both read the settings once and `callers.sqlite` as it changes.

    Whatever can't be decided is a no: an unreadable store refuses everybody, a check that fails denies its adapter,
    and a clock that is set back brings nothing that expired back to life.
    """

    def __init__(
        self, run: RunConfig, view: HoldingsView | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        """`view` is what token-gated adapters are checked against; without one they are nobody's."""
        access = run.settings.access
        self._access = access
        self._view = view
        self._clock = _ForwardClock(clock)
        self._callers = CallerDirectory(run.callers_path)
        self._log_key_path = run.log_key_path
        self._log_id: bytes | None = None
        self._digests = {name: digest.lower() for name, digest in access.callers.items()}
        self._holdings_max_age = run.settings.network.max_view_age_seconds
        self._operators_checks = {
            name: check_of(rule, view, self._holdings_max_age) for name, rule in _operators_rules(access).items()
        }
        self._card_checks: dict[tuple[str, int], tuple[Any, AccessCheck]] = {}  # with the card's words

    def close(self) -> None:
        self._callers.close()

    @property
    def knows_keys(self) -> bool:
        """Whether a key means anything here; where it doesn't, those that OpenAI's clients always send are ignored."""
        return bool(self._digests) or self._access.require_key or self._callers.has_keys

    def caller(self, api_key: str | None) -> str:
        """The caller's name.

        Raises:
            InvalidArgument: the key or login token is no good, or none was given where the policy wants one.
            Unavailable: it can't be told.
        """
        if not api_key:
            if self._access.require_key:
                raise InvalidArgument("this server wants a key", field=FIELD)
            return ANONYMOUS
        if is_login_token(api_key):
            return self._signer(read_token(api_key))
        digest = digest_of(api_key)
        found = self._callers.caller_of_key(digest, self._clock())
        for name, expected in self._digests.items():
            if hmac.compare_digest(digest, expected):
                found = name
        if found is None:
            raise InvalidArgument("unknown key", field=FIELD)
        return found

    def allows(self, caller: str, adapter: AdapterRecord) -> bool:
        """May `caller` know of this version of an adapter and use it? The operator's rule, or else its card's."""
        try:
            return self._check(adapter).allows(canonical_caller(caller), adapter) is True
        except Exception as error:  # whatever it is: what is not known is not granted
            log.error("the access of adapter %s can't be checked: %s: %s", adapter.name, type(error).__name__, error)
            return False

    def limits(self, caller: str) -> UsageLimits:
        """What the caller may use. Each number is the settings', or else that of `openlora keys`, or else the default.

        Raises:
            Unavailable: it can't be told.
        """
        sources = (self._access.caller_limits.get(caller), self._callers.limits(caller), self._access.default_limits)
        set_here = [source for source in sources if source is not None]
        return UsageLimits(
            requests_per_minute=_first(source.requests_per_minute for source in set_here),
            tokens_per_day=_first(source.tokens_per_day for source in set_here),
        )

    def adapter_limits(self, name: str) -> UsageLimits:
        """What all callers together may use of an adapter."""
        return self._access.adapters.get(name) or UsageLimits()

    def _check(self, adapter: AdapterRecord) -> AccessCheck:
        if operators := self._operators_checks.get(adapter.name):
            return operators
        access = adapter.card.get("access") if adapter.card else None
        if access is None:
            return OpenToAll()
        version = (adapter.name, adapter.version)
        known = self._card_checks.get(version)
        if known is None or known[0] != access:  # a card can change: its text is what counts
            if len(self._card_checks) >= KEPT_CHECKS:
                self._card_checks.clear()
            rule = AccessRule.model_validate(access)
            known = self._card_checks[version] = (access, check_of(rule, self._view, self._holdings_max_age))
        return known[1]

    def _signer(self, token: LoginToken) -> str:
        if self._access.signed_requests == "off":
            raise InvalidArgument("this server takes no signed requests", field=FIELD)
        now = self._clock()
        address = verify_token(token, self._server(), now)
        caller, known = self._callers.caller_of_address(address, now)
        if caller is None and (known or self._access.signed_requests != "any" or self._access.require_key):
            raise InvalidArgument(f"{address} is no caller of this server", field=FIELD)
        return caller or address

    def _server(self) -> bytes:
        """The log id, which a login token names its server by; attribution writes it at its first start."""
        if self._log_id is None:
            self._log_id = _log_id(self._log_key_path)
        return self._log_id


class _ForwardClock:
    """Seconds since the epoch, never less than it has said before: what expired stays so."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._latest = 0.0
        self._lock = threading.Lock()

    def __call__(self) -> float:
        with self._lock:
            self._latest = max(self._latest, self._clock())
            return self._latest


def _operators_rules(access: Access) -> dict[str, AccessRule]:
    rules = {name: one.access for name, one in access.adapters.items() if one.access is not None}
    for name, callers in access.private.items():
        rules[name] = AccessRule(policy="allow-list", callers=callers)
    return rules


def _first(values: Iterable[int | None]) -> int | None:
    return next((value for value in values if value is not None), None)


def _log_id(path: Path) -> bytes:
    try:
        return load_log_key(str(path)).log_id
    except InvalidArgument as error:
        raise Unavailable(f"the receipt log's key is not there yet: {error}", retry_after_ms=LOG_RETRY_MS) from error
