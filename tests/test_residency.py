"""Where adapters are: what is found in which tier, what goes first, and limits that hold at any time."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapter_store import AdapterStore
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_run import SchedulerRun

from openlora.engine.adapter_block import Adapter
from openlora.engine.api import WEIGHT_ONE, AdapterUse
from openlora.engine.host_memory import default_adapter_bytes
from openlora.engine.residency import Residency
from openlora.errors import AdapterInvalid, InvalidArgument

SIZE = AdapterStore().size("any")  # of an adapter of rank 1


def uses(digests: str, pinned: str = "") -> tuple[AdapterUse, ...]:
    return tuple(AdapterUse(digest, "path", WEIGHT_ONE, digest in pinned) for digest in digests)


def make(store: AdapterStore | None = None, *, slots: int = 2, room: int = 4) -> Residency:
    """Memory for `room` adapters of rank 1."""
    return Residency((store or AdapterStore()).open, slots=slots, host_bytes=room * SIZE, wake=lambda: None)


def load(residency: Residency) -> None:
    while residency.load_next():
        pass


def visit(residency: Residency, digests: str, pinned: str = "") -> list[Adapter]:
    """One request from submission to end."""
    wanted = uses(digests, pinned)
    residency.prefetch(wanted)
    assert residency.hold(wanted)
    load(residency)
    adapters = residency.ready(wanted)
    assert [adapter.digest for adapter in adapters] == list(digests)
    residency.release(wanted)
    residency.forget(wanted)
    return adapters


def hits(residency: Residency) -> tuple[int, int, int]:
    stats = residency.stats()
    return stats.hits_device, stats.hits_host, stats.hits_disk


def test_what_lost_its_slot_is_found_in_host_memory():
    store = AdapterStore()
    residency = make(store, slots=2, room=4)
    for digest in "abc":
        visit(residency, digest)
    assert hits(residency) == (0, 0, 3)
    (found,) = visit(residency, "a")  # c took its slot
    (again,) = visit(residency, "a")
    assert found is again
    assert hits(residency) == (1, 1, 3)
    assert store.read == {"a": 1, "b": 1, "c": 1}
    stats = residency.stats()
    assert (stats.slots_filled, stats.host_adapters, stats.host_bytes) == (2, 3, 3 * SIZE)
    assert (stats.loads, stats.evictions_device, stats.evictions_host) == (3, 2, 0)


def test_least_recently_used_goes_first():
    store = AdapterStore()
    residency = make(store, slots=4, room=3)
    for digest in "abcad":  # d pushes b out, the only one not used since
        visit(residency, digest)
    for digest in "acd":
        visit(residency, digest)
    assert store.read == {"a": 1, "b": 1, "c": 1, "d": 1}
    visit(residency, "b")  # for which a goes
    visit(residency, "c")
    assert store.read["c"] == 1
    visit(residency, "a")
    assert (store.read["a"], store.read["b"]) == (2, 2)


def test_losing_a_slot_is_no_use():
    """c takes the slot of a, which is no younger than b for that: a goes when d comes."""
    store = AdapterStore()
    residency = make(store, slots=2, room=3)
    for digest in "abcdb":
        visit(residency, digest)
    assert store.read == {"a": 1, "b": 1, "c": 1, "d": 1}


@pytest.mark.parametrize(("slots", "room"), [(2, 8), (8, 2)])
def test_what_the_catalog_pinned_goes_last_from_both_tiers(slots, room):
    store = AdapterStore()
    residency = make(store, slots=slots, room=room)
    visit(residency, "p", pinned="p")
    for digest in "abcabc":
        visit(residency, digest)
    before = hits(residency)
    visit(residency, "p", pinned="p")
    assert hits(residency)[0] == before[0] + 1
    assert store.read["p"] == 1
    for digest in "qr":
        visit(residency, digest, pinned="qr")
    assert residency.stats().evictions_host == store.read.total() - residency.stats().host_adapters
    before = hits(residency)
    visit(residency, "p")  # with more pinned than there is room for, it is one of them
    assert hits(residency)[0] == before[0]


def test_a_pin_that_was_taken_back_holds_nothing():
    store = AdapterStore()
    residency = make(store, slots=8, room=2)
    visit(residency, "p", pinned="p")
    visit(residency, "p")
    for digest in "abp":
        visit(residency, digest)
    assert store.read["p"] == 2


def test_what_a_request_waits_for_stays_before_what_nobody_wants():
    store = AdapterStore()
    residency = make(store, slots=8, room=2)
    visit(residency, "a")
    residency.prefetch(uses("a"))
    visit(residency, "b")
    visit(residency, "c")  # b goes, though it was used after a
    residency.forget(uses("a"))
    visit(residency, "a")
    assert store.read == {"a": 1, "b": 1, "c": 1}


def test_loads_begin_before_there_is_a_slot():
    store = AdapterStore()
    residency = make(store, slots=1, room=4)
    visit(residency, "a")
    assert residency.hold(uses("a"))
    residency.prefetch(uses("b"))
    load(residency)
    assert store.read == {"a": 1, "b": 1}
    assert not residency.hold(uses("b"))
    residency.release(uses("a"))
    assert residency.hold(uses("b"))
    assert residency.ready(uses("b")) is not None
    assert store.read == {"a": 1, "b": 1}


def test_loads_ahead_take_only_what_nobody_wants_and_come_when_there_is_room():
    store = AdapterStore()
    residency = make(store, slots=4, room=2)
    for digest in "abcd":
        residency.prefetch(uses(digest))
    load(residency)
    assert store.read == {"a": 1, "b": 1}
    for digest, next_one in zip("ab", "cd", strict=True):
        residency.forget(uses(digest))
        load(residency)
        assert store.read[next_one] == 1
    assert residency.stats().host_bytes == 2 * SIZE


def test_what_somebody_holds_a_slot_for_is_loaded_first():
    store = AdapterStore()
    residency = make(store, slots=4, room=8)
    for digest in "abc":
        residency.prefetch(uses(digest))
    assert residency.hold(uses("c"))
    assert residency.load_next()
    assert store.read == {"c": 1}


def test_slots_are_held_all_or_none():
    residency = make(slots=2, room=8)
    assert residency.hold(uses("a"))
    assert not residency.hold(uses("bc"))
    assert residency.hold(uses("b"))
    load(residency)
    assert residency.stats().slots_filled == 2
    residency.release(uses("a"))
    residency.release(uses("b"))
    assert residency.held == 0


def test_an_adapter_over_the_limit_is_refused():
    store = AdapterStore({"big": 6})
    residency = make(store, slots=4, room=4)
    visit(residency, "a")
    big = (AdapterUse("big", "path", WEIGHT_ONE),)
    residency.prefetch(big)
    assert residency.hold(big)
    load(residency)
    with pytest.raises(AdapterInvalid) as caught:
        residency.ready(big)
    size, limit = store.size("big"), 4 * SIZE
    assert str(caught.value) == (
        f"[ADAPTER_INVALID] adapter big: takes {size} bytes of memory, at most {limit} (engine.host_adapter_bytes) are "
        "right"
    )
    residency.release(big)
    residency.forget(big)
    assert store.read == {"a": 1}
    assert residency.stats().host_bytes == SIZE  # nothing was evicted for it, nothing is kept of it


def test_adapters_of_one_request_that_do_not_fit_together_are_refused():
    residency = make(AdapterStore({"x": 3, "y": 3}), slots=4, room=4)
    wanted = uses("xy")
    residency.prefetch(wanted)
    assert residency.hold(wanted)
    load(residency)
    with pytest.raises(InvalidArgument, match="adapters: together they take"):
        residency.ready(wanted)
    residency.release(wanted)
    residency.forget(wanted)
    visit(residency, "x")
    visit(residency, "y")


def test_what_finds_no_room_waits_for_it():
    residency = make(slots=4, room=2)
    assert residency.hold(uses("ab"))
    load(residency)
    assert residency.hold(uses("c"))
    load(residency)
    assert residency.ready(uses("c")) is None
    assert residency.lacks_room(uses("c"))
    assert not residency.lacks_room(uses("ab"))
    residency.release(uses("ab"))
    assert residency.ready(uses("c")) is None
    assert not residency.lacks_room(uses("c"))
    assert residency.stats().host_bytes == 2 * SIZE  # one of them went, and its room is reserved
    load(residency)
    assert residency.ready(uses("c"))[0].digest == "c"


def test_a_load_that_failed_is_tried_again():
    store = AdapterStore()
    store.broken = {"a"}
    residency = make(store)
    wanted = uses("a")
    residency.prefetch(wanted)
    load(residency)  # ahead: nobody is told
    assert residency.hold(wanted)
    load(residency)
    with pytest.raises(AdapterInvalid, match="adapter a: broken"):
        residency.ready(wanted)
    residency.release(wanted)
    residency.forget(wanted)
    assert residency.stats().host_bytes == 0
    assert residency.stats().failed_loads == 2
    assert residency._entries == {}
    store.broken.clear()
    visit(residency, "a")


def test_an_adapter_that_shrank_or_grew_after_it_was_measured_is_counted_as_it_is():
    store = AdapterStore()
    residency = make(store, slots=4, room=3)
    assert residency.hold(uses("ab"))
    load(residency)
    store.ranks["c"] = 2
    assert residency.hold(uses("c"))
    load(residency)
    assert residency.lacks_room(uses("c"))
    residency.release(uses("b"))
    residency.ready(uses("c"))  # reserves two
    store.ranks["c"] = 1
    load(residency)
    assert residency.ready(uses("c")) is not None
    assert residency.stats().host_bytes == 2 * SIZE


def test_a_device_has_copies():
    """With a device of its own, slots are filled by copies, which go with their slots; host memory stays."""
    copies: list[str] = []

    def place(adapter: Adapter) -> Adapter:
        copies.append(adapter.digest)
        return Adapter(adapter.digest, adapter.layout, adapter.block.clone())

    store = AdapterStore()
    residency = Residency(store.open, slots=1, host_bytes=4 * SIZE, wake=lambda: None, place=place)
    residency.prefetch(uses("b"))
    load(residency)
    assert copies == []
    for digest in "aba":
        visit(residency, digest)
    assert copies == ["a", "b", "a"]
    assert store.read == {"a": 1, "b": 1}
    stats = residency.stats()
    assert (stats.placed, stats.loads, stats.slots_filled, stats.evictions_device) == (3, 2, 1, 2)
    residency.forget(uses("b"))


def test_a_copy_to_a_slot_that_failed_once_is_made_by_the_next_request():
    store, failing = AdapterStore(), [RuntimeError("out of device memory")]

    def place(adapter: Adapter) -> Adapter:
        if failing:
            raise failing.pop()
        return adapter

    residency = Residency(store.open, slots=2, host_bytes=4 * SIZE, wake=lambda: None, place=place)
    wanted = uses("a")
    residency.prefetch(wanted)
    assert residency.hold(wanted)
    load(residency)
    with pytest.raises(RuntimeError, match="out of device memory"):
        residency.ready(wanted)
    residency.release(wanted)
    residency.forget(wanted)
    visit(residency, "a")
    stats = residency.stats()
    assert (stats.failed_loads, stats.placed, store.read["a"]) == (1, 1, 1)


class Crowd:
    """Requests in every phase, and what must hold of the residency at any time."""

    def __init__(self, ranks: list[int], slots: int, room: int) -> None:
        self.digests = "abcdefgh"[: len(ranks)]
        self.store = AdapterStore(dict(zip(self.digests, ranks, strict=True)))
        self.residency = make(self.store, slots=slots, room=room)
        self.waiting: list[tuple[AdapterUse, ...]] = []
        self.holding: list[tuple[AdapterUse, ...]] = []

    def submit(self, chosen: list[int], pinned: bool) -> None:
        digests = "".join(sorted({self.digests[index % len(self.digests)] for index in chosen}))
        if len(digests) <= self.residency.slots:
            wanted = uses(digests, digests if pinned else "")
            self.residency.prefetch(wanted)
            self.waiting.append(wanted)

    def hold(self, index: int) -> None:
        if self.waiting and self.residency.hold(self.waiting[index % len(self.waiting)]):
            self.holding.append(self.waiting.pop(index % len(self.waiting)))

    def look(self, index: int) -> None:
        """Ready, still loading, or refused, which ends it."""
        if not self.holding:
            return
        wanted = self.holding[index % len(self.holding)]
        try:
            adapters = self.residency.ready(wanted)
        except (AdapterInvalid, InvalidArgument):
            self.end(index)
            return
        if adapters is not None:
            assert [adapter.digest for adapter in adapters] == [use.digest for use in wanted]

    def end(self, index: int) -> None:
        if self.holding:
            wanted = self.holding.pop(index % len(self.holding))
            self.residency.release(wanted)
            self.residency.forget(wanted)

    def give_up(self, index: int) -> None:
        if self.waiting:
            self.residency.forget(self.waiting.pop(index % len(self.waiting)))

    def put_back(self, index: int) -> None:
        """As one that gives its slots to those before it."""
        if self.holding:
            self.waiting.append(self.holding.pop(index % len(self.holding)))
            self.residency.release(self.waiting[-1])

    def check(self) -> None:
        residency, entries = self.residency, self.residency._entries.values()
        stats = residency.stats()
        assert stats.host_bytes == sum(entry.size for entry in entries) <= residency.host_bytes
        in_memory = [entry for entry in entries if entry.host is not None]
        assert all(entry.size == entry.host.nbytes == self.store.size(entry.digest) for entry in in_memory)
        assert stats.host_adapters == len(in_memory)
        assert sum(entry.slot for entry in entries) == residency._slots_taken <= residency.slots
        assert stats.slots_filled == sum(entry.device is not None for entry in entries)
        assert all(entry.slot and entry.host is entry.device for entry in entries if entry.device is not None)
        held = {use.digest for wanted in self.holding for use in wanted}
        assert {entry.digest for entry in entries if entry.holders} == held
        assert all(residency._entries[digest].slot for digest in held)
        expected = {use.digest for wanted in self.holding + self.waiting for use in wanted}
        assert {entry.digest for entry in entries if entry.expecting} == expected
        assert all(entry.expecting or entry.host is not None or entry.error for entry in entries)
        assert {*residency._idle_host.candidates()} == {entry for entry in in_memory if not entry.holders}
        assert {*residency._idle_slots.candidates()} == {e for e in entries if e.slot and not e.holders}


STEPS = st.one_of(
    st.tuples(st.just("submit"), st.lists(st.integers(0, 7), min_size=1, max_size=3), st.booleans()),
    st.tuples(st.sampled_from(["hold", "look", "end", "give_up", "put_back", "load"]), st.integers(0, 7)),
    st.tuples(st.sampled_from(["hold", "load", "break"]), st.integers(0, 7)),
)


@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=8),
    st.integers(1, 4),
    st.integers(3, 9),
    st.lists(STEPS, max_size=80),
)
@settings(max_examples=300)
def test_limits_and_books_hold_at_any_time(ranks, slots, room, steps):
    crowd = Crowd(ranks, slots, room)
    for name, *arguments in steps:
        if name == "load":
            crowd.residency.load_next()
        elif name == "break":
            crowd.store.broken ^= {crowd.digests[arguments[0] % len(crowd.digests)]}
        else:
            getattr(crowd, name)(*arguments)
        crowd.check()
    crowd.store.broken.clear()
    for wanted in crowd.holding:
        crowd.residency.release(wanted)
        crowd.residency.forget(wanted)
    for wanted in crowd.waiting:
        crowd.residency.forget(wanted)
    crowd.holding, crowd.waiting = [], []
    load(crowd.residency)
    crowd.check()
    for digest in crowd.digests:  # and nobody is locked out
        if crowd.store.size(digest) <= crowd.residency.host_bytes:
            visit(crowd.residency, digest)
            crowd.check()


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.lists(st.sampled_from("abcdef"), max_size=2, unique=True), st.integers(1, 6)),
        max_size=40,
    ),
    st.integers(1, 4),
    st.integers(2, 4),
    st.integers(2, 5),
)
@settings(max_examples=150)
def test_requests_that_hold_memory_in_advance_never_block_everybody(arrivals, max_batch, slots, room):
    """However few adapters fit, every request runs."""
    run = SchedulerRun(max_batch=max_batch, max_adapters=slots, host_bytes=room * SIZE)
    for steps, adapters, length in arrivals:
        for _ in range(steps):
            if run.scheduler.waiting or run.scheduler.running:
                run.step()
        run.add([1] * length, adapters, max_tokens=length)
    run.finish(2000)
    assert len(run.ended) == len(arrivals)


def test_the_default_limit_leaves_memory_to_others(tmp_path: Path):
    def limit(available_kib: int, claimed: int = 0, group: str = "max") -> int:
        (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:  {available_kib} kB\n")
        (tmp_path / "memory.max").write_text(f"{group}\n")
        return default_adapter_bytes(claimed, tmp_path / "meminfo", tmp_path / "memory.max")

    gib = 1 << 30
    assert limit(1 << 20, group=str(8 * gib)) == gib // 2
    assert limit(1 << 20, claimed=gib // 2, group=str(8 * gib)) == gib // 4
    assert limit(1 << 30, group=str(8 * gib)) == 2 * gib
    assert limit(1 << 20, claimed=8 * gib) == 64 << 20
    assert default_adapter_bytes(0, tmp_path / "none", tmp_path / "none") >= 64 << 20
