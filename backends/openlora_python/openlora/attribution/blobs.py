"""The three blobs beside a receipt: runtime, adapters and terms. Their schemas, how to make them, and the price.

Blobs are plain JSON objects without floats and with integers below 2^53, so that RFC 8785 has one form for each. Prices
are larger than that, so since price version 2 they are decimal strings; receipts with version 1 stay valid.
The schemas are checked before a blob is journalled and again by every verifier; unknown keys are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from ..errors import InvalidArgument
from .commitments import MODEL_TERMS_TAG, blob_bytes

if TYPE_CHECKING:
    from ..engine.api import AdapterUse, EngineInfo
    from .card import Card, DatasetShare

NO_OWNER = "0x" + "0" * 40
"""Who owns a model that has no card."""

PRICE_UNIT = 1_000_000
"""Prices are per this many tokens."""

MAX_PRICE = 10**30
"""The highest price of 10^6 tokens, in the smallest unit of the token."""

WHOLE_PPM = 1_000_000

NO_PARAMETERS = "0" * 64
"""The parameters digest of terms that no published parameters are in force for: such a receipt cannot be settled."""

Digest = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Address = Annotated[str, Meta(pattern=r"\A0x[0-9a-fA-F]{40}\Z")]
Amount = Annotated[int, Meta(ge=0, lt=2**53)]  # price version 1
DecimalAmount = Annotated[str, Meta(pattern=r"\A(?:0|[1-9][0-9]{0,30})\Z")]  # price version 2
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

    def __post_init__(self) -> None:
        _require_whole(f"the contributors of {self.id!r}", [who.ppm for who in self.contributors])


class ModelTerms(_Blob):
    """Whom one model pays: `input` and `output` are token units for 10^6 tokens, as the price version writes them."""

    digest: Digest
    owner: Address
    input: Amount | DecimalAmount
    output: Amount | DecimalAmount
    datasets: list[DatasetTerms]

    def __post_init__(self) -> None:
        if self.datasets:
            _require_whole(f"the data sets of {self.digest}", [dataset.ppm for dataset in self.datasets])

    @property
    def prices(self) -> tuple[int, int]:
        """Of 10^6 input and output tokens."""
        return int(self.input), int(self.output)


class TermsBlob(_Blob):
    """What was agreed when the request was served."""

    price_version: Literal[1, 2]
    parameters: Digest
    base: ModelTerms
    adapters: list[ModelTerms]

    def __post_init__(self) -> None:
        form = {1: int, 2: str}[self.price_version]
        for model in (self.base, *self.adapters):
            for amount in (model.input, model.output):
                if type(amount) is not form:
                    raise ValueError(f"price {amount!r} is not as price version {self.price_version} writes it")
                if int(amount) > MAX_PRICE:
                    raise ValueError(f"price {amount} is over 10^30")


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
        "price_version": 2,
        "parameters": parameters,
        "base": model_terms(*base),
        "adapters": [model_terms(digest, card) for digest, card in adapters],
    }


def model_terms(digest: str, card: Card | None) -> dict[str, Any]:
    """One model's part of a terms blob of price version 2, from its manifest digest and card."""
    if card is None:
        return {"digest": digest, "owner": NO_OWNER, "input": "0", "output": "0", "datasets": []}
    return {
        "digest": digest,
        "owner": card.owner,
        "input": str(card.prices.input),
        "output": str(card.prices.output),
        "datasets": [_dataset_terms(dataset) for dataset in card.datasets],
    }


def model_terms_document(model: Mapping[str, Any]) -> bytes:
    """The terms of a model as they are published in the registry: RFC 8785, prices as decimal strings.

    `model` is a model of a terms blob of either price version.
    """
    decimal = {**model, "input": str(model["input"]), "output": str(model["output"])}
    return blob_bytes(MODEL_TERMS_TAG, decimal).removeprefix(MODEL_TERMS_TAG)


def model_terms_hash(model: Mapping[str, Any]) -> bytes:
    """SHA-256(tag ‖ `model_terms_document`), 32 bytes: the registry's `termsHash`, whatever the price version."""
    return hashlib.sha256(MODEL_TERMS_TAG + model_terms_document(model)).digest()


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
    prices = [model.prices for model in (terms.base, *terms.adapters)]
    return sum((in_tokens * per_input + out_tokens * per_output) // PRICE_UNIT for per_input, per_output in prices)


def _convert(name: str, blob: Any, kind: type[_Kind]) -> _Kind:
    try:
        return msgspec.convert(blob, kind, strict=True)
    except msgspec.ValidationError as error:
        raise InvalidArgument(str(error), field=name) from error


def _require_whole(what: str, shares: Sequence[int]) -> None:
    if sum(shares) != WHOLE_PPM:
        raise ValueError(f"{what} add up to {sum(shares)} ppm, not {WHOLE_PPM}")


def _dataset_terms(dataset: DatasetShare) -> dict[str, Any]:
    return {
        "id": dataset.id,
        "digest": dataset.digest,
        "licence": dataset.licence,
        "ppm": dataset.share_ppm,
        "contributors": [{"address": who.address, "ppm": who.share_ppm} for who in dataset.contributors],
    }
