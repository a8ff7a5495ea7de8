"""A receipt log's public key line: what a verifier pins.

The line is `openlora-log-v1 origin=… log=… signer=… checkpoint=… nonce=… predecessor=…`. Its `log` is not believed but
recomputed: the log id is the SHA-256 of the ABI encoding of

    LogInit(uint16 schema=0x0301, bytes32 logId(=0), bytes32 originHash, address receiptSigner,
            bytes32 checkpointKey, bytes32 nonce, bytes32 predecessor)

so whoever knows the id knows both keys.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from eth_utils import is_checksum_address

from ..errors import InvalidArgument
from .commitments import ORIGIN_TAG

LOG_INIT_SCHEMA = 0x0301
ZERO32 = bytes(32)

_ORIGIN = re.compile(r"[\x21-\x2a\x2c-\x7e]{1,200}")  # C2SP key names have neither spaces nor '+'
_LINE = re.compile(
    r"openlora-log-v1 origin=(?P<origin>\S+) log=(?P<log>[0-9a-f]{64}) signer=(?P<signer>0x[0-9a-fA-F]{40}) "
    r"checkpoint=(?P<checkpoint>[0-9a-f]{64}) nonce=(?P<nonce>[0-9a-f]{64}) predecessor=(?P<predecessor>[0-9a-f]{64})"
)


@dataclass(frozen=True)
class LogKey:
    """The public facts of one log. InvalidArgument: a field is out of form."""

    origin: str
    signer: str  # checksummed address of the receipt key
    checkpoint_key: bytes  # Ed25519 public key, 32 bytes
    nonce: bytes  # 32 random bytes
    predecessor: bytes = ZERO32  # log id of the log that this one follows

    def __post_init__(self) -> None:
        if _ORIGIN.fullmatch(self.origin) is None:
            raise InvalidArgument(f"{self.origin!r}: 1 to 200 ASCII characters without spaces or '+'", field="origin")
        if not is_checksum_address(self.signer):
            raise InvalidArgument(f"{self.signer!r} is not a checksummed address", field="signer")
        for name in ("checkpoint_key", "nonce", "predecessor"):
            value = getattr(self, name)
            if type(value) is not bytes or len(value) != 32:
                raise InvalidArgument(f"{value!r} is not 32 bytes", field=name)

    @property
    def origin_hash(self) -> bytes:
        """SHA-256 of the tagged origin, 32 bytes."""
        return hashlib.sha256(ORIGIN_TAG + self.origin.encode()).digest()

    @cached_property
    def init_leaf(self) -> bytes:
        """The ABI encoding of the log's initialisation, 7 words."""
        signer = bytes(12) + bytes.fromhex(self.signer[2:])
        words = (LOG_INIT_SCHEMA.to_bytes(32, "big"), ZERO32, self.origin_hash, signer)
        return b"".join((*words, self.checkpoint_key, self.nonce, self.predecessor))

    @cached_property
    def log_id(self) -> bytes:
        """SHA-256 of `init_leaf`, 32 bytes."""
        return hashlib.sha256(self.init_leaf).digest()

    @property
    def line(self) -> str:
        """The key as one line of text, without the newline."""
        return (
            f"openlora-log-v1 origin={self.origin} log={self.log_id.hex()} signer={self.signer} "
            f"checkpoint={self.checkpoint_key.hex()} nonce={self.nonce.hex()} predecessor={self.predecessor.hex()}"
        )

    def is_of(self, origin: str) -> bool:
        """Whether the log was made with this origin, or follows one that was: see `following_origin`."""
        return self.origin == origin or (self.predecessor != ZERO32 and self.origin.rpartition("/")[0] == origin)

    def following_origin(self, nonce: bytes) -> str:
        """The origin of a log that follows this one. Witnesses know logs by their origin, so it is another one."""
        base = self.origin if self.predecessor == ZERO32 else self.origin.rpartition("/")[0]
        return f"{base}/{nonce[:4].hex()}"

    @classmethod
    def parse(cls, line: str) -> LogKey:
        """A key from its line. InvalidArgument: not such a line, or its log id is not that of its other fields."""
        found = _LINE.fullmatch(line)
        if found is None:
            raise InvalidArgument(f"{line[:80]!r} is not a log key line (openlora-log-v1 origin=… …)", field="log")
        key = cls(
            origin=found["origin"],
            signer=found["signer"],
            checkpoint_key=bytes.fromhex(found["checkpoint"]),
            nonce=bytes.fromhex(found["nonce"]),
            predecessor=bytes.fromhex(found["predecessor"]),
        )
        if key.log_id.hex() != found["log"]:
            raise InvalidArgument(f"the key line says log {found['log']}, its fields {key.log_id.hex()}", field="log")
        return key


def load_log_key(file_or_line: str) -> LogKey:
    """A pinned key, given as the line itself or as a file that holds it."""
    if file_or_line.startswith("openlora-log-v1 "):
        return LogKey.parse(file_or_line.strip())
    return LogKey.parse(_read(Path(file_or_line)).strip())


def load_known_logs(path: Path) -> list[LogKey]:
    """The keys in a file with one key line per log; empty lines and those that begin with # are skipped."""
    lines = (line.strip() for line in _read(path).splitlines())
    return [LogKey.parse(line) for line in lines if line and not line.startswith("#")]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"can't read the log key {path}: {error}", field="log") from error
