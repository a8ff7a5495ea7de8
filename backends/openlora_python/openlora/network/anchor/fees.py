"""What an anchor may cost: EIP-1559 fees of a first try and of a replacement, in wei per gas."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import Internal

GWEI = 10**9
POOL_BUMP_PERCENT = 10  # geth's pool refuses less on either fee; anvil's takes anything
BUMP_EIGHTHS = 9  # ours: +12.5 %, so that rounding never falls below what a pool wants


@dataclass(frozen=True)
class Fees:
    """Both fees of a transaction."""

    max_fee: int
    tip: int


@dataclass(frozen=True)
class FeePolicy:
    """`cap` is the most that is ever offered per gas; `minimum_tip` is offered where a node suggests less."""

    cap: int = 200 * GWEI
    minimum_tip: int = GWEI

    def quote(self, base_fee: int, suggested_tip: int) -> Fees | None:
        """Twice the base fee and the tip: five full blocks in a row are not enough to price it out.

        None: the base fee is at the cap.
        """
        if base_fee >= self.cap:
            return None
        tip = min(max(suggested_tip, self.minimum_tip), self.cap - base_fee)
        return Fees(min(2 * base_fee + tip, self.cap), tip)

    def replacement(self, old: Fees, base_fee: int, suggested_tip: int) -> Fees | None:
        """Fees that every pool takes in place of `old`, and that are today's at least. None: they are over the cap."""
        fresh = self.quote(base_fee, suggested_tip)
        if fresh is None:
            return None
        fees = Fees(max(fresh.max_fee, _bumped(old.max_fee)), max(fresh.tip, _bumped(old.tip)))
        return fees if fees.max_fee <= self.cap and fees.tip <= fees.max_fee else None


def check_replacement(old: Fees, new: Fees) -> None:
    """Internal: a pool would not take `new` in place of `old`, and a devnet's pool would not tell."""
    for name in ("max_fee", "tip"):
        before, after = getattr(old, name), getattr(new, name)
        if after <= before or after * 100 < before * (100 + POOL_BUMP_PERCENT):
            raise Internal(f"a replacement's {name} of {after} wei is not {POOL_BUMP_PERCENT} % over {before}")


def _bumped(fee: int) -> int:
    return max(-(-fee * BUMP_EIGHTHS // 8), fee + 1)
