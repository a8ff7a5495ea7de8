"""The two private keys of a receipt log: files of mode 0600 in a directory of mode 0700.

`receipt.key` is a secp256k1 key that signs receipts, `checkpoint.key` an Ed25519 key that signs checkpoints. Each file
is 64 hex digits and a newline. Neither moves money.
"""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from coincurve import PrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from eth_keys import KeyAPI
from eth_keys.backends import CoinCurveECCBackend, get_backend

from ..errors import Internal
from .frames import make_directory, sync_directory

_FORM = re.compile(rb"[0-9a-f]{64}\n")


@dataclass(frozen=True)
class LogKeys:
    """Both private keys of a log."""

    receipt: PrivateKey
    checkpoint: Ed25519PrivateKey

    @property
    def signer(self) -> str:
        """The checksummed address of the receipt key."""
        return KeyAPI().PrivateKey(self.receipt.secret).public_key.to_checksum_address()

    @property
    def checkpoint_public(self) -> bytes:
        """The Ed25519 public key, 32 bytes."""
        return self.checkpoint.public_key().public_bytes_raw()


def load_keys(directory: Path, *, create: bool) -> LogKeys:
    """The keys in `directory`; missing ones are made if `create` says so.

    Internal: a key is missing, has another form, or can be read by others; or eth_keys has fallen back to its Python
    curve, which is 40 times slower than the one that `coincurve` brings.
    """
    if not isinstance(get_backend(), CoinCurveECCBackend):
        raise Internal(f"eth_keys uses {type(get_backend()).__name__}; it must use coincurve (ECC_BACKEND_CLASS)")
    if create:
        make_directory(directory, 0o700)
        directory.chmod(0o700)
        for name in ("receipt.key", "checkpoint.key"):
            _create(directory / name)
    receipt, checkpoint = (load_key(directory / name) for name in ("receipt.key", "checkpoint.key"))
    return LogKeys(PrivateKey(receipt), Ed25519PrivateKey.from_private_bytes(checkpoint))


def _create(path: Path) -> None:
    """Write a new key unless there is one, so that a crash leaves a whole file or none."""
    if path.exists():
        return
    # 256 random bits miss secp256k1's range with a chance of 2^-128; coincurve would refuse such a key.
    draft = path.with_suffix(f".{os.getpid()}.new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, secrets.token_hex(32).encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    draft.rename(path)
    sync_directory(path.parent)


def load_key(path: Path, *, create: bool = False) -> bytes:
    """The 32 bytes of a key file; a new one if there is none and `create` says so.

    Internal: it can't be read, can be read by others, or has another form.
    """
    if create:
        _create(path)
    try:
        mode = path.stat().st_mode & 0o777
        content = path.read_bytes()
    except OSError as error:
        raise Internal(f"the key {path} can't be read: {error}") from error
    if mode & 0o077:
        raise Internal(f"the key {path} has mode {mode:04o}: others can read it; make it 0600")
    if _FORM.fullmatch(content) is None:
        raise Internal(f"the key {path} is not 64 hex digits and a newline")
    return bytes.fromhex(content.decode())
