"""Where adapters are: on disk, in host memory up to a limit in bytes, and in device slots up to a number.

An adapter in a slot is in host memory, too; on the CPU its slot is a view of it, and only bounds how many distinct
adapters a step sees.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from itertools import islice

from ..errors import AdapterInvalid, InvalidArgument
from .adapter_block import Adapter
from .api import AdapterStats, AdapterUse
from .eviction import EvictionOrder, Worth
from .residency_entry import Entry, Readable

COUNTED = (
    "hits_device",
    "hits_host",
    "hits_disk",
    "loads",
    "failed_loads",
    "placed",
    "evictions_device",
    "evictions_host",
)


class Residency:
    """Adapters by digest. Thread-safe; the lock is never held while something is read or computed.

    **Requests** are announced by `prefetch` when they are submitted, `hold` slots before they run, `release` them when
    they no longer do, and end with `forget`.

    **Loads** are carried out by whoever calls `load_next` (`loader.Loader`), those that a holder waits for first. One
    that nobody holds a slot for takes room only from what nobody wants; if there is none, it waits until there is.

    **Limits.** The memory of all adapters that are in host memory or being read is at most `host_bytes` at any time:
    a load begins when the bytes that it takes, known from its file's header, are reserved. What a running request
    holds is never evicted; of the rest that which is worth least, least recently used first, so what the catalog
    pinned goes last. An adapter that finds no room because of what others hold waits (`lacks_room`).
    """

    def __init__(
        self,
        open_adapter: Callable[[str, str], AbstractContextManager[Readable]],
        *,
        slots: int,
        host_bytes: int,
        wake: Callable[[], None],
        place: Callable[[Adapter], Adapter] | None = None,
    ) -> None:
        """`open_adapter(digest, path)` raises an `OpenLoRAError` for a bad adapter; `wake` is called after each load,
        `place` copies an adapter from the host to the device (None: a slot is a view of host memory)."""
        self.slots = slots
        self.host_bytes = host_bytes
        self._open, self._place, self._wake = open_adapter, place, wake
        self._changed = threading.Condition()  # guards everything below
        self._entries: dict[str, Entry] = {}
        self._slots_taken = self._slots_filled = self._host_filled = 0
        self._bytes_taken = 0
        self._idle_slots: EvictionOrder[Entry] = EvictionOrder()  # that nobody holds
        self._idle_host: EvictionOrder[Entry] = EvictionOrder()  # adapters in host memory that nobody holds
        self._needed: OrderedDict[Entry, None] = OrderedDict()  # to be loaded for a holder, in this order
        self._ahead: OrderedDict[Entry, None] = OrderedDict()  # to be loaded after those, for requests that wait
        self._postponed: OrderedDict[Entry, int] = OrderedDict()  # those that found no room, and the bytes they take
        self._closed = False
        self._counts = dict.fromkeys(COUNTED, 0)
        self._seconds = {"read_seconds": 0.0, "place_seconds": 0.0}

    # --- what the engine calls ----------------------------------------------------------------------------------------

    def prefetch(self, uses: Sequence[AdapterUse]) -> None:
        """A request with these adapters was submitted: their loads may begin, though it has no slots for them yet."""
        if not uses:
            return
        with self._changed:
            for use in _distinct(uses):
                entry = self._entry(use)
                found = "disk" if entry.host is None else "host" if entry.device is None else "device"
                self._counts[f"hits_{found}"] += 1
                entry.expecting += 1
                self._settle(entry)
                self._load_ahead(entry)
            self._changed.notify()

    def forget(self, uses: Sequence[AdapterUse]) -> None:
        """A request that was announced has ended; it holds nothing."""
        if not uses:
            return
        with self._changed:
            for use in _distinct(uses):
                entry = self._entries[use.digest]
                entry.expecting -= 1
                self._settle(entry)
                self._drop_if_unwanted(entry)
            self._retry_postponed()

    def hold(self, uses: Sequence[AdapterUse]) -> bool:
        """Hold a slot for each adapter, all or none, and have loaded what isn't.

        All or none, because two requests that each hold half of what they need would wait for ever.
        """
        if not uses:
            return True
        with self._changed:
            entries = [self._entry(use) for use in _distinct(uses)]
            absent = [entry for entry in entries if not entry.slot]
            shortage = self._slots_taken + len(absent) - self.slots
            if absent and shortage > 0:
                idle = (entry for entry in self._idle_slots.candidates() if entry not in entries)
                victims = [*islice(idle, shortage)]
                if len(victims) < shortage:
                    for entry in absent:
                        self._drop_if_unwanted(entry)
                    return False
                for victim in victims:
                    self._vacate(victim)
            for entry in absent:
                entry.slot = True
                self._slots_taken += 1
            for entry in entries:
                entry.holders += 1
                self._settle(entry)
                self._need(entry)
            self._changed.notify()
            return True

    def ready(self, uses: Sequence[AdapterUse]) -> list[Adapter] | None:
        """The held adapters in the order of `uses`, or None while one is not there yet.

        Raises what the load raised (an `OpenLoRAError` for a bad adapter); the caller releases them then.
        """
        with self._changed:
            entries = [self._entries[use.digest] for use in uses]
            for entry in entries:
                if entry.error is not None:
                    raise entry.error
            together = sum(entry.size or entry.lacks_room for entry in set(entries))
            if together > self.host_bytes:
                raise InvalidArgument(
                    f"together they take {together} bytes of memory, at most {self.host_bytes} "
                    "(engine.host_adapter_bytes) are right",
                    field="adapters",
                )
            for entry in set(entries):
                if entry.lacks_room and self._reserve(entry, entry.lacks_room):
                    self._need(entry)
            self._changed.notify()
            adapters = [entry.device for entry in entries]
            return None if None in adapters else adapters

    def lacks_room(self, uses: Sequence[AdapterUse]) -> bool:
        """Whether what others hold keeps these held adapters out of host memory."""
        with self._changed:
            return any(self._entries[use.digest].lacks_room for use in uses)

    def release(self, uses: Sequence[AdapterUse]) -> None:
        """Let go of what `hold` held. A load that failed is forgotten, so that a later request may try again."""
        if not uses:
            return
        with self._changed:
            for use in _distinct(uses):
                entry = self._entries[use.digest]
                entry.holders -= 1
                if not entry.holders:
                    self._let_go(entry)
            self._retry_postponed()

    @property
    def held(self) -> int:
        """Adapters that some request holds."""
        with self._changed:
            return sum(entry.holders > 0 for entry in self._entries.values())

    def stats(self) -> AdapterStats:
        with self._changed:
            return AdapterStats(
                slots=self.slots,
                slots_filled=self._slots_filled,
                host_adapters=self._host_filled,
                host_bytes=self._bytes_taken,
                host_limit_bytes=self.host_bytes,
                **self._counts,
                **self._seconds,
            )

    def close(self) -> None:
        """No more loads; `wait_for_work` says so."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # --- what the loader calls ----------------------------------------------------------------------------------------

    def wait_for_work(self) -> bool:
        """Whether there is something to load; waits until there is, or until `close` says that there will be nothing
        more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._needed or self._ahead)
            return not self._closed

    def load_next(self) -> bool:
        """Load the next adapter, if there is one; the caller's thread does all of the work."""
        with self._changed:
            queue = self._needed or self._ahead
            if not queue:
                return False
            entry, _ = queue.popitem(last=False)
            entry.loading = True
        error = None
        try:
            if entry.host is None:
                self._read(entry)
            if entry.host is not None and self._place is not None:
                self._copy_to_slot(entry)
        except Exception as raised:
            error = raised
        with self._changed:
            entry.loading = False
            self._loaded(entry, error)
        self._wake()
        return True

    def _read(self, entry: Entry) -> None:
        began = time.perf_counter()
        with self._open(entry.digest, entry.path) as file:
            with self._changed:
                if not self._room_for(entry, file.nbytes):
                    return
            adapter = file.read()
        with self._changed:
            entry.host = adapter
            self._host_filled += 1
            self._counts["loads"] += 1
            self._seconds["read_seconds"] += time.perf_counter() - began

    def _copy_to_slot(self, entry: Entry) -> None:
        began = time.perf_counter()
        with self._changed:
            if not entry.slot or entry.device is not None:
                return
        copy = self._place(entry.host)
        with self._changed:
            if entry.slot:  # not given away meanwhile
                self._fill_slot(entry, copy)
            self._counts["placed"] += 1
            self._seconds["place_seconds"] += time.perf_counter() - began

    # --- with the lock held -------------------------------------------------------------------------------------------

    def _entry(self, use: AdapterUse) -> Entry:
        entry = self._entries.get(use.digest)
        if entry is None:
            entry = self._entries[use.digest] = Entry(use.digest, use.path)
        entry.path, entry.pinned = use.path, use.pinned
        return entry

    def _need(self, entry: Entry) -> None:
        """Have a held adapter loaded, unless it is or will be."""
        self._ahead.pop(entry, None)
        self._postponed.pop(entry, None)
        if self._place is None and entry.host is not None and entry.device is None:
            self._fill_slot(entry, entry.host)
        if entry.device is None and not entry.loading and not entry.lacks_room and entry.error is None:
            self._needed[entry] = None

    def _load_ahead(self, entry: Entry) -> None:
        """Have an expected adapter read, unless it is or will be."""
        begun = entry.loading or entry.lacks_room or entry in self._needed or entry in self._postponed
        if entry.host is None and not begun and entry.error is None:
            self._ahead[entry] = None

    def _fill_slot(self, entry: Entry, adapter: Adapter) -> None:
        entry.device = adapter
        self._slots_filled += 1

    def _room_for(self, entry: Entry, size: int) -> bool:
        """Reserve what a load takes; if that can't be had, note what it waits for."""
        if size > self.host_bytes:
            self._give_back(entry)
            raise AdapterInvalid(
                f"adapter {entry.digest}: takes {size} bytes of memory, at most {self.host_bytes} "
                "(engine.host_adapter_bytes) are right"
            )
        if entry.size == size or self._reserve(entry, size):
            return True
        if entry.holders:
            entry.lacks_room = size
        elif entry.expecting:
            self._postponed[entry] = size
        return False

    def _reserve(self, entry: Entry, size: int) -> bool:
        """Take `size` bytes for an adapter, evicting what must go for it and may; all or none."""
        self._give_back(entry)
        excess = self._bytes_taken + size - self.host_bytes
        victims = []
        if excess > 0:
            for victim in self._idle_host.candidates(Worth.PINNED_AND_EXPECTED if entry.holders else Worth.NONE):
                victims.append(victim)
                excess -= victim.size
                if excess <= 0:
                    break
            else:
                return False
        for victim in victims:
            self._evict(victim)
        self._bytes_taken += size
        entry.size, entry.lacks_room = size, 0
        return True

    def _give_back(self, entry: Entry) -> None:
        self._bytes_taken -= entry.size
        entry.size = 0

    def _evict(self, entry: Entry) -> None:
        """Out of host memory, and so out of its slot."""
        self._counts["evictions_host"] += 1
        self._vacate(entry)
        entry.host = None
        self._host_filled -= 1
        self._give_back(entry)
        self._idle_host.discard(entry)
        self._drop_if_unwanted(entry)

    def _vacate(self, entry: Entry) -> None:
        """Give its slot away."""
        if entry.slot:
            self._counts["evictions_device"] += entry.device is not None
            self._slots_filled -= entry.device is not None
            self._slots_taken -= 1
            entry.slot, entry.device = False, None
            self._idle_slots.discard(entry)
            self._drop_if_unwanted(entry)

    def _settle(self, entry: Entry) -> None:
        """Say whether it may be evicted now; it was just used, or is no more."""
        if entry.slot and not entry.holders:
            self._idle_slots.put(entry, entry.worth)
        else:
            self._idle_slots.discard(entry)
        if entry.host is not None and not entry.holders and not entry.loading:
            self._idle_host.put(entry, entry.worth)
        else:
            self._idle_host.discard(entry)

    def _let_go(self, entry: Entry) -> None:
        """The last holder is gone."""
        entry.lacks_room = 0
        self._needed.pop(entry, None)
        if entry.host is None and not entry.loading:
            self._give_back(entry)  # what was reserved for a load that did not begin
            self._vacate(entry)
            if entry.expecting:
                self._load_ahead(entry)
        entry.error = None
        self._settle(entry)
        self._drop_if_unwanted(entry)

    def _loaded(self, entry: Entry, error: Exception | None) -> None:
        """A load is over, one way or the other."""
        if error is not None:
            self._counts["failed_loads"] += 1
            if entry.host is None:
                self._give_back(entry)
            entry.error = error if entry.holders else None
        if entry.holders:
            self._need(entry)  # somebody took a slot for it meanwhile
        elif entry.host is None:
            self._vacate(entry)
        self._settle(entry)
        self._drop_if_unwanted(entry)

    def _drop_if_unwanted(self, entry: Entry) -> None:
        if not (entry.expecting or entry.holders or entry.loading or entry.slot or entry.host is not None):
            self._give_back(entry)
            self._ahead.pop(entry, None)
            self._postponed.pop(entry, None)
            self._entries.pop(entry.digest, None)

    def _retry_postponed(self) -> None:
        """Somebody let go of something: those that found no room may find it now, in their order."""
        while self._postponed:
            entry, size = next(iter(self._postponed.items()))
            if not self._reserve(entry, size):
                return
            del self._postponed[entry]
            self._ahead[entry] = None
            self._changed.notify()


def _distinct(uses: Iterable[AdapterUse]) -> Iterable[AdapterUse]:
    return {use.digest: use for use in uses}.values()
