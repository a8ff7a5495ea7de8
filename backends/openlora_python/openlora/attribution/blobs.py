"""The three blobs beside a receipt: runtime, adapters and terms. Their schemas, how to make them, and the price.

Blobs are plain JSON objects without floats and with integers below 2^53, so that RFC 8785 has one form for each.
The schemas are checked before a blob is journalled and again by every verifier; unknown keys are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from openlora.errors import InvalidArgument

if TYPE_CHECKING:
    from openlora.attribution.card import Card, DatasetShare
    from openlora.engine.api import AdapterUse, EngineInfo

NO_OWNER = "0x" + "0" * 40
"""Who owns a model that has no card."""

PRICE_UNIT = 1_000_000
"""Prices are per this many tokens."""

NO_PARAMETERS = "0" * 64
"""The parameters digest of terms that no published parameters are in force for: such a receipt cannot be settled."""

Digest = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Address = Annotated[str, Meta(pattern=r"\A0x[0-9a-fA-F]{40}\Z")]
Amount = Annotated[int, Meta(ge=0, lt=2**53)]
Ppm = Annotated[int, Meta(ge=0, le=1_000_000)]
Name = Annotated[str, Meta(max_length=256)]


_Kind = TypeVar("_Kind")


class _Blob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class RuntimeBlob(_Blob):
    """What computed: the engine and the numbers it computes with."""

    engine: Name
    version: Name
    dtype: Name
    quantization: Name


class AdapterWeight(_Blob):
    digest: Digest
    weight: Annotated[int, Meta(ge=-10_000_000, le=10_000_000)]  # 1e-6 units


class AdaptersBlob(_Blob):
    """Which adapters were applied, in order, and how they were combined."""

    adapters: list[AdapterWeight]
    method: Annotated[str, Meta(pattern=r"\A[a-z][a-z_]{0,31}\Z")]


class ContributorTerms(_Blob):
    address: Address
    ppm: Ppm


class DatasetTerms(_Blob):
    id: Name
    digest: Digest
    licence: Name
    ppm: Ppm
    contributors: list[ContributorTerms]


class ModelTerms(_Blob):
    """Whom one model pays: `input` and `output` are token units for 10^6 tokens."""

    digest: Digest
    owner: Address
    input: Amount
    output: Amount
    datasets: list[DatasetTerms]


class TermsBlob(_Blob):
    """What was agreed when the request was served."""

    price_version: Literal[1]
    parameters: Digest
    base: ModelTerms
    adapters: list[ModelTerms]


def runtime_blob(info: EngineInfo) -> dict[str, Any]:
    """The runtime blob of a loaded engine."""
    return {"engine": info.engine, "version": info.version, "dtype": info.dtype, "quantization": info.quantization}


def adapters_blob(adapters: Sequence[AdapterUse], method: str = "cat") -> dict[str, Any]:
    """The adapters blob of a request; an empty list is the base model alone."""
    return {"adapters": [{"digest": use.digest, "weight": use.weight} for use in adapters], "method": method}


def terms_blob(
    base: tuple[str, Card | None],
    adapters: Sequence[tuple[str, Card | None]],
    parameters: str = NO_PARAMETERS,
) -> dict[str, Any]:
    """The terms blob from (manifest digest, card) of the base and of each adapter, in the order of the adapters blob.

    A model without a card belongs to nobody (zero address), costs nothing and declares no data sets.
    """
    return {
        "price_version": 1,
        "parameters": parameters,
        "base": _model_terms(*base),
        "adapters": [_model_terms(digest, card) for digest, card in adapters],
    }


def check_blobs(base_digest: str, runtime: Any, adapters: Any, terms: Any) -> TermsBlob:
    """Check the three blobs against their schemas and each other, and return the terms typed.

    InvalidArgument names the blob and the place.
    """
    _convert("runtime", runtime, RuntimeBlob)
    typed_adapters = _convert("adapters", adapters, AdaptersBlob)
    typed_terms = _convert("terms", terms, TermsBlob)
    if typed_terms.base.digest != base_digest:
        raise InvalidArgument(f"the terms are for base {typed_terms.base.digest}, not {base_digest}", field="terms")
    used = [adapter.digest for adapter in typed_adapters.adapters]
    priced = [model.digest for model in typed_terms.adapters]
    if used != priced:
        raise InvalidArgument(f"the terms name adapters {priced}, the request used {used}", field="terms")
    return typed_terms


def price(terms: TermsBlob, in_tokens: int, out_tokens: int) -> int:
    """Σ over base and adapters of (in · input + out · output) // 10^6, each model's part rounded down by itself."""
    models = (terms.base, *terms.adapters)
    return sum((in_tokens * model.input + out_tokens * model.output) // PRICE_UNIT for model in models)


def _convert(name: str, blob: Any, kind: type[_Kind]) -> _Kind:
    try:
        return msgspec.convert(blob, kind, strict=True)
    except msgspec.ValidationError as error:
        raise InvalidArgument(str(error), field=name) from error


def _model_terms(digest: str, card: Card | None) -> dict[str, Any]:
    if card is None:
        return {"digest": digest, "owner": NO_OWNER, "input": 0, "output": 0, "datasets": []}
    return {
        "digest": digest,
        "owner": card.owner,
        "input": card.prices.input,
        "output": card.prices.output,
        "datasets": [_dataset_terms(dataset) for dataset in card.datasets],
    }


def _dataset_terms(dataset: DatasetShare) -> dict[str, Any]:
    return {
        "id": dataset.id,
        "digest": dataset.digest,
        "licence": dataset.licence,
        "ppm": dataset.share_ppm,
        "contributors": [{"address": who.address, "ppm": who.share_ppm} for who in dataset.contributors],
    }
