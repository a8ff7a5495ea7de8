"""Authenticated hand-overs: what one step gives the next through a client-reachable door carries a MAC.

Three keys come from the run key, one a purpose, so a ticket can never pass as a chunk or a control message. The
launcher makes a new run key each time it starts tritonserver: nothing sealed before a restart is good after it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path
from typing import Literal

from ..errors import NotAuthenticated

Purpose = Literal["ticket", "usage", "control"]
_TAG_LENGTH = 64  # hex digits of HMAC-SHA256


def write_run_key(path: Path) -> None:
    """A new 32-byte key, readable by its owner alone, in place of any older one."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(os.urandom(32))


class Seal:
    """HMAC-SHA256 over a payload, with the key of one purpose."""

    def __init__(self, run_key_path: Path, purpose: Purpose) -> None:
        run_key = run_key_path.read_bytes()
        self._key = hmac.digest(run_key, f"openlora/{purpose}/v1".encode(), hashlib.sha256)
        self._purpose = purpose

    def close(self, payload: bytes) -> bytes:
        """`payload` with its tag in front, as ASCII hex so that it survives any text channel."""
        return hmac.digest(self._key, payload, hashlib.sha256).hex().encode() + payload

    def open(self, sealed: bytes) -> bytes:
        """The payload.

        Raises:
            NotAuthenticated: it was not sealed with this run's key for this purpose.
        """
        tag, payload = sealed[:_TAG_LENGTH], sealed[_TAG_LENGTH:]
        expected = hmac.digest(self._key, payload, hashlib.sha256).hex().encode()
        if not hmac.compare_digest(tag, expected):
            raise NotAuthenticated(f"this {self._purpose} was not made by this server: call the ensemble `openlora`")
        return payload
