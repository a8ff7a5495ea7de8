"""Everything that attribution hashes with SHA-256: salted commitments to texts, and the blobs beside a receipt.

Every hash starts with its own domain tag, so that no value can stand for another kind of value. A changed format
gets a new tag, never an edit.
"""

from __future__ import annotations

import hashlib
from typing import Any

import rfc8785

from ..errors import InvalidArgument

PROMPT_TAG = b"openlora/prompt/v1"
OUTPUT_TAG = b"openlora/output/v1"
RUNTIME_TAG = b"openlora/runtime/v1"
ADAPTERS_TAG = b"openlora/adapters/v1"
TERMS_TAG = b"openlora/terms/v1"
ORIGIN_TAG = b"openlora/origin/v1"
MODEL_TERMS_TAG = b"openlora/model-terms/v1"

SALT_BYTES = 32


def prompt_commitment(salt: bytes, prompt: str) -> bytes:
    """SHA-256(tag ‖ salt ‖ UTF-8 prompt): 32 bytes that say nothing without the 32-byte salt."""
    return hashlib.sha256(PROMPT_TAG + salt + prompt.encode()).digest()


def output_commitment(salt: bytes, text: str = "") -> hashlib._Hash:
    """A running SHA-256(tag ‖ salt ‖ UTF-8 text sent so far).

    Call `update(delta.encode())` for each delta; `digest()` may be taken after any of them and does not end the hash.
    """
    return hashlib.sha256(OUTPUT_TAG + salt + text.encode())


def blob_bytes(tag: bytes, blob: dict[str, Any]) -> bytes:
    """Tag ‖ RFC 8785 canonical JSON: the bytes whose plain SHA-256 a receipt carries.

    InvalidArgument: the blob has no canonical form (NaN, integers from 2^53 on, text that is not Unicode).
    """
    try:
        return tag + rfc8785.dumps(blob)
    except (rfc8785.CanonicalizationError, UnicodeEncodeError) as error:
        raise InvalidArgument(f"has no canonical form: {error}", field=tag.split(b"/")[1].decode()) from error


def blob_hash(tag: bytes, blob: dict[str, Any]) -> bytes:
    """SHA-256 of `blob_bytes`, 32 bytes."""
    return hashlib.sha256(blob_bytes(tag, blob)).digest()
