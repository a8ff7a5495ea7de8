"""Login tokens for callers that are Ethereum addresses: the value of `api_key`, made with a private key or a wallet."""

from __future__ import annotations

import re
import time

from coincurve import PrivateKey
from eth_keys import KeyAPI

from openlora.attribution.receipt import sign_digest
from openlora.errors import InvalidArgument
from openlora.serving.access.signed_login import LoginToken, login_digest, login_message, read_token

__all__ = ["login_message", "login_token", "signed_token"]


def login_token(private_key: str, log_id: str, lifetime_seconds: int = 600) -> str:
    """A token of the address of `private_key`, for one server; make a new one before it expires.

    Args:
        private_key: 64 hex digits, with or without 0x. Only its signature leaves this process.
        log_id: 64 hex digits: the `log=` of the key line of the server's log, and the `log_id` of its receipts.
        lifetime_seconds: at most 3600; servers refuse more.

    Raises:
        InvalidArgument: the key or the log id is not 64 hex digits.
    """
    key = PrivateKey(_bytes32(private_key, "private_key"))
    address = KeyAPI().PrivateKey(key.secret).public_key.to_checksum_address()
    expires = int(time.time()) + lifetime_seconds
    digest = login_digest(_bytes32(log_id, "log_id"), address, expires)
    return str(LoginToken(address, expires, sign_digest(key, digest)))


def signed_token(address: str, expires: int, signature: str) -> str:
    """A token from what a wallet's `personal_sign` made of `login_message(log_id, address, expires)`.

    Raises:
        InvalidArgument: one of them is out of form.
    """
    return str(read_token(f"eip191:{address}:{expires}:{signature.removeprefix('0x')}"))


def _bytes32(digits: str, field: str) -> bytes:
    digits = digits.removeprefix("0x")
    if not re.fullmatch("[0-9a-fA-F]{64}", digits):
        raise InvalidArgument("64 hex digits are wanted", field=field)  # never shown: it may be a private key
    return bytes.fromhex(digits)
