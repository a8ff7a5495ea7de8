"""The catalog: versions, removal, quarantine, and readers that see other processes' writes."""

import sqlite3
import subprocess
import sys
from dataclasses import replace

import pytest

from openlora.adapters.catalog import Catalog, check_name
from openlora.adapters.catalog_reader import CatalogReader
from openlora.adapters.catalog_rows import AdapterFilter, AdapterRecord, BaseFacts, Page
from openlora.errors import AdapterInvalid, AdapterNotFound, InvalidArgument, Unavailable

BASE = BaseFacts("/models/base", "b" * 64, 64)
CARD = {"schema": 1, "owner": "somebody"}


def a_record(name="poet", digest="1" * 64, **changes):
    return replace(AdapterRecord(name, 0, digest, 8, "ready", "", CARD, ("q_proj",), base=BASE.digest), **changes)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "catalog.sqlite"


@pytest.fixture
def catalog(path):
    with Catalog(path) as catalog:
        catalog.set_base(BASE)
        yield catalog


@pytest.fixture
def reader(path, catalog):
    reader = CatalogReader(path)
    yield reader
    reader.close()


def test_new_bytes_are_a_new_version_and_the_same_bytes_are_not(catalog, reader):
    first, change = catalog.put(a_record(digest="1" * 64))
    assert (first.version, change) == (1, "added")
    again, change = catalog.put(a_record(digest="1" * 64))
    assert (again, change) == (first, "unchanged")
    second, change = catalog.put(a_record(digest="2" * 64, rank=4))
    assert (second.version, change) == (2, "added")
    assert reader.lookup("poet") == second
    assert reader.lookup("poet", 1) == first
    assert reader.records() == [first, second]


def test_use_moves_a_name_to_any_ready_version(catalog, reader):
    for number in (1, 2, 3):
        catalog.put(a_record(digest=str(number) * 64))
    assert reader.lookup("poet").version == 3
    moved = catalog.use("poet", 1)
    assert (moved.version, moved.current) == (1, True)
    assert reader.lookup("poet") == moved
    assert [(record.version, record.current) for record in reader.records()] == [(1, True), (2, False), (3, False)]
    assert reader.lookup("poet", 3).current is False
    assert catalog.use("poet", "22222222").version == reader.lookup("poet").version == 2
    assert catalog.use("poet", "2").version == 2
    catalog.put(a_record(digest="4" * 64))
    assert reader.lookup("poet").version == 4


def test_a_name_can_not_move_to_what_does_not_answer(catalog, reader):
    catalog.put(a_record(status="quarantined", reason="holds NaN"))
    catalog.put(a_record(digest="2" * 64, rank=32))
    catalog.put(a_record(digest="3" * 64))
    with pytest.raises(AdapterInvalid, match="adapter poet version 1: holds NaN"):
        catalog.use("poet", 1)
    for version in (4, "4", "abcdef012"):
        with pytest.raises(AdapterNotFound):
            catalog.use("poet", version)
    with pytest.raises(InvalidArgument, match="neither a number nor"):
        catalog.use("poet", "latest")
    with pytest.raises(AdapterNotFound, match="no adapter 'nobody'"):
        catalog.use("nobody", 1)
    catalog.set_base(replace(BASE, max_rank=16))
    with pytest.raises(AdapterInvalid, match="rank 32 is over the limit of 16"):
        catalog.use("poet", 2)
    assert reader.lookup("poet").version == 3


def test_bytes_that_are_known_do_not_move_a_name(catalog, reader):
    """What the name means already, by hand; whatever came from a directory last, when its server starts again."""
    for origin, digest in (("/adapters", "1"), ("", "2"), ("/adapters", "3")):
        catalog.put(a_record(digest=digest * 64, origin=origin))
    catalog.use("poet", 1)
    assert catalog.put(a_record())[1] == "unchanged"
    stored, change = catalog.put(a_record(digest="3" * 64, origin="/adapters"))
    assert (stored.version, stored.current, change) == (3, False, "unchanged")
    stored, change = catalog.put(a_record(digest="2" * 64, origin="/other"))
    assert (stored.version, stored.origin, change) == (2, "", "unchanged")
    assert reader.lookup("poet").version == 1
    stored, change = catalog.put(a_record(digest="2" * 64))  # by hand, and not what the name means
    assert (stored.version, stored.current, change) == (4, True, "added")


def test_a_pin_is_of_the_name_and_shows_on_its_current_version(catalog, reader):
    catalog.put(a_record(digest="1" * 64))
    catalog.put(a_record("cook"))
    catalog.pin("poet")
    catalog.pin("poet")
    assert reader.lookup("poet").pinned
    assert not reader.lookup("cook").pinned
    stored, _ = catalog.put(a_record(digest="2" * 64))
    assert stored.pinned
    assert [(record.version, record.pinned) for record in reader.page(AdapterFilter(pinned=True)).records] == [
        (1, False),
        (2, True),
    ]
    catalog.use("poet", 1)
    assert (reader.lookup("poet").pinned, reader.lookup("poet", 2).pinned) == (True, False)
    catalog.pin("poet", False)
    assert not any(record.pinned for record in reader.records())
    for pinned in (True, False):
        with pytest.raises(AdapterNotFound, match="no adapter 'nobody'"):
            catalog.pin("nobody", pinned)


def test_removing_the_current_version_leaves_the_newest_of_the_others(catalog, reader):
    for number in (1, 2, 3):
        catalog.put(a_record(digest=str(number) * 64))
    catalog.use("poet", 1)
    catalog.pin("poet")
    catalog.remove("poet", 3)
    assert reader.lookup("poet").version == 1
    catalog.remove("poet", 1)
    assert (reader.lookup("poet").version, reader.lookup("poet").pinned) == (2, True)
    catalog.remove("poet")
    with pytest.raises(AdapterNotFound):
        catalog.pin("poet")
    catalog.put(a_record(digest="2" * 64))
    assert (reader.lookup("poet").version, reader.lookup("poet").pinned) == (4, False)


def test_what_a_directory_no_longer_has_is_removed_at_once(catalog, reader):
    for name, origin in (("poet", "/a"), ("cook", "/a"), ("bard", "/b"), ("cook", "")):
        catalog.put(a_record(name, digest=f"{len(origin) + len(name):064x}", origin=origin))
    gone = catalog.remove_absent("/a", {"poet"})
    assert [(record.name, record.version) for record in gone] == [("cook", 1)]
    assert [(record.name, record.version) for record in reader.records()] == [("bard", 1), ("cook", 2), ("poet", 1)]
    assert catalog.remove_absent("/a", {"poet"}) == []


def test_pages_hold_all_versions_of_their_names(catalog, reader):
    names = [f"poet-{number:02}" for number in range(10)]
    for number, name in enumerate(names):
        for version in range(1 + number % 3):
            catalog.put(a_record(name, digest=f"{version:064x}"))
    pages, after, more = [], "", True
    while more:
        page = reader.page(after=after, limit=4)
        pages.append(page.records)
        after, more = page.records[-1].name, page.more
    assert [len({record.name for record in page}) for page in pages] == [4, 4, 2]
    assert [record for page in pages for record in page] == reader.records()
    assert reader.page(after="poet-09", limit=4) == Page([], False)
    assert reader.page(limit=10) == Page(reader.records(), False)
    assert [record.name for record in reader.page(after="poet-085").records] == ["poet-09"]


def test_filters(catalog, reader):
    catalog.put(a_record("poet", target_modules=("q_proj", "v_proj")))
    catalog.put(a_record("poet", digest="2" * 64, rank=32, target_modules=("down_proj",)))
    catalog.put(a_record("Poet"))
    catalog.put(a_record("cook", status="quarantined", reason="holds NaN"))
    catalog.put(a_record("bard", base="a" * 64))
    catalog.pin("cook")

    def found(**wanted):
        return [(record.name, record.version) for record in reader.page(AdapterFilter(**wanted)).records]

    assert found(name="po*") == [("poet", 1), ("poet", 2)]
    assert found(name="?o[eo]?") == [("Poet", 1), ("cook", 1), ("poet", 1), ("poet", 2)]
    assert found(name="o") == found(target="q_pro") == []
    assert found(target="v_proj") == [("poet", 1)]
    assert found(status="quarantined") == [("bard", 1), ("cook", 1)]
    assert found(status="ready", current=True) == [("Poet", 1), ("poet", 2)]
    assert found(pinned=True) == [("cook", 1)]
    assert found(pinned=True, status="ready") == []
    assert reader.page(AdapterFilter(target="down_proj"), limit=1).more is False
    catalog.set_base(replace(BASE, max_rank=16))
    assert found(status="quarantined") == [("bard", 1), ("cook", 1), ("poet", 2)]
    assert reader.names() == ["Poet"]


def test_going_back_to_older_bytes_is_a_version_too(catalog, reader):
    for digest in ("1" * 64, "2" * 64, "1" * 64):
        catalog.put(a_record(digest=digest))
    assert reader.lookup("poet").version == 3
    assert reader.lookup("poet", "11111111").version == 3


def test_a_changed_card_or_status_keeps_the_version(catalog, reader):
    catalog.put(a_record())
    stored, change = catalog.put(a_record(card={**CARD, "licence": "MIT"}))
    assert (stored.version, change) == (1, "updated")
    assert reader.lookup("poet").card == {**CARD, "licence": "MIT"}
    catalog.put(a_record(status="quarantined", reason="holds NaN"))
    with pytest.raises(AdapterInvalid, match="holds NaN"):
        reader.lookup("poet")
    catalog.put(a_record())
    assert reader.lookup("poet").version == 1


def test_lookup_by_number_digest_and_their_texts(catalog, reader):
    one, _ = catalog.put(a_record(digest="12345678" + "a" * 56))
    two, _ = catalog.put(a_record(digest="12345678" + "b" * 56))
    assert reader.lookup("poet", "1") == one
    assert reader.lookup("poet", "12345678a") == one
    assert reader.lookup("poet", two.digest) == two
    with pytest.raises(InvalidArgument, match="fits several versions"):
        reader.lookup("poet", "12345678")
    for unknown in (0, 3, -1, "3", "abcdef012"):
        with pytest.raises(AdapterNotFound):
            reader.lookup("poet", unknown)
    for wrong in ("", "abc", "1234567G", "12345678" * 9, "latest", "ABCDEF01"):
        with pytest.raises(InvalidArgument, match="neither a number nor"):
            reader.lookup("poet", wrong)
    with pytest.raises(AdapterNotFound, match="no adapter 'nobody'"):
        reader.lookup("nobody")


def test_a_quarantined_newest_version_is_named_not_skipped(catalog, reader):
    good, _ = catalog.put(a_record())
    catalog.put(a_record(digest="2" * 64, status="quarantined", reason="rank 999 is over the limit of 64"))
    with pytest.raises(AdapterInvalid) as caught:
        reader.lookup("poet")
    assert str(caught.value) == "[ADAPTER_INVALID] adapter poet: rank 999 is over the limit of 64"
    assert reader.lookup("poet", 1) == good
    assert reader.names() == []
    assert reader.find("poet").status == "quarantined"
    catalog.remove("poet", 2)
    assert reader.lookup("poet") == good
    assert reader.names() == ["poet"]


def test_removal_is_for_good_and_numbers_are_not_used_again(catalog, reader):
    catalog.put(a_record())
    assert [record.version for record in catalog.remove("poet")] == [1]
    assert reader.records() == []
    for version in (None, 1, "11111111"):
        with pytest.raises(AdapterNotFound):
            reader.lookup("poet", version)
    with pytest.raises(AdapterNotFound, match="no adapter 'poet'"):
        catalog.remove("poet")
    stored, change = catalog.put(a_record())
    assert (stored.version, change) == (2, "added")


def test_what_was_checked_against_another_base_is_refused(catalog, reader):
    catalog.put(a_record())
    catalog.set_base(replace(BASE, digest="c" * 64))
    with pytest.raises(AdapterInvalid, match="checked against base model bbbbbbbbbbbbbbbb…, this server runs cccc"):
        reader.lookup("poet")
    assert reader.names() == []
    catalog.set_base(replace(BASE, max_rank=4))
    with pytest.raises(AdapterInvalid, match="rank 8 is over the limit of 4"):
        reader.lookup("poet")
    catalog.set_base(BASE)
    assert reader.lookup("poet").version == 1


def test_a_directorys_adapter_and_one_added_by_hand_do_not_fight(catalog, reader):
    """The directory syncs at every start; what was added by hand under the same name stays the newest."""
    catalog.put(a_record(digest="1" * 64, origin="/adapters"))
    catalog.put(a_record(digest="2" * 64))
    stored, change = catalog.put(a_record(digest="1" * 64, origin="/adapters"))
    assert (stored.version, change) == (1, "unchanged")
    assert reader.lookup("poet").digest == "2" * 64
    assert catalog.current("poet", "/adapters").version == 1
    assert catalog.current("poet", "").version == 2
    catalog.put(a_record("cook"))
    assert [(record.name, record.version) for record in catalog.current_of_all("/adapters")] == [
        ("cook", 1),
        ("poet", 1),
    ]
    assert [(record.name, record.version) for record in catalog.current_of_all("")] == [("cook", 1), ("poet", 2)]


def test_an_open_reader_sees_another_process_write(path, catalog, reader):
    assert reader.records() == []
    script = (
        "import sys; from pathlib import Path; from openlora.adapters.catalog import Catalog\n"
        "from openlora.adapters.catalog_rows import AdapterRecord\n"
        "with Catalog(Path(sys.argv[1])) as catalog:\n"
        "    catalog.put(AdapterRecord('poet', 0, '1' * 64, 8, 'ready', '', None, base='b' * 64))\n"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], check=True)
    assert reader.lookup("poet").version == 1


def test_a_lookup_is_one_query_however_much_there_is(catalog, reader):
    """It finds its row by the primary keys: no scan, and no other row is touched."""
    for number in range(3):
        catalog.put(a_record(f"poet-{number}"))
    statements = []
    reader._connection.set_trace_callback(statements.append)
    reader.lookup("poet-1")
    reader._connection.set_trace_callback(None)
    (statement,) = statements
    plan = [row[3] for row in catalog._connection.execute(f"EXPLAIN QUERY PLAN {statement}")]
    assert len(plan) == 4
    assert all(step.startswith("SEARCH ") for step in plan)


BUSY_WRITER = """
import sys
from pathlib import Path
from openlora.adapters.catalog import Catalog
from openlora.adapters.catalog_rows import AdapterRecord
with Catalog(Path(sys.argv[1])) as catalog:
    for version in range(1, 201):
        catalog.put(AdapterRecord("poet", 0, f"{version:064x}", 8, "ready", "", {"is": version}, base="b" * 64))
        if version == 1:
            sys.stdin.readline()
        if version % 10 == 0:
            catalog.use("poet", version - 5)
"""


def test_a_reader_beside_a_busy_writer_sees_only_whole_versions(path, catalog, reader):
    command = [sys.executable, "-c", BUSY_WRITER, str(path)]
    seen = set()
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as writer:
        while (running := writer.poll() is None) or 195 not in seen:
            assert running or writer.returncode == 0
            try:
                record = reader.lookup("poet")
            except AdapterNotFound:
                assert not seen
                continue
            assert (int(record.digest, 16), record.card["is"]) == (record.version, record.version)
            if not seen:
                writer.stdin.write("go on\n")
                writer.stdin.flush()
            seen.add(record.version)
    assert {1, 195} <= seen <= set(range(1, 201))
    assert [record.version for record in reader.records() if record.current] == [195]


def test_a_reader_can_not_write_and_needs_a_catalog(path, tmp_path, reader):
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader._connection.execute("DELETE FROM adapters")
    with pytest.raises(Unavailable, match="no adapter catalog"):
        CatalogReader(tmp_path / "other.sqlite")
    assert not (tmp_path / "other.sqlite").exists()


def test_a_transaction_that_fails_leaves_nothing(path, catalog, reader):
    with pytest.raises(sqlite3.IntegrityError):
        catalog.put(a_record(status="fine"))
    assert reader.records() == []
    catalog.put(a_record())
    assert path.stat().st_mode & 0o777 == 0o600


def test_names(catalog):
    for good in ("a", "A-1_b.c", "0", "x" * 128):
        check_name(good)
    for bad in ("", ".", "..", "-a", "a/b", "a b", "é", "x" * 129, "a\n", "base"):
        with pytest.raises(InvalidArgument):
            check_name(bad)


def test_opening_the_catalog_again_takes_no_locks_away(path):
    """The last connection to go removes the log; one that is wrongly taken for the last loses others' changes."""
    put = (
        "import pathlib, sys; from openlora.adapters.catalog import Catalog\n"
        "from openlora.adapters.catalog_rows import AdapterRecord\n"
        "with Catalog(pathlib.Path(sys.argv[1])) as other:\n"
        "    other.put(AdapterRecord(sys.argv[2], 0, 'ab' * 32, 4, 'ready', '', None))\n"
    )
    with Catalog(path) as first:
        for name in ("theirs-1", "theirs-2"):
            with Catalog(path):
                pass
            subprocess.run([sys.executable, "-c", put, str(path), name], check=True)
            assert first.current(name, "") is not None
            first.put(a_record(f"after-{name}"))
    reader = CatalogReader(path)
    assert reader.names() == ["after-theirs-1", "after-theirs-2", "theirs-1", "theirs-2"]
    reader.close()
