"""Login tokens: a caller that is an Ethereum address signs a short message instead of holding a key of ours.

The message, signed as EIP-191 `personal_sign` (version 0x45), is exactly these four lines, with no newline at the end:

    OpenLoRA login
    server: <log id of the server's receipt log, 64 hex digits>
    address: <checksummed address>
    expires: <seconds since 1970, decimal>

The token in the input `api_key` is `eip191:<address>:<expires>:<signature, 130 hex digits>`. It is good until it
expires, an hour at most, on the one server that it names: a log id is the hash of that log's keys and 32 random bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...access_rule import canonical_caller
from ...attribution.keccak import keccak
from ...attribution.receipt import recover_signer
from ...errors import InvalidArgument

SCHEME = "eip191:"
MAX_LIFETIME_SECONDS = 3600
FIELD = "api_key"
_FORM = re.compile(
    r"eip191:(?P<address>0x[0-9a-fA-F]{40}):(?P<expires>0|[1-9][0-9]{0,10}):(0x)?(?P<signature>[0-9a-fA-F]{130})"
)


@dataclass(frozen=True)
class LoginToken:
    """A token that was read and not yet believed."""

    address: str  # checksummed
    expires: int  # seconds since 1970
    signature: bytes  # r ‖ s ‖ v, 65 bytes

    def __str__(self) -> str:
        return f"{SCHEME}{self.address}:{self.expires}:{self.signature.hex()}"


def login_message(log_id: bytes, address: str, expires: int) -> str:
    """The text that the owner of `address` signs."""
    return f"OpenLoRA login\nserver: {log_id.hex()}\naddress: {canonical_caller(address)}\nexpires: {expires}"


def login_digest(log_id: bytes, address: str, expires: int) -> bytes:
    """EIP-191: keccak256("\\x19Ethereum Signed Message:\\n" ‖ length ‖ message), 32 bytes."""
    message = login_message(log_id, address, expires).encode()
    return keccak(b"\x19Ethereum Signed Message:\n%d" % len(message) + message)


def is_login_token(api_key: str | None) -> bool:
    return api_key is not None and api_key.startswith(SCHEME)


def read_token(text: str) -> LoginToken:
    """Raises InvalidArgument for what has not the form of a token."""
    found = _FORM.fullmatch(text)
    if found is None:
        raise InvalidArgument("a login token is eip191:<address>:<expires>:<signature of 130 hex digits>", field=FIELD)
    signature = bytes.fromhex(found["signature"])
    if signature[64] < 2:  # some wallets write the recovery id itself
        signature = signature[:64] + bytes((signature[64] + 27,))
    return LoginToken(canonical_caller(found["address"]), int(found["expires"]), signature)


def verify_token(token: LoginToken, log_id: bytes, now: float) -> str:
    """The address that proved itself, checksummed.

    Raises:
        InvalidArgument: it has expired, lives too long, or was not signed by its address for this server.
    """
    if token.expires <= now:
        raise InvalidArgument(f"the login token expired at {token.expires}, it is {int(now)}", field=FIELD)
    if token.expires > now + MAX_LIFETIME_SECONDS:
        raise InvalidArgument(f"a login token lives at most {MAX_LIFETIME_SECONDS} s", field=FIELD)
    digest = login_digest(log_id, token.address, token.expires)
    try:
        signer = recover_signer(digest, token.signature)
    except InvalidArgument as error:
        raise InvalidArgument(f"the login token's {error.message}", field=FIELD) from error
    if signer != token.address:
        raise InvalidArgument(
            "the login token was not signed by its address for this server's log " + log_id.hex(), field=FIELD
        )
    return signer
