"""Who may use an adapter, as its card and the operator's settings write it: one object, the same in both places.

{"policy": "open"}
{"policy": "allow-list", "callers": ["alice", "0x…"]}
{"policy": "token-gated", "token": {"chain_id": 1, "contract": "0x…", "minimum": 1}}
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from eth_utils import to_checksum_address
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}")


def canonical_caller(name: str) -> str:
    """A caller's name; an Ethereum address in its one checksummed form, whatever its letters' case was."""
    return to_checksum_address(name) if ADDRESS.fullmatch(name) else name


def canonical_adapter(name: str) -> str:
    """An adapter's name; that of a chain's, `<owner>/<name>`, with its owner as `canonical_caller` writes it."""
    owner, slash, label = name.partition("/")
    return f"{canonical_caller(owner)}/{label}" if slash else name


def chain_address(text: str) -> str:
    """An Ethereum address in its checksummed form; ValueError: it is none."""
    if not ADDRESS.fullmatch(text):
        raise ValueError("not an address: 0x and 40 hex digits are wanted")
    return to_checksum_address(text)


Caller = Annotated[str, StringConstraints(min_length=1, max_length=128), AfterValidator(canonical_caller)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TokenTerms(_Strict):
    """Whoever holds at least `minimum` units of a token (ERC-20 or ERC-721: `balanceOf`) may use the adapter."""

    chain_id: Annotated[int, Field(ge=1, lt=2**53)]
    contract: Annotated[str, AfterValidator(chain_address)]
    minimum: Annotated[int, Field(ge=1, lt=2**53)] = 1


class AccessRule(_Strict):
    """One policy with what belongs to it, and nothing that belongs to another one."""

    policy: Literal["open", "allow-list", "token-gated"]
    callers: Annotated[tuple[Caller, ...], Field(strict=False, max_length=4096)] = ()  # allow-list; none = nobody
    token: TokenTerms | None = None

    @model_validator(mode="after")
    def _check_parts(self) -> AccessRule:
        if self.callers and self.policy != "allow-list":
            raise ValueError(f"callers belong to the policy allow-list, not to {self.policy}")
        if (self.token is not None) != (self.policy == "token-gated"):
            raise ValueError("the policy token-gated has a token, and no other policy has one")
        return self
