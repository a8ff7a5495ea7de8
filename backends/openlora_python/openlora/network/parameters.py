"""The parameters of the network: how a price is divided, and how old a registry block may be. docs/settlement.md, 2."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import rfc8785
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..attribution.card import Address
from ..errors import InvalidArgument
from ..validation import first_fault

Part = Annotated[int, Field(ge=0, le=1_000_000)]


class Parameters(BaseModel):
    """A parameters document. The five parts sum to 10^6; `max_age` is in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: Annotated[Literal[1], Field(alias="schema")]
    platform: Address
    platform_ppm: Part
    node_ppm: Part
    adapter_ppm: Part
    data_ppm: Part
    base_ppm: Part
    max_age: Annotated[int, Field(ge=1, lt=2**53)]

    @model_validator(mode="after")
    def _whole(self) -> Parameters:
        total = self.platform_ppm + self.node_ppm + self.adapter_ppm + self.data_ppm + self.base_ppm
        if total != 1_000_000:
            raise ValueError(f"the five parts add up to {total} ppm, not 1000000")
        return self

    @property
    def document(self) -> str:
        """The canonical JSON that is published."""
        return rfc8785.dumps(self.model_dump(by_alias=True)).decode()


def parse_parameters(tree: Any) -> Parameters:
    """Parameters from decoded JSON; InvalidArgument says what is wrong and where."""
    try:
        return Parameters.model_validate(tree)
    except ValidationError as error:
        place, words = first_fault(error, "parameters")
        raise InvalidArgument(words, field=place) from error
