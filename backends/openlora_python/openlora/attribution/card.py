"""A model's card: who owns it, what it costs, and which data sets its owner declares.

The data shares are declared, not measured: they are what the owner of the model says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from eth_utils import is_checksum_address, to_checksum_address
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ..access_rule import AccessRule
from ..errors import InvalidArgument
from ..validation import first_fault
from .blobs import MAX_PRICE, NO_OWNER

WHOLE = 1_000_000  # shares are in parts per million
_DECIMAL = re.compile(r"0|[1-9][0-9]{0,30}")


def _checksummed(address: str) -> str:
    if not is_checksum_address(address):
        known = address.startswith("0x") and len(address) == 42
        hint = f"; its checksummed form is {to_checksum_address(address.lower())}" if known and _is_hex(address) else ""
        raise ValueError(f"{address!r} is not a checksummed address{hint}")
    if address == NO_OWNER:
        raise ValueError("the zero address owns nothing")
    return address


def _is_hex(address: str) -> bool:
    return all(digit in "0123456789abcdefABCDEF" for digit in address[2:])


def _unique(what: str, values: Sequence[str]) -> None:
    twice = sorted({value for value in values if values.count(value) > 1})
    if twice:
        raise ValueError(f"{what} {twice[0]!r} is there more than once")


def _whole(what: str, shares: Sequence[int]) -> None:
    if sum(shares) != WHOLE:
        raise ValueError(f"the shares of the {what} add up to {sum(shares)} ppm, not {WHOLE}")


def _whole_amount(value: Any) -> Any:
    """JSON has no exact integers from 2^53 on: larger prices are written as decimal strings."""
    if isinstance(value, str):
        if _DECIMAL.fullmatch(value) is None or int(value) > MAX_PRICE:
            raise ValueError(f"{value[:40]!r} is not a whole number of at most 10^30, without leading zeros")
        return int(value)
    if type(value) is int and value >= 2**53:
        raise ValueError("Input should be less than 2^53; larger prices are written as text")
    return value


Address = Annotated[str, AfterValidator(_checksummed)]
Share = Annotated[int, Field(gt=0, le=WHOLE)]
Price = Annotated[int, BeforeValidator(_whole_amount), Field(ge=0)]
Text = Annotated[str, Field(min_length=1, max_length=256)]
TASK = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")
Task = Annotated[str, Field(pattern=f"^{TASK.pattern}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Contributor(_Strict):
    """Somebody who is paid for a data set."""

    name: Text
    address: Address
    share_ppm: Share  # of the data set


class DatasetShare(_Strict):
    """A data set, its declared part in the model, and who contributed to it."""

    id: Text
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # SHA-256
    licence: Text
    share_ppm: Share  # of the model
    contributors: Annotated[tuple[Contributor, ...], Field(strict=False, min_length=1, max_length=64)]

    @model_validator(mode="after")
    def _check_contributors(self) -> DatasetShare:
        _unique("contributor", [who.address for who in self.contributors])
        _whole(f"contributors of {self.id!r}", [who.share_ppm for who in self.contributors])
        return self


class Prices(_Strict):
    """In the smallest unit of the payment token, for 10^6 tokens: JSON integers, or decimal strings up to 10^30."""

    version: Literal[1]
    input: Price
    output: Price


class Card(_Strict):
    """The card of a base model or adapter. Shares of all data sets, and of each one's contributors, are whole."""

    schema_version: Annotated[Literal[1], Field(alias="schema")]
    owner: Address
    licence: Text
    description: Annotated[str, Field(max_length=2000)] = ""
    base: Annotated[str | None, Field(pattern=r"^[0-9a-f]{64}$")] = None  # digest of the base an adapter was made for
    prices: Prices
    access: AccessRule | None = None  # who may use it; None = everybody
    datasets: Annotated[tuple[DatasetShare, ...], Field(strict=False, max_length=64)] = ()
    tasks: Annotated[tuple[Task, ...], Field(strict=False, max_length=16)] = ()  # what requests may ask for it by

    @model_validator(mode="after")
    def _check_tasks(self) -> Card:
        _unique("task", self.tasks)
        return self

    @model_validator(mode="after")
    def _check_datasets(self) -> Card:
        _unique("data set", [dataset.id for dataset in self.datasets])
        if self.datasets:
            _whole("data sets", [dataset.share_ppm for dataset in self.datasets])
        return self


def parse_card(document: Any) -> Card:
    """A card from decoded JSON; InvalidArgument says what is wrong and where."""
    try:
        return Card.model_validate(document)
    except ValidationError as error:
        place, words = first_fault(error, "card")
        raise InvalidArgument(words, field=place) from error
