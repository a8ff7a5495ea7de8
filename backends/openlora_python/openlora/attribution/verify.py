"""Verifying a receipt offline, from its JSON alone and a key that the verifier already trusts.

Imports no part of the server. What a receipt says of its own log proves nothing: without a pinned key the best answer
is "consistent, log unknown".
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import InvalidArgument, ReceiptInvalid
from .blobs import check_blobs
from .commitments import blob_hash, output_commitment, prompt_commitment
from .log_key import LogKey
from .receipt import (
    RECEIPT_SCHEMA,
    ZERO32,
    Receipt,
    ReceiptHasher,
    encode_leaf,
    receipt_price,
    recover_signer,
)
from .receipt_json import BLOB_TAGS
from .registry_reference import RegistryReference

_HEX = re.compile(r"0x(?:[0-9a-f]{2})*")
_FIELDS = tuple(field.name for field in fields(Receipt))
_KEYS = {"schema", *_FIELDS, "leaf", "signature", "signer", "blobs", "log"}
_INTEGERS = {"seq", "status", "in_tokens", "out_tokens", "started_at", "ended_at", "price"}


@dataclass(frozen=True)
class Verification:
    """A receipt that is consistent in itself; `known` says whether a pinned key vouches for its log."""

    receipt: Receipt
    log: LogKey
    known: bool
    texts: tuple[str, ...]  # which of "prompt" and "output" were checked against their commitments


def verify_receipt(
    document: Mapping[str, Any],
    pinned: LogKey | None,
    prompt: str | None = None,
    output: str | None = None,
) -> Verification:
    """Check everything that the JSON says; `prompt` and `output` are checked too where given (that takes the salts).

    ReceiptInvalid names the first thing that is wrong.
    """
    try:
        return _verify(document, pinned, prompt, output)
    except InvalidArgument as error:
        raise ReceiptInvalid(error.message, field=error.field) from error


def _verify(document: Mapping[str, Any], pinned: LogKey | None, prompt: str | None, output: str | None) -> Verification:
    _require_keys("receipt", document, _KEYS, optional={"salts"})
    if document["schema"] != f"0x{RECEIPT_SCHEMA:04x}":
        raise ReceiptInvalid(f"{document['schema']!r} is not 0x{RECEIPT_SCHEMA:04x}", field="schema")
    receipt = Receipt(**{name: document[name] if name in _INTEGERS else _bytes(document, name) for name in _FIELDS})
    leaf = encode_leaf(receipt)
    if _bytes(document, "leaf") != leaf:
        raise ReceiptInvalid("the leaf is not the encoding of the fields", field="leaf")
    _check_content(receipt, document["blobs"])
    log = _check_log(receipt, document, pinned)
    signer = recover_signer(ReceiptHasher(receipt.log_id).digest(leaf), _bytes(document, "signature"))
    if signer != log.signer:
        raise ReceiptInvalid(f"signed by {signer}, not by the log's {log.signer}", field="signature")
    texts = _check_texts(receipt, document.get("salts"), prompt, output)
    return Verification(receipt, log, pinned is not None, texts)


def _check_content(receipt: Receipt, blobs: Any) -> None:
    """The blobs are those that were hashed, fit each other, and give the price."""
    _require_keys("blobs", blobs, {*BLOB_TAGS, *(["registry"] if receipt.registry_ref != ZERO32 else [])})
    terms = check_blobs(receipt.base_model.hex(), *(blobs[name] for name in BLOB_TAGS))
    for name, tag in BLOB_TAGS.items():
        if blob_hash(tag, blobs[name]) != getattr(receipt, f"{name}_hash"):
            raise ReceiptInvalid(f"the blob is not the one that {name}_hash names", field=f"blobs.{name}")
    if receipt.registry_ref != ZERO32:
        reference = RegistryReference.from_document(blobs["registry"])
        if hashlib.sha256(reference.preimage).digest() != receipt.registry_ref:
            raise ReceiptInvalid("the block is not the one that registry_ref names", field="blobs.registry")
    due = receipt_price(receipt.status, terms, receipt.in_tokens, receipt.out_tokens)
    if receipt.price != due:
        raise ReceiptInvalid(f"{receipt.price}, but tokens and terms give {due}", field="price")


def _check_log(receipt: Receipt, document: Mapping[str, Any], pinned: LogKey | None) -> LogKey:
    """The receipt belongs to the log whose key line it carries, and that log is the pinned one."""
    if not isinstance(document["log"], str):
        raise ReceiptInvalid("is not a key line", field="log")
    log = LogKey.parse(document["log"])
    if receipt.log_id != log.log_id:
        raise ReceiptInvalid(f"{receipt.log_id.hex()}, but its key line gives {log.log_id.hex()}", field="log_id")
    if pinned is not None and log != pinned:
        raise ReceiptInvalid(f"of log {log.log_id.hex()}, not of the pinned {pinned.log_id.hex()}", field="log_id")
    if document["signer"] != log.signer:
        raise ReceiptInvalid(f"{document['signer']!r} is not the log's {log.signer}", field="signer")
    return log


def _check_texts(receipt: Receipt, salts: Any, prompt: str | None, output: str | None) -> tuple[str, ...]:
    if salts is not None:
        _require_keys("salts", salts, {"prompt", "output"})
        if {len(_bytes(salts, name)) for name in ("prompt", "output")} != {32}:
            raise ReceiptInvalid("a salt has 32 bytes", field="salts")
    elif prompt is not None or output is not None:
        raise ReceiptInvalid("not there, so the texts can't be checked", field="salts")
    checked = []
    if prompt is not None:
        if prompt_commitment(_bytes(salts, "prompt"), prompt) != receipt.prompt_commit:
            raise ReceiptInvalid("the receipt is for another prompt", field="prompt_commit")
        checked.append("prompt")
    if output is not None:
        if output_commitment(_bytes(salts, "output"), output).digest() != receipt.output_commit:
            raise ReceiptInvalid("the receipt is for another output", field="output_commit")
        checked.append("output")
    return tuple(checked)


def _require_keys(what: str, document: Any, keys: set[str], optional: set[str] = frozenset()) -> None:
    if not isinstance(document, Mapping):
        raise ReceiptInvalid(f"{type(document).__name__} instead of an object", field=what)
    missing, unknown = keys - document.keys(), document.keys() - keys - optional
    if missing or unknown:
        words = [f"lacks {', '.join(sorted(missing))}"] if missing else []
        words += [f"has unknown {', '.join(sorted(unknown))}"] if unknown else []
        raise ReceiptInvalid(" and ".join(words), field=what)


def _bytes(document: Mapping[str, Any], name: str) -> bytes:
    value = document[name]
    if not isinstance(value, str) or _HEX.fullmatch(value) is None:
        raise ReceiptInvalid(f"{value!r} is not 0x and lower-case hex digits", field=name)
    return bytes.fromhex(value[2:])
