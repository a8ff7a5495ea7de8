"""What owners and operators register: models with their terms, logs with their signer's word."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rfc8785
from coincurve import PrivateKey
from eth_abi import encode as abi_encode
from eth_hash.auto import keccak
from pydantic import ValidationError

from ..access_rule import AccessRule
from ..adapters.catalog_file import CATALOG_FILE
from ..adapters.catalog_reader import CatalogReader
from ..adapters.lora_config import parse_object
from ..adapters.manifest import CARD_FILE, CONFIG_FILE, adapter_manifest, model_manifest
from ..adapters.store import MAX_CARD_BYTES
from ..attribution.blobs import model_terms, model_terms_document
from ..attribution.card import Card, parse_card
from ..attribution.log_key import LogKey
from ..attribution.receipt import sign_digest
from ..errors import InvalidArgument
from ..strict_json import parse_strict

if TYPE_CHECKING:
    from ..validation import first_fault
from .deployment import Deployment

HASH_CACHE_FILE = "digests.json"
DOMAIN_TYPE = "EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"
REGISTRATION_TYPE = "Registration(bytes32 logId,address owner,address submitter,address payee)"


@dataclass(frozen=True)
class LocalModel:
    """A model of this machine as it can be registered. `base` None: it is a base model, or its base is not known."""

    name: str
    digest: bytes
    base: bytes | None
    is_adapter: bool
    card: Card
    source: str  # where the catalog had it from; empty for a directory

    def terms(self, owner: str) -> str:
        """The terms document. InvalidArgument: the card is somebody else's."""
        if self.card.owner != owner:
            raise InvalidArgument(
                f"the card says that {self.card.owner} owns it, the key is that of {owner}: nobody could be paid",
                field="key",
            )
        return model_terms_document(model_terms(self.digest.hex(), self.card)).decode()

    @property
    def access(self) -> str | None:
        """The access document; None = open to all."""
        return None if self.card.access is None else access_document(self.card.access)


def local_model(what: str, card_file: Path | None, state_dir: Path) -> LocalModel:
    """The model in a directory, or of that name in the catalog of `state_dir`; `card_file` wins over its own card.

    Raises:
        InvalidArgument: it has no card, or a bad one.
        AdapterNotFound, AdapterInvalid: as the catalog and the manifests say.
    """
    given = None if card_file is None else parse_object(card_file.read_bytes(), str(card_file), MAX_CARD_BYTES)
    directory = Path(what)
    if not directory.is_dir():
        with CatalogReader(state_dir / CATALOG_FILE) as reader:
            record = reader.lookup(what)
        card = _card(given or record.card, what)
        digest, base = bytes.fromhex(record.digest), bytes.fromhex(record.base)
        return LocalModel(record.name, digest, base, True, card, record.source)
    own = directory / CARD_FILE
    tree = given or (parse_object(own.read_bytes(), CARD_FILE, MAX_CARD_BYTES) if own.is_file() else None)
    card = _card(tree, what)
    name = directory.resolve().name
    if (directory / CONFIG_FILE).is_file():
        base = None if card.base is None else bytes.fromhex(card.base)
        return LocalModel(name, bytes.fromhex(adapter_manifest(directory).digest), base, True, card, "")
    digest = model_manifest(directory, state_dir / HASH_CACHE_FILE).digest
    return LocalModel(name, bytes.fromhex(digest), None, False, card, "")


def access_document(rule: AccessRule) -> str:
    return rfc8785.dumps(rule.model_dump(mode="json", exclude_defaults=True)).decode()


def parse_access(tree: Any) -> AccessRule:
    """InvalidArgument: it is no access rule."""
    try:
        return AccessRule.model_validate(tree)
    except ValidationError as error:
        place, words = first_fault(error, "access")
        raise InvalidArgument(words, field=place) from error


def registration_signature(
    deployment: Deployment, signer: PrivateKey, key: LogKey, owner: str, submitter: str, payee: str
) -> bytes:
    """The receipt signer's word that these three are its log's: EIP-712, 65 bytes."""
    place = deployment.contracts.AttributionLog.address
    names = [keccak(text.encode()) for text in (DOMAIN_TYPE, "OpenLoRA Log", "1")]
    domain = keccak(b"".join(names) + abi_encode(["uint256", "address"], [deployment.chain_id, place]))
    words = abi_encode(["bytes32", "address", "address", "address"], [key.log_id, owner, submitter, payee])
    return sign_digest(signer, keccak(b"\x19\x01" + domain + keccak(keccak(REGISTRATION_TYPE.encode()) + words)))


def read_json(path: Path) -> Any:
    """InvalidArgument: it can't be read, or is no JSON."""
    try:
        return parse_strict(path.read_bytes())
    except OSError as error:
        raise InvalidArgument(f"can't read {path}: {error.strerror}", field="FILE") from error
    except ValueError as error:
        raise InvalidArgument(f"{path} is not JSON: {error}", field="FILE") from error


def _card(tree: dict[str, Any] | None, what: str) -> Card:
    if tree is None:
        raise InvalidArgument(f"{what} has no card (openlora.json), so nobody knows whom to pay: give --card FILE")
    return parse_card(tree)
