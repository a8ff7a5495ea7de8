"""What the registry has in force at a block, as docs/settlement.md, 2 defines it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...errors import InvalidArgument
from ...network.parameters import Parameters, parse_parameters
from ...network.registry_state import decoded
from .facts import BlockHeader, ChainFacts


@dataclass(frozen=True)
class TermsInForce:
    """Of a model: the hash of its terms, and the base that it was registered for (zeros: it is one)."""

    terms_hash: bytes
    base: bytes


@dataclass(frozen=True)
class ParametersInForce:
    digest: bytes
    parameters: Parameters


@dataclass(frozen=True)
class _Version:
    block: int
    effective_at: int
    digest: bytes


@dataclass
class _Model:
    block: int
    base: bytes
    terms: list[_Version] = field(default_factory=list)
    revoked: int | None = None  # the block


class Registry:
    """The registry's history; questions take a block's header."""

    def __init__(self, facts: ChainFacts) -> None:
        self._models: dict[tuple[bytes, bytes], _Model] = {}
        self._parameters: list[_Version] = []
        self._documents: dict[bytes, str] = {}
        for event in facts.of("AdapterRegistry"):
            args = event.args
            if event.name == "ParametersPublished":
                self._parameters.append(_Version(event.block, args["effectiveAt"], args["digest"]))
                self._documents[args["digest"]] = args["document"]
            elif event.name == "ModelRegistered":
                self._models[account(args["owner"]), args["digest"]] = _Model(event.block, args["base"])
            elif event.name == "TermsPublished":
                version = _Version(event.block, args["effectiveAt"], args["termsHash"])
                self._models[account(args["owner"]), args["digest"]].terms.append(version)
            elif event.name == "ModelRevoked":
                model = self._models[account(args["owner"]), args["digest"]]
                if model.revoked is None:
                    model.revoked = event.block

    def terms(self, owner: bytes, digest: bytes, block: BlockHeader) -> TermsInForce | None:
        """Of the model that `owner` (20 bytes) registered under a manifest digest; None: it is not in force."""
        model = self._models.get((owner, digest))
        if model is None or model.block > block.number:
            return None
        if model.revoked is not None and model.revoked <= block.number:
            return None
        version = _in_force(model.terms, block)
        return None if version is None else TermsInForce(version.digest, model.base)

    def parameters(self, block: BlockHeader) -> ParametersInForce | None:
        """None: none are, or the version that would be is not a parameters document."""
        version = _in_force(self._parameters, block)
        if version is None:
            return None
        document = self._documents[version.digest]
        try:
            parameters = parse_parameters(decoded(document))
        except InvalidArgument:
            return None
        return ParametersInForce(version.digest, parameters) if parameters.document == document else None


def account(address: str) -> bytes:
    """The 20 bytes of an address, whatever its letters' case."""
    return bytes.fromhex(address[2:])


def _in_force(versions: list[_Version], block: BlockHeader) -> _Version | None:
    for version in reversed(versions):
        if version.block <= block.number and version.effective_at <= block.timestamp:
            return version
    return None
