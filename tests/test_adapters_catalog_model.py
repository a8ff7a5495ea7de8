"""Any order of changes by two writers, against a catalog of dictionaries, as an open reader and a new one see it."""

from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from openlora.adapters.catalog import Catalog
from openlora.adapters.catalog_reader import CatalogReader
from openlora.adapters.catalog_rows import AdapterFilter, AdapterRecord, BaseFacts
from openlora.errors import AdapterInvalid, AdapterNotFound

BASES = [BaseFacts("/models/base", digest * 64, max_rank) for digest in "bc" for max_rank in (4, 16)]
NAMES = st.sampled_from(["cook", "poet", "poet-2"])
VERSIONS = st.integers(1, 5)
WRITERS = st.integers(0, 1)


@dataclass
class Name:
    """What a name means, in the plainest way."""

    versions: dict[int, AdapterRecord] = field(default_factory=dict)
    current: int = 0
    pinned: bool = False
    last: int = 0

    def meant_by(self, record: AdapterRecord) -> AdapterRecord | None:
        """The version that has the bytes of `record` and may answer for a `put` of it."""
        if not self.versions:
            return None
        candidates = [self.versions[self.current]]
        if record.origin:
            mine = [old for old in self.versions.values() if old.origin == record.origin]
            candidates = [mine[-1], *candidates] if mine else [*candidates, *reversed(self.versions.values())]
        return next((old for old in candidates if old.digest == record.digest), None)


class CatalogModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = TemporaryDirectory()
        self.path = Path(self.directory.name) / "catalog.sqlite"
        self.writers = [Catalog(self.path), Catalog(self.path)]
        self.reader = CatalogReader(self.path)
        self.names: dict[str, Name] = {}
        self.base: BaseFacts | None = None

    def teardown(self) -> None:
        self.reader.close()
        for writer in self.writers:
            writer.__exit__()
        self.directory.cleanup()

    @rule(
        by=WRITERS,
        name=NAMES,
        digest=st.sampled_from("123"),
        origin=st.sampled_from(["", "/adapters"]),
        rank=st.sampled_from([4, 8]),
        status=st.sampled_from(["ready", "ready", "quarantined"]),
        base=st.sampled_from("bc"),
    )
    def put(self, by, name, digest, origin, rank, status, base):
        reason = "" if status == "ready" else "holds NaN"
        card = {"rank": rank} if rank > 4 else None
        record = AdapterRecord(name, 0, digest * 64, rank, status, reason, card, ("q_proj",), base * 64, origin=origin)
        model = self.names.setdefault(name, Name())
        same = model.meant_by(record)
        stored, change = self.writers[by].put(record)
        if same is None:
            model.last += 1
            model.current = model.last
            expected, said = replace(record, version=model.last, added_at=stored.added_at), "added"
        else:
            expected = replace(record, version=same.version, origin=same.origin, added_at=same.added_at)
            said = "unchanged" if expected == same else "updated"
        model.versions[expected.version] = expected
        assert (stored, change) == (expected, said)
        assert (stored.current, stored.pinned) == self.flags(expected)

    @rule(by=WRITERS, name=NAMES, version=st.one_of(st.none(), VERSIONS))
    def remove(self, by, name, version):
        model = self.names.get(name, Name())
        expected = [number for number in model.versions if version in (None, number)]
        try:
            gone = [record.version for record in self.writers[by].remove(name, version)]
        except AdapterNotFound:
            gone = []
        assert gone == expected
        self.forget(name, expected)

    @rule(by=WRITERS, present=st.sets(NAMES))
    def sync(self, by, present):
        expected = [
            (name, number)
            for name in sorted(set(self.names) - present)
            for number, record in self.names[name].versions.items()
            if record.origin == "/adapters"
        ]
        gone = self.writers[by].remove_absent("/adapters", present)
        assert [(record.name, record.version) for record in gone] == expected
        for name, number in expected:
            self.forget(name, [number])

    @rule(by=WRITERS, name=NAMES, version=VERSIONS)
    def use(self, by, name, version):
        record = self.names.get(name, Name()).versions.get(version)
        try:
            assert self.writers[by].use(name, version).version == version
        except AdapterNotFound:
            assert record is None
        except AdapterInvalid:
            assert self.status(record) == "quarantined"
        else:
            assert self.status(record) == "ready"
            self.names[name].current = version

    @rule(by=WRITERS, name=NAMES, pinned=st.booleans())
    def pin(self, by, name, pinned):
        model = self.names.get(name, Name())
        try:
            self.writers[by].pin(name, pinned)
        except AdapterNotFound:
            assert not model.versions
        else:
            model.pinned = pinned

    @rule(by=WRITERS, base=st.sampled_from(BASES))
    def set_base(self, by, base):
        self.writers[by].set_base(base)
        self.base = base

    @invariant()
    def readers_see_what_is_there(self):
        expected = [
            (record.digest, self.status(record), record.card, *self.flags(record)) for record in self.sorted_records()
        ]
        with closing(CatalogReader(self.path)) as fresh:
            for reader in (self.reader, fresh):
                found = reader.records()
                assert [(one.digest, one.status, one.card, one.current, one.pinned) for one in found] == expected
                for one in found:
                    assert reader.find(one.name, one.version) == one
                    assert (reader.find(one.name) == one) == one.current

    @invariant()
    def filters_say_what_the_records_say(self):
        found = self.reader.records()
        for wanted in (AdapterFilter(status="ready"), AdapterFilter(status="quarantined"), AdapterFilter(current=True)):
            expected = [
                one for one in found if wanted.status in (None, one.status) and (one.current or not wanted.current)
            ]
            assert self.reader.page(wanted).records == expected
            by_one, after, more = [], "", True
            while more:
                page = self.reader.page(wanted, after, 1)
                by_one += page.records
                more = page.more
                after = page.records[-1].name if page.records else ""
            assert by_one == expected

    def sorted_records(self) -> list[AdapterRecord]:
        return [record for name in sorted(self.names) for _, record in sorted(self.names[name].versions.items())]

    def flags(self, record: AdapterRecord) -> tuple[bool, bool]:
        model = self.names[record.name]
        current = model.current == record.version
        return current, current and model.pinned

    def status(self, record: AdapterRecord) -> str:
        fits = self.base is None or (record.base == self.base.digest and record.rank <= self.base.max_rank)
        return record.status if fits else "quarantined"

    def forget(self, name: str, numbers: list[int]) -> None:
        model = self.names.get(name, Name())
        for number in numbers:
            del model.versions[number]
        if not model.versions:
            model.pinned = False
        elif model.current not in model.versions:
            model.current = max(model.versions)


CatalogModel.TestCase.settings = settings(max_examples=40, stateful_step_count=30)
test_catalog = CatalogModel.TestCase
