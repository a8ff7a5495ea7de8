"""The catalog: versions, removal, quarantine, and readers that see other processes' writes."""

import sqlite3
import subprocess
import sys
from dataclasses import replace

import pytest

from openlora.adapters.catalog import AdapterRecord, BaseFacts, Catalog, CatalogReader, check_name
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
    assert [record.version for record in catalog.from_origin("/adapters")] == [1]


def test_an_open_reader_sees_another_process_write(path, catalog, reader):
    assert reader.records() == []
    script = (
        "import sys; from pathlib import Path; from openlora.adapters.catalog import *\n"
        "with Catalog(Path(sys.argv[1])) as catalog:\n"
        "    catalog.put(AdapterRecord('poet', 0, '1' * 64, 8, 'ready', '', None, base='b' * 64))\n"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], check=True)
    assert reader.lookup("poet").version == 1


def test_an_unchanged_catalog_is_not_read_again(catalog, reader):
    catalog.put(a_record())
    before = reader.lookup("poet")
    statements = []
    reader._connection.set_trace_callback(statements.append)
    assert reader.lookup("poet") is before
    catalog.put(a_record())  # no change, so nothing is written
    assert reader.lookup("poet") is before
    assert statements == ["PRAGMA data_version"] * 2
    catalog.put(a_record("cook"))
    reader.lookup("poet")
    assert len(statements) > 3


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
