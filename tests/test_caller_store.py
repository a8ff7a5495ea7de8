"""Callers and keys in `callers.sqlite`: written by one process, followed by another, closed when anything is wrong."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from access_cases import OWNER, SetClock

from openlora.config import UsageLimits
from openlora.errors import InvalidArgument, Unavailable
from openlora.serving.access.caller_directory import CallerDirectory
from openlora.serving.access.caller_store import KEY_PREFIX, CallerStore, digest_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "callers.sqlite"


def keys(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`openlora keys …` as an operator runs it: a process of its own."""
    command = [sys.executable, "-m", "openlora.cli", "keys", *arguments, "--state-dir", str(path.parent)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})


def owner_of(directory: CallerDirectory, api_key: str, now: float | None = None) -> str | None:
    return directory.caller_of_key(digest_of(api_key), time.time() if now is None else now)


def test_a_key_is_printed_once_and_only_its_digest_is_kept(path: Path) -> None:
    added = keys(path, "add", "alice", "--tokens-per-day", "1000")
    api_key = added.stdout.strip()
    assert added.returncode == 0
    assert api_key.startswith(KEY_PREFIX)
    assert len(api_key) == len(KEY_PREFIX) + 43
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    on_disk = b"".join(file.read_bytes() for file in path.parent.iterdir() if file.is_file())
    assert api_key.encode() not in on_disk
    assert api_key[len(KEY_PREFIX) + 8 :].encode() not in on_disk
    assert digest_of(api_key).encode() in on_disk
    (listed,) = json.loads(keys(path, "list", "--json").stdout)
    assert api_key.startswith(listed["prefix"])
    assert (listed["id"], listed["caller"], listed["state"], listed["tokens_per_day"]) == (1, "alice", "valid", 1000)
    shown = keys(path, "show", "1").stdout
    assert "alice" in shown
    assert api_key not in shown
    assert sqlite3.connect(path).execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_running_reader_follows_other_processes(path: Path) -> None:
    """From the next look on, whoever wrote: no key, a key, limits, its end."""
    directory = CallerDirectory(path)
    assert owner_of(directory, "olk_unknown") is None
    assert not directory.has_keys
    api_key = keys(path, "add", "alice").stdout.strip()
    assert owner_of(directory, api_key) == "alice"
    assert directory.limits("alice") is None
    keys(path, "limit", "alice", "--requests-per-minute", "5")
    keys(path, "limit", "alice", "--tokens-per-day", "7")
    assert directory.limits("alice") == UsageLimits(requests_per_minute=5, tokens_per_day=7)
    keys(path, "limit", "alice", "--clear", "--tokens-per-day", "0")
    assert directory.limits("alice") == UsageLimits(tokens_per_day=0)
    assert keys(path, "revoke", "1").returncode == 0
    assert owner_of(directory, api_key) is None
    assert directory.has_keys  # there was one: keys mean something here
    assert json.loads(keys(path, "list", "--json").stdout) == []
    assert json.loads(keys(path, "list", "--all", "--json").stdout)[0]["state"] == "revoked"


def test_expiry(path: Path) -> None:
    now = int(time.time())
    with CallerStore(path) as store:
        _, api_key = store.add_key("alice", expires_at=now + 100)
        with pytest.raises(InvalidArgument, match="has passed"):
            store.add_key("alice", expires_at=now - 1)
    directory = CallerDirectory(path)
    assert owner_of(directory, api_key, now + 99) == "alice"
    assert owner_of(directory, api_key, now + 100) is None
    for wrong in ("tomorrow", "0d", "-1h", "1w", "2020-01-01"):
        assert keys(path, "add", "bob", f"--expires={wrong}").returncode == 2
    added = json.loads(keys(path, "add", "bob", "--expires", "2h", "--json").stdout)
    assert 7190 <= added["expires_at"] - now <= 7300
    dated = json.loads(keys(path, "add", "bob", "--expires", "2100-01-02T03:04", "--json").stdout)
    assert dated["expires_at"] == 4102542240


def test_a_key_from_the_future_means_a_clock_that_was_set_back(path: Path) -> None:
    with CallerStore(path) as store:
        record, api_key = store.add_key("alice")
    directory = CallerDirectory(path)
    assert owner_of(directory, api_key, record.created_at - 50) == "alice"
    assert owner_of(directory, api_key, record.created_at - 3600) is None


@pytest.mark.parametrize("ids", [("1", "99"), ("99", "1")])
def test_of_several_keys_all_are_revoked_or_none(path: Path, ids: tuple[str, str]) -> None:
    with CallerStore(path) as store:
        store.add_key("alice")
        store.add_key("bob")
        refused = keys(path, "revoke", *ids)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "there is no key 99: nothing was revoked" in refused.stderr
        assert [record.revoked_at for record in store.records()] == [None, None]
        assert keys(path, "revoke", "1", "2").stdout == "key 1 of alice: revoked\nkey 2 of bob: revoked\n"
        assert None not in [record.revoked_at for record in store.records()]


def test_addresses(path: Path) -> None:
    clock = SetClock(time.time())
    with CallerStore(path) as store:
        record = store.add_address("alice", OWNER.lower())
        assert (record.kind, record.proof) == ("address", OWNER)
        with pytest.raises(InvalidArgument, match="is known already"):
            store.add_address("bob", OWNER)
        directory = CallerDirectory(path)
        assert directory.caller_of_address(OWNER, clock()) == ("alice", True)
        store.revoke(record.id)
        assert directory.caller_of_address(OWNER, clock()) == (None, True)
        again = store.add_address(OWNER, OWNER)
        assert directory.caller_of_address(OWNER, clock()) == (OWNER, True)
        assert again.id > record.id
        with pytest.raises(InvalidArgument, match="it signs its requests"):
            store.add_key(OWNER.lower())
        with pytest.raises(InvalidArgument, match="name of another address"):
            store.add_address("0x" + "1" * 40, OWNER)
    assert keys(path, "add", "carol", "--address", "0x12").returncode == 2
    assert "no key is made" not in keys(path, "add", "0x" + "2" * 40).stdout


@pytest.mark.parametrize("name", ["", "-x", "a b", "a\n", "é", "x" * 129, "anonymous"])
def test_names_that_no_caller_has(path: Path, name: str) -> None:
    with CallerStore(path) as store, pytest.raises(InvalidArgument):
        store.add_key(name)


def test_revoking_what_is_not_there(path: Path) -> None:
    nothing = keys(path, "list")
    assert (nothing.returncode, "no callers in" in nothing.stderr, path.exists()) == (2, True, False)
    keys(path, "add", "alice")
    refused = keys(path, "revoke", "7")
    assert (refused.returncode, "there is no key 7" in refused.stderr) == (2, True)
    assert keys(path, "show", "7").returncode == 2


def refused(directory: CallerDirectory, api_key: str) -> bool:
    """Nobody gets in: not by a key, not by having none."""
    found = 0
    for look in (lambda: owner_of(directory, api_key), lambda: directory.limits("anonymous")):
        with pytest.raises(Unavailable, match="the callers' file can't be read"):
            look()
        found += 1
    return found == 2


def test_a_store_that_can_not_be_read_refuses_everybody_until_it_can(path: Path) -> None:
    with CallerStore(path) as store:
        _, api_key = store.add_key("alice")
    directory = CallerDirectory(path)
    assert owner_of(directory, api_key) == "alice"
    aside = path.with_name("aside")
    path.rename(aside)
    assert refused(directory, api_key)
    path.write_bytes(b"not a database, but long enough to be read as the header of one" * 20)
    assert refused(directory, api_key)
    path.unlink()
    path.mkdir()
    assert refused(directory, api_key)
    path.rmdir()
    aside.rename(path)
    assert owner_of(directory, api_key) == "alice"


def test_another_file_in_its_place_is_noticed(path: Path) -> None:
    """A restored copy, say: its inode is another one, though the open connection would still read the old file."""
    with CallerStore(path) as store:
        _, api_key = store.add_key("alice")
    directory = CallerDirectory(path)
    assert owner_of(directory, api_key) == "alice"
    other = path.with_name("other.sqlite")
    with CallerStore(other) as store:
        _, new_key = store.add_key("bob")
    other.rename(path)
    assert owner_of(directory, api_key) is None
    assert owner_of(directory, new_key) == "bob"


def test_torn_pages_refuse_everybody(path: Path) -> None:
    with CallerStore(path) as store:
        keys_made = [store.add_key("alice")[1] for _ in range(20)]
        store.set_limits("alice", UsageLimits(tokens_per_day=5))
    content = bytearray(path.read_bytes())
    for page in range(1, len(content) // 4096):  # all but the first one, which holds the schema
        content[page * 4096 : page * 4096 + 512] = os.urandom(512)
    path.write_bytes(bytes(content))
    directory = CallerDirectory(path)
    for look in (*(partial(owner_of, directory, api_key) for api_key in keys_made), partial(directory.limits, "alice")):
        with pytest.raises(Unavailable, match="the callers' file can't be read"):
            look()


def test_a_damaged_row_opens_nothing_and_the_others_go_on(path: Path) -> None:
    """Rows as no code of ours writes them, in tables without the checks that would refuse them."""
    connection = sqlite3.connect(path)
    connection.executescript(
        "CREATE TABLE keys (id, caller, kind, proof, prefix, created_at, expires_at, revoked_at);"
        "CREATE TABLE callers (caller, requests_per_minute, tokens_per_day);"
    )
    now = int(time.time())
    good = ("alice", "key", digest_of("good"), "olk_", now, None, None)
    damaged = [
        (None, "key", digest_of("1"), "", now, None, None),
        ("two words", "key", digest_of("2"), "", now, None, None),
        ("alice", "other", digest_of("3"), "", now, None, None),
        ("alice", "key", digest_of("4").upper(), "", now, None, None),
        ("alice", "key", digest_of("5"), "", None, None, None),
        ("alice", "key", digest_of("6"), "", now, "never", None),
        ("alice", "key", digest_of("7"), "", now, None, "yesterday"),
        ("alice", "key", digest_of("8"), "", now, -1, None),
        ("alice", "key", digest_of("9").encode(), "", now, None, None),
        ("alice", "address", "0x12", "", now, None, None),
    ]
    rows = [(number, *row) for number, row in enumerate([*damaged, good])]
    connection.executemany("INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
    connection.executemany(
        "INSERT INTO callers VALUES (?, ?, ?)", [("bob", -1, None), ("carol", "many", 1), ("dave", 1, 2)]
    )
    connection.commit()
    directory = CallerDirectory(path)
    assert [owner_of(directory, str(number)) for number in range(1, 10)] == [None] * 9
    assert owner_of(directory, "good") == "alice"
    for caller in ("bob", "carol"):
        with pytest.raises(Unavailable, match="the limits of this caller"):
            directory.limits(caller)
    assert directory.limits("dave") == UsageLimits(requests_per_minute=1, tokens_per_day=2)
