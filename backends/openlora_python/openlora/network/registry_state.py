"""What the registry says at a block: models, terms and parameters in force. docs/settlement.md, 2."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..attribution.settlement.facts import BlockHeader, ChainEvent
from ..errors import InvalidArgument
from ..strict_json import parse_strict
from .parameters import parse_parameters

REGISTRY = "AdapterRegistry"


@dataclass(frozen=True)
class Version:
    """One published version of terms or parameters."""

    digest: bytes  # of the tagged document
    document: str
    effective_at: int  # seconds since 1970


@dataclass(frozen=True)
class ModelInForce:
    """A model that may be used and paid at a block."""

    owner: str  # checksummed address
    digest: bytes
    base: bytes  # zeros: a base model
    name: str
    uri: str
    terms: Version
    access: str | None  # the document of the newest AccessChanged


@dataclass(frozen=True)
class RegistryView:
    """The registry at one block. `parameters` None: none are in force. Models in the order of their registration."""

    block: BlockHeader
    parameters: Version | None
    models: tuple[ModelInForce, ...]


@dataclass
class _Model:
    base: bytes
    name: str
    uri: str
    terms: list[Version] = field(default_factory=list)
    access: str | None = None
    revoked: bool = False


def registry_view(events: Iterable[ChainEvent], block: BlockHeader) -> RegistryView:
    """The state at `block` by all events up to it, which come in the chain's order."""
    models: dict[tuple[str, bytes], _Model] = {}
    parameters: list[Version] = []
    for event in events:
        if event.contract != REGISTRY or event.block > block.number:
            continue
        args = event.args
        if event.name == "ParametersPublished":
            parameters.append(Version(args["digest"], args["document"], args["effectiveAt"]))
            continue
        key = (args["owner"], args["digest"])
        if event.name == "ModelRegistered":
            models[key] = _Model(args["base"], args["name"], args["uri"])
        elif event.name == "TermsPublished":
            models[key].terms.append(Version(args["termsHash"], args["document"], args["effectiveAt"]))
        elif event.name == "AccessChanged":
            models[key].access = args["document"]
        elif event.name == "ModelRevoked":
            models[key].revoked = True
    in_force = []
    for (owner, digest), model in models.items():
        terms = _in_force(model.terms, block.timestamp)
        if terms is not None and not model.revoked:
            in_force.append(ModelInForce(owner, digest, model.base, model.name, model.uri, terms, model.access))
    return RegistryView(block, _usable(_in_force(parameters, block.timestamp)), tuple(in_force))


def _in_force(versions: list[Version], timestamp: int) -> Version | None:
    return next((one for one in reversed(versions) if one.effective_at <= timestamp), None)


def _usable(parameters: Version | None) -> Version | None:
    """Parameters that are not exactly of their form are in force for nobody."""
    if parameters is None:
        return None
    try:
        parsed = parse_parameters(decoded(parameters.document))
    except InvalidArgument:
        return None
    return parameters if parsed.document == parameters.document else None


def decoded(document: str) -> Any:
    """A document's JSON; InvalidArgument: it is none."""
    try:
        tree = parse_strict(document)
        json.dumps(tree, ensure_ascii=False).encode()  # no lone surrogates: see `EventDecoder`, and JSON can spell them
        return tree
    except ValueError as error:
        raise InvalidArgument(f"not JSON: {error}", field="document") from error
