"""Groups and task preferences: names that stand for adapters. In the catalog's file, written by the CLI.

A group is an alias with weights, for canaries. Which of its targets a request gets is decided by weighted rendezvous
hashing: the same key gets the same target; a weight that changes moves only the keys that must move, towards the
target that gained; and a target that is passed over leaves everybody else where they are.
"""

from __future__ import annotations

import math
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import msgspec

from ..attribution.card import TASK
from ..errors import AdapterNotFound, InvalidArgument, Unavailable
from ..transaction import transaction
from .catalog import Catalog, check_name
from .catalog_file import BUSY_SECONDS

MAX_TARGETS = 16
MAX_WEIGHT = 1_000_000
HASH_DOMAIN = "openlora group v1"


@dataclass(frozen=True)
class Target:
    """An adapter that a group may choose."""

    adapter: str
    weight: int  # its part is this over the sum of all; with 0 it is never chosen
    version: int | None = None  # None = the current one


@dataclass(frozen=True)
class Group:
    """A name that stands for one of several adapters, chosen for each request."""

    name: str
    targets: tuple[Target, ...]
    skip_unready: bool = False  # pass over targets that can't answer, instead of failing
    changed_at: int = 0  # seconds since 1970

    def preference(self, key: str) -> list[Target]:
        """The targets in the order in which `key` prefers them: over all keys, each is first in its weight's part."""
        chosen = [target for target in self.targets if target.weight]
        return sorted(chosen, key=lambda target: self._distance(key, target))

    def _distance(self, key: str, target: Target) -> float:
        """−ln(u)/weight with u uniform in (0, 1): the smallest of such is target i's with probability wᵢ / Σw."""
        digest = sha256(msgspec.json.encode([HASH_DOMAIN, self.name, key, target.adapter, target.version])).digest()
        uniform = (int.from_bytes(digest[:8], "big") // 2**11 + 0.5) / 2**53
        return -math.log(uniform) / target.weight


class Routes:
    """The writer's side. Every change is one transaction, and a running server follows it."""

    def __init__(self, path: Path) -> None:
        with Catalog(path):
            pass  # it makes the tables
        self._connection = _connect(path)

    def __enter__(self) -> Routes:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def set_group(self, group: Group) -> Group:
        """Make a group, or put another in its place; `changed_at` is set here.

        Raises:
            InvalidArgument: a name, weight or target that can't be.
        """
        check_name(group.name)
        _check_targets(group.targets)
        with transaction(self._connection):
            if self._is_adapter(group.name):
                raise InvalidArgument(f"{group.name!r} is an adapter: a group needs a name of its own", field="name")
            for target in group.targets:
                if not self._is_adapter(target.adapter):
                    raise InvalidArgument(f"no adapter {target.adapter!r:.140}", field="to")
            stored = Group(group.name, group.targets, group.skip_unready, int(time.time()))
            self._connection.execute(
                "INSERT OR REPLACE INTO adapter_groups VALUES (?, ?, ?, ?)",
                (stored.name, msgspec.json.encode(stored.targets).decode(), stored.skip_unready, stored.changed_at),
            )
        return stored

    def remove_group(self, name: str) -> None:
        """Raises AdapterNotFound when there is none."""
        if not self._connection.execute("DELETE FROM adapter_groups WHERE name = ?", (name,)).rowcount:
            raise AdapterNotFound(f"no group {name!r:.140}")

    def prefer(self, task: str, adapter: str) -> None:
        """Of several adapters for `task`, requests get this one."""
        if not TASK.fullmatch(task):
            raise InvalidArgument(f"{task!r:.80} is no task, {TASK.pattern} is wanted", field="task")
        self._connection.execute("INSERT OR REPLACE INTO task_preferences VALUES (?, ?)", (task, adapter))

    def forget(self, task: str) -> None:
        """Raises AdapterNotFound when nothing is preferred for `task`."""
        if not self._connection.execute("DELETE FROM task_preferences WHERE task = ?", (task,)).rowcount:
            raise AdapterNotFound(f"no adapter is preferred for the task {task!r:.80}")

    def _is_adapter(self, name: str) -> bool:
        query = "SELECT 1 FROM adapters WHERE name = ? AND removed_at IS NULL"
        return self._connection.execute(query, (name,)).fetchone() is not None


class RoutesReader:
    """The resolver's side: in memory, read again only when another process has changed the file."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise Unavailable(f"no adapter catalog at {path}: `openlora serve` and `openlora adapters add` make one")
        self._connection = _connect(path)
        self._connection.execute("PRAGMA query_only = ON")
        self._lock = threading.Lock()
        self._data_version: int | None = None
        self._groups: dict[str, Group] = {}
        self._preferred: dict[str, str] = {}

    def close(self) -> None:
        self._connection.close()

    def group(self, name: str) -> Group | None:
        with self._fresh():
            return self._groups.get(name)

    def groups(self) -> list[Group]:
        """All, by name."""
        with self._fresh():
            return [self._groups[name] for name in sorted(self._groups)]

    def preferences(self) -> dict[str, str]:
        """The preferred adapter of each task that has one."""
        with self._fresh():
            return dict(sorted(self._preferred.items()))

    def for_task(self, task: str) -> tuple[str | None, list[str]]:
        """The preferred adapter, and the names, it first, of those of which some version's card declared `task`."""
        with self._fresh():
            rows = self._connection.execute(
                "SELECT name FROM adapter_tasks AS declared WHERE task = ? AND EXISTS "
                "(SELECT 1 FROM adapters WHERE adapters.name = declared.name AND removed_at IS NULL) ORDER BY name",
                (task,),
            )
            names, preferred = [name for (name,) in rows], self._preferred.get(task)
        return preferred, sorted(names, key=lambda name: name != preferred)

    @contextmanager
    def _fresh(self) -> Iterator[None]:
        with self._lock:
            (data_version,) = self._connection.execute("PRAGMA data_version").fetchone()
            if data_version != self._data_version:
                rows = self._connection.execute("SELECT name, targets, skip_unready, changed_at FROM adapter_groups")
                self._groups = {
                    name: Group(name, msgspec.json.decode(targets, type=tuple[Target, ...]), bool(skip), changed_at)
                    for name, targets, skip, changed_at in rows
                }
                self._preferred = dict(self._connection.execute("SELECT task, adapter FROM task_preferences"))
                self._data_version = data_version
            yield


def _check_targets(targets: tuple[Target, ...]) -> None:
    if not 1 <= len(targets) <= MAX_TARGETS:
        raise InvalidArgument(f"a group has 1 to {MAX_TARGETS} targets, got {len(targets)}", field="to")
    for target in targets:
        if not 0 <= target.weight <= MAX_WEIGHT:
            raise InvalidArgument(
                f"weight of {target.adapter!r}: a whole number from 0 to {MAX_WEIGHT} is wanted, got {target.weight}",
                field="to",
            )
    named = [(target.adapter, target.version) for target in targets]
    if twice := next((name for name, version in named if named.count((name, version)) > 1), None):
        raise InvalidArgument(f"{twice!r} comes twice", field="to")
    if not any(target.weight for target in targets):
        raise InvalidArgument("all weights are zero", field="to")


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA synchronous = FULL")
    return connection
