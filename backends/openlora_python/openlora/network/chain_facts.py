"""The events of our contracts up to a final block, read in ranges, kept in a file, and never past a re-org.

The file (SQLite) belongs to one deployment, and processes take turns at it. It only saves reading: whatever in it is
not on the chain any more is taken back, back to the newest block that still is.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from web3.exceptions import BlockNotFound

from ..attribution.settlement.facts import BlockHeader, ChainEvent, ChainFacts
from ..errors import Unavailable
from ..processes.lock_file import in_turn
from ..transaction import transaction
from .deployment import Deployment
from .event_decoder import EVENTS, EventDecoder
from .rpc import RETRY_MS, reaching

if TYPE_CHECKING:
    from web3 import Web3
    from web3.types import LogReceipt

SPAN = 2_000  # blocks a question; halved where a server finds that too much
ATTEMPTS = 3  # when the chain moves under the reading
FORMAT = 1
SCHEMA = """
CREATE TABLE deployment (id INTEGER PRIMARY KEY CHECK (id = 1), facts TEXT NOT NULL, head INTEGER NOT NULL) STRICT;
CREATE TABLE events (
    block INTEGER NOT NULL, log_index INTEGER NOT NULL, contract TEXT NOT NULL, name TEXT NOT NULL, args TEXT NOT NULL,
    PRIMARY KEY (block, log_index)
) STRICT, WITHOUT ROWID;
CREATE TABLE headers (number INTEGER PRIMARY KEY, hash BLOB NOT NULL, timestamp INTEGER NOT NULL) STRICT;
"""

Progress = Callable[[int, int], None]
"""Told of the last block that was read, and of the one to read up to."""


def read_facts(
    web3: Web3,
    deployment: Deployment,
    to_block: int | None = None,
    cache: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> ChainFacts:
    """All events of the three contracts in blocks up to `to_block`, or up to the newest final one if that is lower.

    Args:
        cache: file to go on from; default: everything is read.

    Raises:
        Unavailable: the chain does not answer, or moves all the time.
    """
    with _alone(cache), closing(_Cache(cache, deployment)) as kept:
        for _ in range(ATTEMPTS):
            try:
                return _Reading(web3, deployment, kept).read(to_block, progress)
            except _Moved as moved:
                last = moved
        raise Unavailable(f"the chain moved while it was read: {last}", retry_after_ms=RETRY_MS)


def header_of(web3: Web3, deployment: Deployment, number: int) -> BlockHeader | None:
    """The header of a block; None: the chain has none of that number. Unavailable: it does not answer."""
    with reaching(deployment.rpc_url):
        try:
            block = web3.eth.get_block(number)
        except BlockNotFound:
            return None
    return BlockHeader(block["number"], bytes(block["hash"]), block["timestamp"])


class _Moved(Exception):
    """A block is another one than it was a moment ago."""


class _Reading:
    def __init__(self, web3: Web3, deployment: Deployment, cache: _Cache) -> None:
        self._web3 = web3
        self._deployment = deployment
        self._cache = cache
        self._decoder = EventDecoder(deployment)

    def read(self, to_block: int | None, progress: Progress) -> ChainFacts:
        final = self._deployment.final_block(self._web3)["number"]
        target = final if to_block is None else min(final, to_block)
        self._take_back()
        span = SPAN
        while (head := self._cache.head) < target:
            first = head + 1
            last = min(head + span, target)
            try:
                logs = self._logs(first, last)
            except Unavailable:
                if span == 1:
                    raise
                span = max(span // 2, 1)
                continue
            self._cache.add(last, *self._checked(logs, last))
            progress(last, target)
        contracts = self._deployment.contracts
        return ChainFacts(
            chain_id=self._deployment.chain_id,
            registry=contracts.AdapterRegistry.address,
            attribution_log=contracts.AttributionLog.address,
            distributor=contracts.RewardDistributor.address,
            head=target,
            events=tuple(self._cache.events(target)),
            headers=self._headers(target),
        )

    def _take_back(self) -> None:
        """Down to the newest kept block that is still the chain's."""
        for kept in self._cache.newest_headers():
            now = header_of(self._web3, self._deployment, kept.number)
            if now is not None and now.hash == kept.hash:
                self._cache.roll_back(kept.number)
                return
        self._cache.roll_back(self._deployment.start_block - 1)

    def _logs(self, first: int, last: int) -> list[LogReceipt]:
        with reaching(self._deployment.rpc_url):
            found = self._web3.eth.get_logs(
                {"fromBlock": first, "toBlock": last, "address": list(self._decoder.addresses)}
            )
        return sorted(found, key=lambda log: (log["blockNumber"], log["logIndex"]))

    def _checked(self, logs: list[LogReceipt], last: int) -> tuple[list[ChainEvent], list[BlockHeader]]:
        events = [(event, bytes(log["blockHash"])) for log in logs if (event := self._decoder.event(log)) is not None]
        headers: dict[int, BlockHeader] = {}
        for number in {event.block for event, _ in events} | {last}:
            header = header_of(self._web3, self._deployment, number)
            if header is None:
                raise _Moved(f"block {number} is gone")
            headers[number] = header
        for event, block_hash in events:
            if block_hash != headers[event.block].hash:
                raise _Moved(f"block {event.block} was replaced")
        return [event for event, _ in events], list(headers.values())

    def _headers(self, target: int) -> dict[int, BlockHeader]:
        headers = self._cache.headers(target)
        if target not in headers and (header := header_of(self._web3, self._deployment, target)) is not None:
            headers[target] = header
        return headers


def _alone(cache: Path | None) -> AbstractContextManager[None]:
    """Commands that are started together read one after the other: the later ones find what the first one read."""
    if cache is None:
        return nullcontext()
    cache.parent.mkdir(parents=True, exist_ok=True)
    return in_turn(cache.with_name(cache.name + ".lock"))


class _Cache:
    """Events and headers up to `head`. A file of another deployment, or one that is damaged, is begun anew."""

    def __init__(self, path: Path | None, deployment: Deployment) -> None:
        identity = {"chain_id": deployment.chain_id, "genesis": deployment.genesis, "format": FORMAT}
        identity |= {name: getattr(deployment.contracts, name).address for name in EVENTS}
        identity["start_block"] = deployment.start_block
        facts = json.dumps(identity, sort_keys=True)
        if path is not None and not _belongs(path, facts):
            for file in (path, path.with_name(path.name + "-journal")):
                file.unlink(missing_ok=True)
        self._connection = sqlite3.connect(":memory:" if path is None else path, isolation_level=None)
        self._connection.execute("PRAGMA synchronous = OFF")  # what a power cut damages is read again
        if not self._connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'deployment'").fetchone():
            with transaction(self._connection):
                for statement in SCHEMA.strip().split(";\n"):
                    self._connection.execute(statement)
                self._connection.execute("INSERT INTO deployment VALUES (1, ?, ?)", (facts, deployment.start_block - 1))

    def close(self) -> None:
        self._connection.close()

    @property
    def head(self) -> int:
        """The last block that was read."""
        return self._connection.execute("SELECT head FROM deployment").fetchone()[0]

    def newest_headers(self) -> Iterator[BlockHeader]:
        numbers = self._connection.execute("SELECT number FROM headers ORDER BY number DESC").fetchall()
        for (number,) in numbers:
            yield BlockHeader(*self._connection.execute("SELECT * FROM headers WHERE number = ?", (number,)).fetchone())

    def roll_back(self, head: int) -> None:
        """Forget everything above `head`."""
        if self.head == head:
            return
        with transaction(self._connection):
            self._connection.execute("DELETE FROM events WHERE block > ?", (head,))
            self._connection.execute("DELETE FROM headers WHERE number > ?", (head,))
            self._connection.execute("UPDATE deployment SET head = ?", (head,))

    def add(self, head: int, events: Iterable[ChainEvent], headers: Iterable[BlockHeader]) -> None:
        with transaction(self._connection):
            self._connection.executemany(
                "INSERT INTO events VALUES (?, ?, ?, ?, ?)",
                [
                    (one.block, one.index, one.contract, one.name, json.dumps(one.args, default=_tagged))
                    for one in events
                ],
            )
            # Of heads without events the newest alone is kept: it is what a re-org is noticed by.
            self._connection.execute("DELETE FROM headers WHERE number NOT IN (SELECT block FROM events)")
            self._connection.executemany(
                "INSERT OR REPLACE INTO headers VALUES (?, ?, ?)",
                [(one.number, one.hash, one.timestamp) for one in headers],
            )
            self._connection.execute("UPDATE deployment SET head = ?", (head,))

    def events(self, to_block: int) -> Iterator[ChainEvent]:
        rows = self._connection.execute("SELECT * FROM events WHERE block <= ? ORDER BY block, log_index", (to_block,))
        for block, index, contract, name, args in rows:
            yield ChainEvent(block, index, contract, name, json.loads(args, object_hook=_untagged))

    def headers(self, to_block: int) -> dict[int, BlockHeader]:
        rows = self._connection.execute("SELECT * FROM headers WHERE number <= ? ORDER BY number", (to_block,))
        return {number: BlockHeader(number, digest, timestamp) for number, digest, timestamp in rows}


def _belongs(path: Path, facts: str) -> bool:
    if not path.exists():
        return True
    try:
        with closing(sqlite3.connect(path)) as connection:
            row = connection.execute("SELECT facts FROM deployment").fetchone()
    except sqlite3.Error:
        return False
    return row == (facts,)


def _tagged(value: bytes) -> dict[str, str]:
    return {"bytes": value.hex()}


def _untagged(tree: dict[str, Any]) -> Any:
    return bytes.fromhex(tree["bytes"]) if tree.keys() == {"bytes"} else tree
