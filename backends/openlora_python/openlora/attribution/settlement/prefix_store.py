"""Prefixes of logs that were checked before, on disk: so that an epoch costs only what is new.

A prefix holds while the chain still has the block of the first anchor that covers it, for that block's hash commits to
everything that its verdicts went by. What does not hold, or can't be read, is judged again.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from .chain_state import LogState
from .facts import ChainFacts
from .ledger import Tally

FORMAT = 1
"""To be raised with every change of what makes a receipt paid or void: old verdicts are then forgotten."""

_DIGEST = 32
_ID_BYTES = 32


@dataclass(frozen=True)
class Prefix:
    """The first `size` receipts of a log: the tree's right edge, the sums, and the request ids that were there."""

    size: int
    peaks: tuple[bytes, ...]
    tally: Tally
    request_ids: frozenset[bytes]


class _Record(msgspec.Struct, array_like=True):
    identity: bytes
    size: int
    peaks: list[bytes]
    owed: dict[str, str]  # hex to decimal
    paid: str
    paid_receipts: int
    void_receipts: dict[str, int]
    void_price: dict[str, str]
    request_ids: bytes


class PrefixStore:
    """Files `<log id>-<size>` in a directory of its own (0700)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self, facts: ChainFacts, log: LogState) -> Prefix | None:
        """The longest prefix of a log, up to its settled size, that still holds."""
        sizes = [size for size in self._sizes(log) if size <= log.settled_size]
        for size in sorted(sizes, reverse=True):
            prefix = self._read(self._path(log, size), _identity(facts, log, size))
            if prefix is not None:
                return prefix
        return None

    def save(self, facts: ChainFacts, log: LogState, prefixes: Iterable[Prefix]) -> None:
        """Keep these prefixes of a log, and of the others those that are longer."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory.chmod(0o700)
        kept = set()
        for prefix in prefixes:
            identity = _identity(facts, log, prefix.size)
            if identity is None:
                continue
            kept.add(prefix.size)
            body = msgspec.msgpack.encode(_record(prefix, identity))
            path = self._path(log, prefix.size)
            draft = path.with_name(f".{path.name}.{os.getpid()}")
            draft.write_bytes(hashlib.sha256(body).digest() + body)
            draft.rename(path)
        for size in self._sizes(log):
            if kept and size < min(kept):
                self._path(log, size).unlink(missing_ok=True)

    def _sizes(self, log: LogState) -> list[int]:
        names = [path.name.rpartition("-")[2] for path in self._directory.glob(f"{log.log_id.hex()}-*")]
        return [int(name) for name in names if name.isdecimal()]

    def _path(self, log: LogState, size: int) -> Path:
        return self._directory / f"{log.log_id.hex()}-{size}"

    def _read(self, path: Path, identity: bytes | None) -> Prefix | None:
        try:
            content = path.read_bytes()
            body = content[_DIGEST:]
            if hashlib.sha256(body).digest() != content[:_DIGEST]:
                return None
            record = msgspec.msgpack.decode(body, type=_Record)
        except (OSError, msgspec.MsgspecError):
            return None
        return _prefix(record) if record.identity == identity else None


def _identity(facts: ChainFacts, log: LogState, size: int) -> bytes | None:
    """What a prefix's verdicts depend on besides the leaves. None: no anchor covers it."""
    anchor = log.first_covering(size - 1)
    if anchor is None:
        return None
    names = (facts.chain_id, facts.registry, facts.attribution_log, facts.distributor, log.log_id.hex(), size)
    text = "\n".join(str(one) for one in (FORMAT, *names, facts.header(anchor.block).hash.hex()))
    return hashlib.sha256(text.encode()).digest()


def _record(prefix: Prefix, identity: bytes) -> _Record:
    tally = prefix.tally
    return _Record(
        identity=identity,
        size=prefix.size,
        peaks=list(prefix.peaks),
        owed={who.hex(): str(owed) for who, owed in tally.owed.items()},
        paid=str(tally.paid),
        paid_receipts=tally.paid_receipts,
        void_receipts=dict(tally.void_receipts),
        void_price={reason: str(price) for reason, price in tally.void_price.items()},
        request_ids=b"".join(prefix.request_ids),
    )


def _prefix(record: _Record) -> Prefix:
    tally = Tally(
        owed=Counter({bytes.fromhex(who): int(owed) for who, owed in record.owed.items()}),
        paid=int(record.paid),
        paid_receipts=record.paid_receipts,
        void_receipts=Counter(record.void_receipts),
        void_price=Counter({reason: int(price) for reason, price in record.void_price.items()}),
    )
    ids = record.request_ids
    request_ids = frozenset(ids[at : at + _ID_BYTES] for at in range(0, len(ids), _ID_BYTES))
    return Prefix(record.size, tuple(record.peaks), tally, request_ids)
