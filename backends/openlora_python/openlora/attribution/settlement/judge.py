"""Each receipt of a log: paid, or void for the first reason that applies. docs/settlement.md, 3."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from coincurve import PublicKey
from eth_hash.auto import keccak

from ...errors import Internal, InvalidArgument, ReceiptInvalid
from ..blobs import TermsBlob, check_blobs, model_terms_hash, price
from ..commitments import ADAPTERS_TAG, RUNTIME_TAG, TERMS_TAG, blob_bytes
from ..frames import STATUS_CANCELLED, STATUS_COMPLETE
from ..log_key import LogKey
from ..receipt import Receipt, ReceiptHasher, decode_leaf
from ..receipt_json import parse_receipt_document
from .chain_state import ZERO32, Anchor, LogState
from .facts import BlockHeader, ChainFacts
from .registry import Registry, account
from .shares import Shares, shares

REASONS = (
    "leaf",
    "log_id",
    "sequence",
    "repeated_request",
    "signature",
    "status",
    "unregistered",
    "blob_missing",
    "blob_invalid",
    "registry_foreign",
    "registry_block",
    "parameters",
    "registry_age",
    "terms",
    "price",
)

_HALF_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141 // 2
_REMEMBERED = 100_000  # contexts: few hundred bytes each, and far fewer where traffic is of one kind
_PREIMAGE_BYTES = 128

Headers = Callable[[int], BlockHeader]
"""The chain's header of a block up to the facts' head."""


class Export(Protocol):
    """What settlement reads of a log's export (docs/settlement.md, 1)."""

    key: LogKey
    size: int

    def leaves(self, start: int, stop: int) -> Iterable[bytes]: ...

    def signature(self, index: int) -> bytes | None: ...

    def blob(self, sha256: bytes) -> bytes | None: ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """`reason` None: `price` is paid by `shares` (a place in `LogJudge.shares`). Otherwise void: nobody is paid."""

    reason: str | None
    price: int
    shares: int = -1
    request_id: bytes | None = None  # of a leaf that passed the first two reasons


@dataclass(frozen=True)
class _Content:
    """What the blobs of a receipt say, read once for all receipts that have them."""

    terms: TermsBlob
    weights: tuple[int, ...]
    hashes: tuple[bytes, ...]  # of the terms of the base and of each adapter


@dataclass
class _Context:
    """All that many receipts share: blobs and registry block. What depends on the block is found when it is needed."""

    reason: str | None  # 8 to 10
    content: _Content | None = None
    block_number: int = 0
    block_hash: bytes = b""
    timestamp: int | None = None  # None: the block was not looked at yet
    canonical: bool = False
    max_age: int | None = None  # None: the terms' parameters are not those in force
    terms_in_force: bool = False
    shares: int = -1


class LogJudge:
    """Judges the leaves of one log in order, from leaf 0 or behind a prefix whose request ids are given."""

    def __init__(
        self,
        export: Export,
        log: LogState,
        facts: ChainFacts,
        registry: Registry,
        headers: Headers,
        seen: set[bytes] | None = None,
    ) -> None:
        self._export = export
        self._log = log
        self._facts = facts
        self._registry = registry
        self._headers = headers
        self._seen = seen if seen is not None else set()
        self._hasher = ReceiptHasher(log.log_id)
        self._signer = _Signer(export.key.signer)
        self._contents: dict[tuple[bytes, ...], _Content | str] = {}
        self._contexts: dict[tuple[bytes, ...], _Context] = {}
        self._share_numbers: dict[tuple[tuple[bytes, ...], bytes], int] = {}
        self.shares: list[Shares] = []
        if export.key.log_id != log.log_id:
            raise Internal(f"the export is of log {export.key.log_id.hex()}, not of {log.log_id.hex()}")

    def judge(self, start: int, stop: int) -> Iterator[Verdict]:
        """The verdicts on leaves [start, stop), all of them below an anchor that is good."""
        for index, leaf in enumerate(self._export.leaves(start, stop), start):
            anchor = self._log.first_covering(index)
            if anchor is None:
                raise Internal(f"leaf {index} of log {self._log.log_id.hex()} is not anchored")
            yield self._verdict(index, leaf, anchor)

    def _verdict(self, index: int, leaf: bytes, anchor: Anchor) -> Verdict:
        try:
            receipt = decode_leaf(leaf)
        except InvalidArgument:
            return Verdict("leaf", 0)
        if receipt.log_id != self._log.log_id:
            return Verdict("log_id", receipt.price)
        repeated = receipt.request_id in self._seen
        self._seen.add(receipt.request_id)
        reason, number = self._rest(index, receipt, leaf, anchor, repeated)
        return Verdict(reason, receipt.price, number, receipt.request_id)

    def _rest(
        self, index: int, receipt: Receipt, leaf: bytes, anchor: Anchor, repeated: bool
    ) -> tuple[str | None, int]:
        """The first reason from the third on, and the shares where there is none."""
        if receipt.seq != index:
            return "sequence", -1
        if repeated:
            return "repeated_request", -1
        if not self._signer.made(self._export.signature(index), self._hasher.digest(leaf)):
            return "signature", -1
        if receipt.status not in (STATUS_COMPLETE, STATUS_CANCELLED):
            return "status", -1
        if receipt.registry_ref == ZERO32:
            return "unregistered", -1
        context = self._context(receipt)
        if context.reason is not None:
            return context.reason, -1
        if context.block_number >= anchor.block:
            return "registry_block", -1
        if context.timestamp is None:
            self._look_at_block(context, receipt)
        if not context.canonical:
            return "registry_block", -1
        if context.max_age is None:
            return "parameters", -1
        if self._facts.header(anchor.block).timestamp - context.timestamp > context.max_age:
            return "registry_age", -1
        if not context.terms_in_force:
            return "terms", -1
        if receipt.price != price(context.content.terms, receipt.in_tokens, receipt.out_tokens):
            return "price", -1
        return None, context.shares

    def _context(self, receipt: Receipt) -> _Context:
        key = (*_content_key(receipt), receipt.registry_ref)
        known = self._contexts.get(key)
        if known is None:
            if len(self._contexts) >= _REMEMBERED:
                self._contexts.clear()
                self._contents.clear()
            known = self._contexts[key] = self._read_context(receipt)
        return known

    def _read_context(self, receipt: Receipt) -> _Context:
        preimage = self._blob(receipt.registry_ref)
        content = self._content(receipt)
        if preimage is None or content == "blob_missing":
            return _Context("blob_missing")
        if isinstance(content, str) or len(preimage) != _PREIMAGE_BYTES:
            return _Context("blob_invalid")
        chain_id, registry, block_number = (int.from_bytes(preimage[at : at + 32], "big") for at in (0, 32, 64))
        if registry >> 160:
            return _Context("blob_invalid")
        if chain_id != self._facts.chain_id or registry != int(self._facts.registry, 16):
            return _Context("registry_foreign")
        return _Context(None, content, block_number, preimage[96:])

    def _content(self, receipt: Receipt) -> _Content | str:
        key = _content_key(receipt)
        known = self._contents.get(key)
        if known is None:
            known = self._contents[key] = self._read_content(receipt)
        return known

    def _read_content(self, receipt: Receipt) -> _Content | str:
        hashes = (receipt.runtime_hash, receipt.adapters_hash, receipt.terms_hash)
        blobs = [self._blob(one) for one in hashes]
        if None in blobs:
            return "blob_missing"
        try:
            trees = [_tree(tag, blob) for tag, blob in zip((RUNTIME_TAG, ADAPTERS_TAG, TERMS_TAG), blobs, strict=True)]
            terms = check_blobs(receipt.base_model.hex(), *trees)
        except InvalidArgument:
            return "blob_invalid"
        models = (terms.base, *terms.adapters)
        if len({model.digest for model in models}) != len(models):
            return "blob_invalid"
        weights = tuple(adapter["weight"] for adapter in trees[1]["adapters"])
        return _Content(terms, weights, tuple(model_terms_hash(msgspec.to_builtins(model)) for model in models))

    def _blob(self, sha256: bytes) -> bytes | None:
        """Checked again: whoever makes an export may name a file as he likes."""
        blob = self._export.blob(sha256)
        return blob if blob is not None and hashlib.sha256(blob).digest() == sha256 else None

    def _look_at_block(self, context: _Context, receipt: Receipt) -> None:
        """Fill in all that follows from the chain's block of the context's number."""
        header = self._headers(context.block_number)
        context.timestamp = header.timestamp
        context.canonical = header.hash == context.block_hash
        in_force = self._registry.parameters(header) if context.canonical else None
        if in_force is None or in_force.digest.hex() != context.content.terms.parameters:
            return
        context.max_age = in_force.parameters.max_age
        context.terms_in_force = self._are_in_force(context.content, header)
        key = (_content_key(receipt), in_force.digest)
        if context.terms_in_force and key not in self._share_numbers:
            self._share_numbers[key] = len(self.shares)
            content = context.content
            self.shares.append(shares(content.terms, content.weights, in_force.parameters, self._log.payee))
        context.shares = self._share_numbers.get(key, -1)

    def _are_in_force(self, content: _Content, block: BlockHeader) -> bool:
        base = bytes.fromhex(content.terms.base.digest)
        models = (content.terms.base, *content.terms.adapters)
        for place, (model, terms_hash) in enumerate(zip(models, content.hashes, strict=True)):
            found = self._registry.terms(account(model.owner), bytes.fromhex(model.digest), block)
            if found is None or found.terms_hash != terms_hash or found.base != (base if place else ZERO32):
                return False
        return True


class _Signer:
    """Compares recovered public keys; the address is hashed from the first that fits alone."""

    def __init__(self, address: str) -> None:
        self._address = account(address)
        self._key: bytes | None = None

    def made(self, signature: bytes | None, digest: bytes) -> bool:
        if signature is None or len(signature) != 65 or signature[64] not in (27, 28):
            return False
        if int.from_bytes(signature[32:64], "big") > _HALF_ORDER:
            return False
        recoverable = signature[:64] + bytes((signature[64] - 27,))
        try:
            key = PublicKey.from_signature_and_message(recoverable, digest, hasher=None)
        except Exception:  # libsecp256k1's one answer to all that is no signature, as coincurve passes it on
            return False
        found = key.format()
        if self._key is None and keccak(key.format(compressed=False)[1:])[12:] == self._address:
            self._key = found
        return found == self._key


def _content_key(receipt: Receipt) -> tuple[bytes, ...]:
    return receipt.base_model, receipt.runtime_hash, receipt.adapters_hash, receipt.terms_hash


def _tree(tag: bytes, blob: bytes) -> Any:
    """The JSON of a blob that is its tag and canonical. InvalidArgument: it is not."""
    if not blob.startswith(tag):
        raise InvalidArgument(f"does not begin with {tag.decode()}", field="blob")
    try:
        tree = parse_receipt_document(blob[len(tag) :])
    except ReceiptInvalid as error:
        raise InvalidArgument(error.message, field="blob") from error
    if blob_bytes(tag, tree) != blob:
        raise InvalidArgument("not canonical", field="blob")
    return tree
