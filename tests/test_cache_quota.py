"""The cache's quota: least recently used first, and never what nobody could bring again."""

import os
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_source import ScriptedSource
from tiny_models import make_adapter
from typer.testing import CliRunner

from openlora.adapters.cache_quota import evictions
from openlora.adapters.catalog import Catalog
from openlora.adapters.catalog_reader import CatalogReader
from openlora.adapters.catalog_rows import AdapterRecord
from openlora.adapters.commands import adapters_app
from openlora.adapters.ingest import ingest
from openlora.adapters.ingest_jobs import check_result, job_of
from openlora.adapters.manifest import adapter_manifest
from openlora.adapters.sources import SourceLimits
from openlora.adapters.store import CachedCopy, mark_used
from openlora.errors import Overloaded

LIMITS = SourceLimits(keep_seconds=100, cache_bytes=1000, first_wait_seconds=0.005, longest_wait_seconds=0.02)
NOW = 10_000.0
copies = st.builds(
    CachedCopy, st.text("abcdef", min_size=1, max_size=4), st.integers(1, 500), st.integers(9_800, 10_000).map(float)
)


@given(
    st.lists(copies, unique_by=lambda copy: copy.digest), st.sets(st.text("abcdef", max_size=4)), st.integers(0, 900)
)
def test_as_much_as_is_needed_goes_the_oldest_first_and_nothing_that_must_stay(held, kept, more):
    total = sum(copy.size for copy in held)
    may_go = [copy for copy in held if copy.digest not in kept and copy.last_used < NOW - LIMITS.keep_seconds]
    try:
        gone = evictions(held, kept.__contains__, more, LIMITS, NOW)
    except Overloaded:
        assert total - sum(copy.size for copy in may_go) + more > LIMITS.cache_bytes
        return
    chosen = [next(copy for copy in held if copy.digest == digest) for digest in gone]
    assert all(copy in may_go for copy in chosen)
    left = total - sum(copy.size for copy in chosen)
    assert left + more <= LIMITS.cache_bytes
    stayed = [copy for copy in may_go if copy not in chosen]
    assert all(old.last_used <= young.last_used for old in chosen for young in stayed)
    if chosen:
        assert left + chosen[-1].size + more > LIMITS.cache_bytes  # not one too many


def test_without_a_quota_nothing_goes():
    assert evictions([CachedCopy("a", 1 << 50, 0.0)], bool, 1 << 50, replace(LIMITS, cache_bytes=None)) == []


def test_what_only_this_machine_has_is_irreplaceable(tmp_path):
    remote = AdapterRecord("a", 0, "aa", 4, "ready", "", None, source="https://host/a")
    records = [
        replace(remote, name="pinned", digest="ff"),
        remote,
        replace(remote, digest="bb", source="/models/b"),
        replace(remote, digest="cc", source="merge:123"),
        replace(remote, digest="dd", source="/models/d", status="quarantined"),
        replace(remote, digest="ee"),
        replace(remote, digest="ee", name="e", source="/models/e"),
        replace(remote, name="pinned", digest="gg"),
        replace(remote, name="signed", digest="ii", login=True),
        replace(remote, name="removed", digest="hh", source="/models/h"),
    ]
    with Catalog(tmp_path / "catalog.sqlite") as catalog:
        for record in records:
            catalog.put(record)
        catalog.pin("pinned")
        catalog.remove("removed")
    assert CatalogReader(tmp_path / "catalog.sqlite").irreplaceable() == {"bb", "cc", "dd", "ee", "gg", "ii"}


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(("local", "one", "two", "three")):
        make_adapter(base.path, folder / name, number, r=4, target_modules=["q_proj"])
    return folder


@pytest.fixture
def http(adapters):
    source = ScriptedSource()
    for file in adapters.glob("*/adapter_*"):
        source.files[f"/{file.parent.name}/{file.name}"] = file.read_bytes()
    try:
        yield source
    finally:
        source.close()


def used_at(copy, seconds_ago):
    os.utime(copy, (time.time() - seconds_ago,) * 2)


def test_a_full_cache_lets_the_oldest_remote_copy_go_and_fetch_brings_it_back(
    base, adapters, http, tmp_path, monkeypatch
):
    digests = {folder.name: adapter_manifest(folder).digest for folder in adapters.iterdir()}
    cached = {name: tmp_path / "adapters" / digest for name, digest in digests.items()}
    size = sum(file.stat().st_size for file in (adapters / "one").glob("adapter_*"))
    limits = replace(LIMITS, cache_bytes=3 * size + size // 2)
    add_one = [str(adapters / "local"), f"{http.url}/one", f"{http.url}/two"]
    for source in add_one:
        check_result(*ingest(tmp_path, base, [job_of(source, None)], limits=limits))
    requests = len(http.requests)

    (refused,) = ingest(tmp_path, base, [job_of(f"{http.url}/three", None)], limits=limits)
    assert (refused.status, refused.version) == ("failed", 0)
    assert "the rest is in use or can't be fetched again" in refused.reason
    assert [method for method, _, _ in http.requests[requests:]] == ["HEAD"] * 3  # known before anything was downloaded

    used_at(cached["local"], 9000)
    used_at(cached["one"], 1000)
    used_at(cached["two"], 2000)
    check_result(*ingest(tmp_path, base, [job_of(f"{http.url}/three", None)], limits=limits))
    assert {name for name, copy in cached.items() if copy.exists()} == {"local", "one", "three"}

    shown = CliRunner().invoke(adapters_app, ["show", "two", "--state-dir", str(tmp_path)])
    assert shown.exit_code == 0
    assert not mark_used(cached["two"], 25)
    used_at(cached["one"], 3000)
    assert mark_used(cached["one"], 25)
    used_at(cached["three"], 1000)
    with Catalog(tmp_path / "catalog.sqlite") as catalog:
        catalog.set_base(base)
    monkeypatch.setenv("OPENLORA_SOURCES__CACHE_BYTES", str(limits.cache_bytes))
    fetched = CliRunner().invoke(adapters_app, ["fetch", "two", "--state-dir", str(tmp_path)])
    assert fetched.exit_code == 0, fetched.stderr
    assert fetched.stdout == f"two version 1: fetched ({digests['two'][:16]}…)\n"
    assert {name for name, copy in cached.items() if copy.exists()} == {"local", "one", "two"}
    assert adapter_manifest(cached["two"]).digest == digests["two"]
    hidden = {entry.name for entry in (tmp_path / "adapters").glob(".*")}
    assert hidden == {".lock", ".leases", ".fetching"}
    assert list((tmp_path / "adapters" / ".fetching").iterdir()) == []


def test_a_use_is_noted_once_in_a_while(tmp_path):
    used_at(tmp_path, 20)
    before = tmp_path.stat().st_mtime
    assert mark_used(tmp_path, 25)
    assert tmp_path.stat().st_mtime == before
    assert mark_used(tmp_path, 15)
    assert tmp_path.stat().st_mtime > before + 15


def test_local_adapters_count_and_are_refused_when_nothing_can_go(base, adapters, tmp_path):
    size = sum(file.stat().st_size for file in (adapters / "one").glob("adapter_*"))
    limits = replace(LIMITS, cache_bytes=size + size // 2)
    check_result(*ingest(tmp_path, base, [job_of(str(adapters / "one"), None)], limits=limits))
    used_at(tmp_path / "adapters" / adapter_manifest(adapters / "one").digest, 9000)
    (again,) = ingest(tmp_path, base, [job_of(str(adapters / "one"), "same-bytes")], limits=limits)
    assert again.status == "ready"
    (result,) = ingest(tmp_path, base, [job_of(str(adapters / "two"), None)], limits=limits)
    assert result.status == "failed"
    assert [entry.name for entry in (tmp_path / "adapters").glob("[!.]*")] == [again.digest]
