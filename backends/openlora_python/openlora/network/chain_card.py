"""A model's card from what its owner published on the chain."""

from __future__ import annotations

from typing import Any

import msgspec

from ..attribution.blobs import Address, Digest, model_terms, model_terms_document
from ..attribution.card import parse_card
from ..errors import InvalidArgument
from .registry_state import ModelInForce, decoded

LICENCE = "see the model's source"  # the chain has no licence of models, and a card needs one


class _Terms(msgspec.Struct, forbid_unknown_fields=True):
    """The outline; the card's own rules check the rest."""

    digest: Digest
    owner: Address
    input: str
    output: str
    datasets: list[dict[str, Any]]


def chain_card(model: ModelInForce) -> dict[str, Any]:
    """The card that a model is served with: its terms in force and its access.

    InvalidArgument: the terms are not those of this model, or no card gives exactly this document, so that a receipt
    could not name them.
    """
    try:
        terms = msgspec.convert(decoded(model.terms.document), _Terms)
        card = {
            "schema": 1,
            "owner": terms.owner,
            "licence": LICENCE,
            "prices": {"version": 1, "input": terms.input, "output": terms.output},
            "datasets": [_dataset(one) for one in terms.datasets],
        }
    except (msgspec.ValidationError, KeyError, TypeError, AttributeError) as error:
        raise InvalidArgument(f"not of the form that is served: {error}", field="terms") from error
    if (terms.digest, terms.owner) != (model.digest.hex(), model.owner):
        raise InvalidArgument(f"they are of {terms.digest} of {terms.owner}, which is another model", field="terms")
    if model.access is not None:
        card["access"] = decoded(model.access)
    parsed = parse_card(card)
    served = model_terms_document(model_terms(terms.digest, parsed)).decode()
    if served != model.terms.document:
        raise InvalidArgument("not canonical: what is served would have another hash", field="terms")
    return card


def _dataset(tree: dict[str, Any]) -> dict[str, Any]:
    contributors = [
        {"name": one["address"], "address": one["address"], "share_ppm": one["ppm"]} for one in tree["contributors"]
    ]
    return {
        "id": tree["id"],
        "digest": tree["digest"],
        "licence": tree["licence"],
        "share_ppm": tree["ppm"],
        "contributors": contributors,
    }
