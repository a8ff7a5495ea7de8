"""The JSON form of a receipt, which its client keeps: every field by name, and all that a verifier needs beside it.

Only a view: what is hashed and signed is the leaf.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from ..errors import ReceiptInvalid
from ..strict_json import parse_strict
from .commitments import ADAPTERS_TAG, RUNTIME_TAG, TERMS_TAG
from .log_key import LogKey
from .receipt import RECEIPT_SCHEMA, Receipt, encode_leaf
from .registry_reference import RegistryReference

BLOB_TAGS = {"runtime": RUNTIME_TAG, "adapters": ADAPTERS_TAG, "terms": TERMS_TAG}


def receipt_document(
    receipt: Receipt,
    signature: bytes,
    key: LogKey,
    blobs: Sequence[bytes],
    salts: tuple[bytes, bytes] | None,
) -> dict[str, Any]:
    """A receipt as JSON: integers as they are, bytes as 0x hex, blobs as objects.

    Blobs are given as they were hashed, in the order of `Receipt.blob_hashes`.
    """
    named = {field.name: getattr(receipt, field.name) for field in fields(receipt)}
    document: dict[str, Any] = {"schema": f"0x{RECEIPT_SCHEMA:04x}"}
    document |= {name: "0x" + value.hex() if isinstance(value, bytes) else value for name, value in named.items()}
    document["leaf"] = "0x" + encode_leaf(receipt).hex()
    document["signature"] = "0x" + signature.hex()
    document["signer"] = key.signer
    named_blobs = dict(zip((*BLOB_TAGS, "registry")[: len(receipt.blob_hashes)], blobs, strict=True))
    document["blobs"] = {name: json.loads(named_blobs[name].removeprefix(tag)) for name, tag in BLOB_TAGS.items()}
    if "registry" in named_blobs:
        document["blobs"]["registry"] = RegistryReference.parse(named_blobs["registry"]).document
    if salts is not None:
        document["salts"] = {"prompt": "0x" + salts[0].hex(), "output": "0x" + salts[1].hex()}
    document["log"] = key.line
    return document


def parse_receipt_document(text: str | bytes) -> dict[str, Any]:
    """A receipt's JSON from a stranger: an object without repeated keys, floats' NaN or other leniencies.

    ReceiptInvalid: it is something else.
    """
    try:
        document = parse_strict(text)
    except ValueError as error:
        raise ReceiptInvalid(f"not the JSON of a receipt: {error}") from error
    if not isinstance(document, dict):
        raise ReceiptInvalid(f"not the JSON of a receipt: {type(document).__name__} instead of an object")
    return document
