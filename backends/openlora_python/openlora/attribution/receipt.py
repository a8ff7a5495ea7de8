"""The receipt, schema 0x0101: its leaf, its hash, its signature, and how it follows from the journal.

    Receipt(uint16 schema, bytes32 logId, uint64 seq, bytes32 requestId, uint8 status, bytes32 baseModel,
            bytes32 runtimeHash, bytes32 adaptersHash, bytes32 termsHash, bytes32 registryRef, bytes32 promptCommit,
            bytes32 outputCommit, uint32 inTokens, uint32 outTokens, uint64 startedAt, uint64 endedAt, uint128 price,
            bytes32 paymentRef, bytes32 computeProof)

The leaf is the ABI encoding of this all-static struct: 19 words of 32 bytes. The signature is over the EIP-712 digest
in the domain {name "OpenLoRA Receipt", version "1", salt = logId}. Because EIP-712 encodes atomic members exactly as
the ABI does, hashStruct is keccak256(typeHash ‖ leaf), and no second encoder is needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from operator import attrgetter

from coincurve import PrivateKey
from eth_keys import KeyAPI
from eth_keys.exceptions import BadSignature, ValidationError

from ..errors import InvalidArgument
from .blobs import TermsBlob, check_blobs, price
from .commitments import ADAPTERS_TAG, RUNTIME_TAG, TERMS_TAG, blob_bytes
from .frames import STATUS_ABORTED, STATUS_CANCELLED, STATUS_COMPLETE, CompletionFrame, IntentFrame
from .keccak import keccak

RECEIPT_SCHEMA = 0x0101
RECEIPT_TYPE = (
    "Receipt(uint16 schema,bytes32 logId,uint64 seq,bytes32 requestId,uint8 status,bytes32 baseModel,"
    "bytes32 runtimeHash,bytes32 adaptersHash,bytes32 termsHash,bytes32 registryRef,bytes32 promptCommit,"
    "bytes32 outputCommit,uint32 inTokens,uint32 outTokens,uint64 startedAt,uint64 endedAt,uint128 price,"
    "bytes32 paymentRef,bytes32 computeProof)"
)
DOMAIN_TYPE = "EIP712Domain(string name,string version,bytes32 salt)"
DOMAIN_NAME = "OpenLoRA Receipt"
DOMAIN_VERSION = "1"

ZERO32 = bytes(32)
LEAF_BYTES = 19 * 32

_CURVE_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
_BITS = {"seq": 64, "status": 8, "in_tokens": 32, "out_tokens": 32, "started_at": 64, "ended_at": 64, "price": 128}


@dataclass(frozen=True)
class Receipt:
    """The fields in the order of the schema, without its constant first word.

    InvalidArgument: a value is not exactly of its type, length or range. Encoders elsewhere pad short bytes and take
    strings for numbers; nothing is coerced here.
    """

    log_id: bytes
    seq: int
    request_id: bytes
    status: int
    base_model: bytes
    runtime_hash: bytes
    adapters_hash: bytes
    terms_hash: bytes
    registry_ref: bytes
    prompt_commit: bytes
    output_commit: bytes
    in_tokens: int
    out_tokens: int
    started_at: int  # whole seconds since 1970
    ended_at: int
    price: int
    payment_ref: bytes
    compute_proof: bytes

    @property
    def blob_hashes(self) -> tuple[bytes, ...]:
        """The hashes of the blobs beside the receipt: runtime, adapters, terms, and the registry reference if any."""
        hashes = (self.runtime_hash, self.adapters_hash, self.terms_hash)
        return hashes if self.registry_ref == ZERO32 else (*hashes, self.registry_ref)

    def __post_init__(self) -> None:
        for (name, bits), value in zip(_WIDTHS, _values(self), strict=True):
            if bits is None:
                if type(value) is not bytes or len(value) != 32:
                    raise InvalidArgument(f"{value!r} is not 32 bytes", field=name)
            elif type(value) is not int or value < 0 or value.bit_length() > bits:
                raise InvalidArgument(f"{value!r} is not an unsigned integer of {bits} bits", field=name)
        if not STATUS_COMPLETE <= self.status <= STATUS_ABORTED:
            raise InvalidArgument(f"{self.status} is not one of 1, 2, 3, 4", field="status")


def encode_leaf(receipt: Receipt) -> bytes:
    """The 608 bytes that are hashed into the tree and signed."""
    words = [value if type(value) is bytes else value.to_bytes(32, "big") for value in _values(receipt)]
    return _SCHEMA_WORD + b"".join(words)


def decode_leaf(leaf: bytes) -> Receipt:
    """The receipt of a leaf; InvalidArgument if no receipt encodes to exactly these bytes."""
    if len(leaf) != LEAF_BYTES:
        raise InvalidArgument(f"a receipt's leaf has {LEAF_BYTES} bytes, not {len(leaf)}", field="leaf")
    schema, *words = (leaf[place : place + 32] for place in range(0, LEAF_BYTES, 32))
    if schema != _SCHEMA_WORD:
        raise InvalidArgument(f"the leaf has schema 0x{int.from_bytes(schema, 'big'):04x}, not 0x0101", field="schema")
    named = zip(_FIELD_NAMES, words, strict=True)
    return Receipt(**{name: int.from_bytes(word, "big") if name in _BITS else word for name, word in named})


def leaf_hash(leaf: bytes) -> bytes:
    """RFC 6962: SHA-256(0x00 ‖ leaf)."""
    return hashlib.sha256(b"\0" + leaf).digest()


def domain_separator(log_id: bytes) -> bytes:
    """EIP-712 hashStruct of the domain, 32 bytes; the same for all receipts of a log."""
    parts = (DOMAIN_TYPE.encode(), DOMAIN_NAME.encode(), DOMAIN_VERSION.encode())
    return keccak(b"".join([keccak(part) for part in parts]) + log_id)


class ReceiptHasher:
    """EIP-712 digests of one log's receipts, with the constant parts hashed once."""

    def __init__(self, log_id: bytes) -> None:
        self._prefix = b"\x19\x01" + domain_separator(log_id)
        self._type_hash = keccak(RECEIPT_TYPE.encode())

    def digest(self, leaf: bytes) -> bytes:
        """keccak256(0x1901 ‖ domain separator ‖ keccak256(type hash ‖ leaf)), 32 bytes."""
        return keccak(self._prefix + keccak(self._type_hash + leaf))


def sign_digest(key: PrivateKey, digest: bytes) -> bytes:
    """r ‖ s ‖ v (27 or 28), 65 bytes: deterministic (RFC 6979) and with the lower s, both by libsecp256k1."""
    signature = key.sign_recoverable(digest, hasher=None)
    return signature[:64] + bytes((signature[64] + 27,))


def recover_signer(digest: bytes, signature: bytes) -> str:
    """The checksummed address that made a signature. InvalidArgument: not the one form that `sign_digest` makes."""
    if len(signature) != 65 or signature[64] not in (27, 28):
        raise InvalidArgument("a signature is 64 bytes and then 27 or 28", field="signature")
    if int.from_bytes(signature[32:64], "big") > _CURVE_ORDER // 2:
        raise InvalidArgument("the signature has the higher s of two", field="signature")
    curve = KeyAPI()
    try:
        made = curve.Signature(signature[:64] + bytes((signature[64] - 27,)))
        return made.recover_public_key_from_msg_hash(digest).to_checksum_address()
    except (BadSignature, ValidationError) as error:
        raise InvalidArgument(f"the signature fits no key: {error}", field="signature") from error


@dataclass(frozen=True)
class HashedBlobs:
    """What is beside the receipts of requests with the same blobs."""

    terms: TermsBlob
    contents: tuple[bytes, ...]  # in the order of `Receipt.blob_hashes`
    hashes: tuple[bytes, ...]  # SHA-256 of each


def hashed_blobs(intent: IntentFrame) -> HashedBlobs:
    """Check, encode and hash the blobs of a request. InvalidArgument: no receipt can follow from them."""
    terms = check_blobs(intent.base_digest, intent.runtime, intent.adapters, intent.terms)
    contents = (
        blob_bytes(RUNTIME_TAG, intent.runtime),
        blob_bytes(ADAPTERS_TAG, intent.adapters),
        blob_bytes(TERMS_TAG, intent.terms),
        *([intent.registry] if intent.registry else []),
    )
    return HashedBlobs(terms, contents, tuple(hashlib.sha256(content).digest() for content in contents))


@dataclass(frozen=True)
class UnsignedReceipt:
    """A receipt and the blobs that it hashes; SHA-256 of a blob's bytes is the hash in the receipt."""

    receipt: Receipt
    leaf: bytes
    blobs: tuple[bytes, ...]  # in the order of `Receipt.blob_hashes`


def receipt_from_frames(
    intent: IntentFrame,
    completion: CompletionFrame,
    log_id: bytes,
    blobs_of: Callable[[IntentFrame], HashedBlobs] = hashed_blobs,
) -> UnsignedReceipt:
    """The receipt of a journalled request: a pure function, so that recovery gives the same bytes.

    `blobs_of` stands for `hashed_blobs` and may remember its results.
    """
    blobs = blobs_of(intent)
    runtime_hash, adapters_hash, terms_hash, *registry = blobs.hashes
    receipt = Receipt(
        log_id=log_id,
        seq=completion.seq,
        request_id=bytes.fromhex(intent.request_id),
        status=completion.status,
        base_model=bytes.fromhex(intent.base_digest),
        runtime_hash=runtime_hash,
        adapters_hash=adapters_hash,
        terms_hash=terms_hash,
        registry_ref=registry[0] if registry else ZERO32,
        prompt_commit=intent.prompt_commit,
        output_commit=completion.output_commit,
        in_tokens=intent.in_tokens,
        out_tokens=completion.out_tokens,
        started_at=intent.started_at,
        ended_at=completion.ended_at,
        price=receipt_price(completion.status, blobs.terms, intent.in_tokens, completion.out_tokens),
        payment_ref=ZERO32,
        compute_proof=ZERO32,
    )
    return UnsignedReceipt(receipt, encode_leaf(receipt), blobs.contents)


def receipt_price(status: int, terms: TermsBlob, in_tokens: int, out_tokens: int) -> int:
    """The price by the terms; nothing for errors and for what a crash cut short."""
    return price(terms, in_tokens, out_tokens) if status in (STATUS_COMPLETE, STATUS_CANCELLED) else 0


_FIELD_NAMES = tuple(field.name for field in fields(Receipt))
_WIDTHS = tuple((name, _BITS.get(name)) for name in _FIELD_NAMES)
_SCHEMA_WORD = RECEIPT_SCHEMA.to_bytes(32, "big")
_values = attrgetter(*_FIELD_NAMES)
