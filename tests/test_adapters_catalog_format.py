"""Catalogs of older formats: opened by a reader or a writer first, they mean what they meant."""

import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace

import pytest

from openlora.adapters.catalog import Catalog
from openlora.adapters.catalog_file import FORMAT
from openlora.adapters.catalog_reader import CatalogReader
from openlora.adapters.catalog_rows import AdapterRecord
from openlora.errors import AdapterInvalid, AdapterNotFound, Unavailable

# As written by the first version of this project.
FORMAT_0 = """
CREATE TABLE base (
    id INTEGER PRIMARY KEY CHECK (id = 1), path TEXT NOT NULL, digest TEXT NOT NULL, max_rank INTEGER NOT NULL
) STRICT;
CREATE TABLE adapters (
    name TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL, base TEXT NOT NULL, rank INTEGER NOT NULL,
    target_modules TEXT NOT NULL, status TEXT NOT NULL CHECK (status IN ('ready', 'quarantined')),
    reason TEXT NOT NULL, card TEXT, source TEXT NOT NULL, origin TEXT NOT NULL, source_state TEXT NOT NULL,
    added_at INTEGER NOT NULL, removed_at INTEGER,
    PRIMARY KEY (name, version)
) STRICT;
"""
BASE = "b" * 64
ROWS = [  # name, version, digest, status, reason, removed_at
    ("poet", 1, "1" * 64, "ready", "", None),
    ("poet", 2, "2" * 64, "ready", "", None),
    ("poet", 3, "3" * 64, "ready", "", 17),
    ("cook", 1, "1" * 64, "ready", "", None),
    ("cook", 2, "2" * 64, "quarantined", "holds NaN", None),
    ("gone", 1, "1" * 64, "ready", "", 17),
]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "catalog.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(FORMAT_0)
        connection.execute("INSERT INTO base VALUES (1, '/models/base', ?, 64)", (BASE,))
        connection.executemany(
            "INSERT INTO adapters VALUES "
            "(?, ?, ?, ?, 8, 'q_proj v_proj', ?, ?, '{\"schema\": 1}', '/from', '', '', 5, ?)",
            [(name, version, digest, BASE, *rest) for name, version, digest, *rest in ROWS],
        )
    return path


def check(reader):
    poet = AdapterRecord(
        "poet", 2, "2" * 64, 8, "ready", "", {"schema": 1}, ("q_proj", "v_proj"), BASE, "/from", added_at=5
    )
    assert reader.lookup("poet") == poet
    assert reader.lookup("poet", 1).digest == "1" * 64
    assert reader.names() == ["poet"]
    with pytest.raises(AdapterInvalid, match="holds NaN"):
        reader.lookup("cook")
    for name, version in (("gone", None), ("gone", 1), ("poet", 3)):
        with pytest.raises(AdapterNotFound):
            reader.lookup(name, version)
    flags = [(record.name, record.version, record.current, record.pinned) for record in reader.records()]
    assert flags == [
        ("cook", 1, False, False),
        ("cook", 2, True, False),
        ("poet", 1, False, False),
        ("poet", 2, True, False),
    ]


@pytest.mark.parametrize("writer_first", [False, True])
def test_an_old_file_means_what_it_meant_and_takes_changes(path, writer_first):
    if writer_first:
        Catalog(path).__exit__()
    with closing(CatalogReader(path)) as reader, Catalog(path) as catalog:
        check(reader)
        catalog.use("poet", 1)
        assert reader.lookup("poet").version == 1
        stored, _ = catalog.put(AdapterRecord("gone", 0, "1" * 64, 8, "ready", "", None, base=BASE))
        assert stored.version == 2
    with closing(CatalogReader(path)) as reader:
        assert reader.lookup("poet").version == 1  # not brought to today's format a second time


# Before it was known of a version whether its source wanted a login.
FORMAT_2 = """
CREATE TABLE names (
    name TEXT PRIMARY KEY, current INTEGER NOT NULL, pinned INTEGER NOT NULL DEFAULT 0 CHECK (pinned IN (0, 1))
) STRICT, WITHOUT ROWID;
INSERT INTO names VALUES ('poet', 1, 1), ('cook', 2, 0);
PRAGMA user_version = 2;
"""


@pytest.mark.parametrize("writer_first", [False, True])
def test_a_file_of_format_2_keeps_what_was_chosen_and_learns_of_logins(path, writer_first):
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(FORMAT_2)
        connection.execute("UPDATE adapters SET source = 'https://host/poet'")
    if writer_first:
        Catalog(path).__exit__()
    with closing(CatalogReader(path)) as reader, Catalog(path) as catalog:
        poet = reader.lookup("poet")
        assert (poet.version, poet.pinned, poet.login) == (1, True, False)
        assert reader.irreplaceable() == {"1" * 64}  # pinned
        signed, change = catalog.put(replace(reader.find("cook"), login=True))
        assert (signed.login, change) == (True, "unchanged")
        assert reader.irreplaceable() == {"1" * 64, "2" * 64}
    with closing(CatalogReader(path)) as reader:
        assert reader.find("cook").login


def test_many_processes_may_open_it_first(path):
    script = (
        "import sys; from pathlib import Path; from openlora.adapters.catalog_reader import CatalogReader\n"
        "sys.stdin.readline(); print(CatalogReader(Path(sys.argv[1])).lookup('poet').version)\n"
    )
    command = [sys.executable, "-c", script, str(path)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate()[0] for process in processes] == ["2\n"] * 4
    with closing(CatalogReader(path)) as reader:
        check(reader)


def test_a_file_of_a_newer_format_is_refused(path):
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {FORMAT + 1}")
    for opened in (Catalog, CatalogReader):
        with pytest.raises(Unavailable, match=f"of format {FORMAT + 1}, made by a newer OpenLoRA"):
            opened(path)
