"""Ingest: what is served is a private, validated copy, whatever happens to the source or to the process."""

import errno
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from access_cases import make_run
from tiny_models import make_adapter, make_model

from openlora.adapters.base_modules import base_modules
from openlora.adapters.catalog import Catalog
from openlora.adapters.catalog_reader import CatalogReader
from openlora.adapters.catalog_rows import BaseFacts
from openlora.adapters.ingest import ingest, sync_directory
from openlora.adapters.ingest_worker import (
    Copied,
    Ingester,
    IngestJob,
    IngestRequest,
    IngestResult,
    Started,
    known_records,
)
from openlora.adapters.manifest import adapter_manifest, model_manifest
from openlora.adapters.store import AdapterStore, Incoming, SourceDirectory, copy_adapter
from openlora.errors import AdapterInvalid, AdapterNotFound, InvalidArgument, Unavailable, UnsupportedModel
from openlora.serving.access.policy import ANONYMOUS, AccessPolicy

WEIGHTS = "adapter_model.safetensors"
ADDRESS = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"  # from EIP-55
CARD = {"schema": 1, "owner": ADDRESS, "licence": "MIT", "prices": {"version": 1, "input": 1, "output": 2}}


@pytest.fixture(scope="module")
def pristine(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine")
    for number, name in enumerate(("cook", "poet")):
        make_adapter(base.path, folder / name, number, r=4, target_modules=["q_proj", "v_proj"])
    return folder


@pytest.fixture
def adapters(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "adapters")


def add(state, base, folder, name=None):
    (result,) = ingest(state, base, [IngestJob(name or folder.name, str(folder))])
    return result


def in_cache(state):
    return sorted(entry.name for entry in (state / "adapters").iterdir() if entry.name != ".lock")


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(state, base, folder):
    result = add(state, base, folder)
    assert (result.status, result.rank) == ("quarantined", 0)
    assert in_cache(state) == []
    (record,) = known_records(state)
    assert (record.status, record.reason) == ("quarantined", result.reason)
    return result.reason


def test_a_good_adapter_is_copied_and_recorded(state, base, adapters):
    source = adapters / "poet"
    (source / "openlora.json").write_text(json.dumps({**CARD, "base": base.digest}))
    seen = []
    (result,) = ingest(state, base, [IngestJob("poet", str(source))], seen.append)
    digest = adapter_manifest(source).digest
    assert result == IngestResult("poet", "ready", 1, digest, 4, "added")
    copy = state / "adapters" / digest
    assert files_of(copy) == {name: (source / name).read_bytes() for name in ("adapter_config.json", WEIGHTS)}
    assert all((copy / name).stat().st_ino != (source / name).stat().st_ino for name in os.listdir(copy))
    assert [path.stat().st_mode & 0o777 for path in (state / "adapters", copy)] == [0o700, 0o700]
    (record,) = known_records(state)
    assert record.card == CARD
    assert (record.base, record.target_modules) == (base.digest, ("q_proj", "v_proj"))
    size = sum((copy / name).stat().st_size for name in os.listdir(copy))
    assert seen == [Started("poet"), Copied("poet", size, size), result]


def test_a_rewritten_source_does_not_change_the_copy(state, base, adapters):
    result = add(state, base, adapters / "poet")
    copy = state / "adapters" / result.digest
    before = files_of(copy)
    with open(adapters / "poet" / WEIGHTS, "r+b") as file:
        file.seek(2000)
        file.write(b"\xff" * 500)
    (adapters / "poet" / "adapter_config.json").write_text("{}")
    assert files_of(copy) == before
    assert adapter_manifest(copy).digest == result.digest


def test_the_same_again_changes_nothing_and_does_not_copy(state, base, adapters):
    def found():  # the files' times are noted as soon as they are old enough
        return [replace(record, source_state="") for record in known_records(state)], in_cache(state)

    first = sync_directory(adapters, state, base)
    before = found()
    again = sync_directory(adapters, state, base)
    assert [result.change for result in first] == ["added", "added"]
    assert [result.change for result in again] == ["unchanged", "unchanged"]
    assert found() == before


@pytest.fixture
def bring_in(state, base, monkeypatch):
    """Ingest in this process, to which every file is old enough for its timestamps to be believed."""
    monkeypatch.setattr("openlora.adapters.store.SETTLED_NS", -1)
    store = AdapterStore(state / "adapters")
    with Catalog(state / "catalog.sqlite") as catalog, store.writing():

        def bring_in(folder):
            events = []
            result = Ingester(state, base, catalog, store, events.append).bring_in(IngestJob("poet", str(folder)))
            return result.change, events != []

        yield bring_in


def test_an_old_unchanged_source_is_not_copied_and_a_changed_one_always_is(bring_in, adapters):
    source = adapters / "poet"
    assert bring_in(source) == ("added", True)
    assert bring_in(source) == ("unchanged", False)
    # rewritten with the same size and its mtime set back: ctime tells
    path = source / WEIGHTS
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert bring_in(source) == ("added", True)
    # another file of the same size and mtime in its place: the inode tells
    shutil.copy2(path, source / "copy")
    os.replace(source / "copy", path)
    assert bring_in(source) == ("unchanged", True)
    (source / "openlora.json").write_text(json.dumps(CARD))
    assert bring_in(source) == ("updated", True)
    assert bring_in(source) == ("unchanged", False)


def test_a_young_source_is_always_copied(bring_in, adapters, monkeypatch):
    monkeypatch.setattr("openlora.adapters.store.SETTLED_NS", 10**18)
    assert bring_in(adapters / "poet") == ("added", True)
    assert bring_in(adapters / "poet") == ("unchanged", True)


def test_a_lost_copy_is_made_again(bring_in, adapters, state):
    bring_in(adapters / "poet")
    (copy,) = (state / "adapters").glob("[!.]*")
    shutil.rmtree(copy)
    assert bring_in(adapters / "poet") == ("unchanged", True)
    assert adapter_manifest(copy).digest == copy.name


def test_new_bytes_are_a_new_version(state, base, adapters):
    one = add(state, base, adapters / "poet")
    two = add(state, base, adapters / "cook", "poet")
    assert (one.version, two.version) == (1, 2)
    assert in_cache(state) == sorted([one.digest, two.digest])


def test_two_names_may_share_their_bytes_but_not_their_terms(state, base, adapters):
    one = add(state, base, adapters / "poet")
    (adapters / "poet" / "openlora.json").write_text(json.dumps(CARD))
    two = add(state, base, adapters / "poet", "bard")
    assert one.digest == two.digest
    assert in_cache(state) == [one.digest]
    assert {record.name: record.card for record in known_records(state)} == {"poet": None, "bard": CARD}


def test_a_changed_card_changes_the_terms_not_the_version(state, base, adapters):
    add(state, base, adapters / "poet")
    (adapters / "poet" / "openlora.json").write_text(json.dumps(CARD))
    result = add(state, base, adapters / "poet")
    assert (result.version, result.change) == (1, "updated")
    assert known_records(state)[0].card == CARD


@pytest.mark.parametrize(
    ("card", "reason"),
    [
        ("[]", "openlora.json holds a list, a JSON object is wanted"),
        ("{", "openlora.json is not JSON"),
        (" " * (64 << 10) + "{}", "openlora.json is 65538 bytes, at most 65536 are possible here"),
        (json.dumps({**CARD, "owner": "nobody"}), "openlora.json: card.owner"),
        (json.dumps({**CARD, "base": "c" * 64}), "made for base model cccccccccccccccc…"),
        (json.dumps({**CARD, "base": 3}), "openlora.json: base is 3, a digest of 64 hex digits is wanted"),
    ],
)
def test_bad_cards_are_refused(state, base, adapters, card, reason):
    (adapters / "poet" / "openlora.json").write_text(card)
    assert reason in refused(state, base, adapters / "poet")


def test_pickle_files_are_refused_and_never_read(state, base, adapters):
    source = adapters / "poet"
    (source / WEIGHTS).rename(source / "adapter_model.bin")
    (source / "adapter_model.bin").chmod(0)
    assert refused(state, base, source) == (
        "holds only adapter_model.bin, a pickle file that could run code; save it as adapter_model.safetensors"
    )


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS])
def test_missing_files_are_refused(state, base, adapters, name):
    (adapters / "poet" / name).unlink()
    assert refused(state, base, adapters / "poet") == f"{name} is missing"


def test_links_are_refused_wherever_they_lead(state, base, adapters, tmp_path):
    (tmp_path / "outside").write_text("secret")
    jobs, reasons = [], []
    for name in ("adapter_config.json", WEIGHTS, "openlora.json"):
        for number, target in enumerate((tmp_path / "outside", "../poet/" + name, "copy", "/dev/zero", "missing")):
            folder = shutil.copytree(adapters / "poet", adapters / f"{name}{number}")
            (folder / "openlora.json").write_text(json.dumps(CARD))
            (folder / name).rename(folder / "copy")
            (folder / name).symlink_to(target)
            jobs.append(IngestJob(folder.name, str(folder)))
            reasons.append(f"{name} is a symbolic link, which may lead anywhere; copy the file itself")
    results = ingest(state, base, jobs)
    assert [result.reason for result in results] == reasons
    assert {result.status for result in results} == {"quarantined"}
    assert in_cache(state) == []


def test_what_is_no_regular_file_is_refused_at_once(state, base, adapters):
    path = adapters / "poet" / WEIGHTS
    path.unlink()
    os.mkfifo(path)
    assert refused(state, base, adapters / "poet") == f"{WEIGHTS} is not a regular file"
    path.unlink()
    path.mkdir()
    assert add(state, base, adapters / "poet").reason == f"{WEIGHTS} is not a regular file"


def test_a_file_larger_than_any_adapter_of_the_base_is_not_copied(state, base, adapters):
    os.truncate(adapters / "poet" / WEIGHTS, 1 << 40)
    assert f"{WEIGHTS} is {1 << 40} bytes, at most" in refused(state, base, adapters / "poet")


def test_a_missing_or_linked_directory_is_refused(state, base, adapters):
    assert "is no readable directory" in refused(state, base, adapters / "nobody")
    (adapters / "link").symlink_to(adapters / "poet")
    assert add(state, base, adapters / "link").reason == "link is a symbolic link"


def test_bad_adapters_do_not_stop_the_others(state, base, adapters):
    shutil.copytree(adapters / "poet", adapters / "broken")
    os.truncate(adapters / "broken" / WEIGHTS, 3000)
    (adapters / "not an adapter").mkdir()
    (adapters / ".git").mkdir()
    (adapters / "README.md").write_text("hello")
    results = {result.name: result for result in sync_directory(adapters, state, base)}
    assert {name: result.status for name, result in results.items()} == {
        "not an adapter": "failed",
        "broken": "quarantined",
        "cook": "ready",
        "poet": "ready",
    }
    assert "is no adapter name" in results["not an adapter"].reason
    assert in_cache(state) == sorted(results[name].digest for name in ("cook", "poet"))
    shutil.copy(adapters / "poet" / WEIGHTS, adapters / "broken" / WEIGHTS)
    repaired = {result.name: result for result in sync_directory(adapters, state, base)}["broken"]
    assert (repaired.status, repaired.version) == ("ready", 2)


def test_adapters_that_vanish_from_the_directory_are_removed_and_others_stay(state, base, adapters):
    sync_directory(adapters, state, base)
    add(state, base, adapters / "cook", "by-hand")
    shutil.rmtree(adapters / "cook")
    results = sync_directory(adapters, state, base)
    assert ("cook", "removed") in [(result.name, result.status) for result in results]
    assert [record.name for record in known_records(state)] == ["by-hand", "poet"]
    assert [result.name for result in sync_directory(adapters, state, base)] == ["poet"]


def test_without_a_directory_only_the_base_is_set(state, base, tmp_path):
    assert sync_directory(None, state, base) == []
    reader = CatalogReader(state / "catalog.sqlite")
    with pytest.raises(AdapterNotFound):
        reader.lookup("poet")
    reader.close()
    with pytest.raises(InvalidArgument, match="is not a directory"):
        sync_directory(tmp_path / "nothing", state, base)


def test_another_base_model_means_checking_again(state, base, adapters, tmp_path):
    sync_directory(adapters, state, base)
    other = make_model(tmp_path / "other", hidden_size=128)
    changed = BaseFacts(other, model_manifest(Path(other)).digest, 16)
    base_modules(Path(other), changed.digest, state / "base_modules")  # here, so that no worker imports torch
    results = sync_directory(adapters, state, changed)
    assert [(result.status, result.version) for result in results] == [("quarantined", 1)] * 2
    assert "made for another base?" in results[0].reason
    results = sync_directory(adapters, state, base)
    assert [(result.status, result.version, result.change) for result in results] == [("ready", 1, "updated")] * 2


def test_a_lower_rank_limit_means_checking_again(state, base, adapters):
    sync_directory(adapters, state, base)
    results = sync_directory(adapters, state, BaseFacts(base.path, base.digest, 2))
    assert {result.reason for result in results} == {"rank 4 is over the limit of 2"}


def test_a_pattern_that_takes_for_ever_is_refused(state, base, adapters):
    path = adapters / "poet" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "alpha_pattern": {"(([a-z._0-9]+)+)+!": 3}}))
    assert "the patterns in its configuration are too slow" in refused(state, base, adapters / "poet")


def test_a_worker_that_dies_costs_one_adapter(state, base, adapters):
    os.truncate(adapters / "cook" / WEIGHTS, 2 << 30)  # sparse; long enough to be killed in
    jobs = [IngestJob(name, str(adapters / name)) for name in ("cook", "poet")]
    killed = []

    def kill(event):
        if isinstance(event, Copied) and event.name == "cook" and not killed:
            killed.append(worker_of(os.getpid()))
            os.kill(killed[0], signal.SIGKILL)

    cook, poet = ingest(state, BaseFacts(base.path, base.digest, 1 << 20), jobs, kill)
    assert (cook.status, cook.reason) == ("failed", "the ingest process ended with status -9: ")
    assert poet.status == "ready"
    assert in_cache(state) == [poet.digest]
    assert [record.name for record in known_records(state)] == ["poet"]


def worker_of(parent):
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return next(int(child) for child in children if b"ingest_worker" in Path(f"/proc/{child}/cmdline").read_bytes())


def test_a_kill_in_the_middle_of_a_copy_leaves_nothing_half(state, base, adapters):
    source = adapters / "poet"
    whole = (source / WEIGHTS).read_bytes()
    os.truncate(source / WEIGHTS, 2 << 30)  # sparse, so only the copy would take space
    request = IngestRequest(str(state), BaseFacts(base.path, base.digest, 1 << 20), (IngestJob("poet", str(source)),))
    worker = subprocess.Popen(
        [sys.executable, "-m", "openlora.adapters.ingest_worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    worker.stdin.write(msgspec.json.encode(request))
    worker.stdin.close()
    events = (msgspec.json.decode(line, type=Started | Copied | IngestResult) for line in worker.stdout)
    copied = next(event for event in events if isinstance(event, Copied))
    worker.kill()
    worker.wait()
    worker.stdout.close()
    assert 0 < copied.done < copied.total
    assert [name for name in in_cache(state) if not name.startswith(".incoming-")] == []
    assert len(in_cache(state)) == 1
    assert known_records(state) == []

    (source / WEIGHTS).write_bytes(whole)
    result = add(state, base, source)
    assert (result.status, result.version) == ("ready", 1)
    assert in_cache(state) == [result.digest]


def test_a_worker_goes_with_its_parent(state, base, adapters):
    source = adapters / "poet"
    os.truncate(source / WEIGHTS, 2 << 30)
    request = IngestRequest(str(state), BaseFacts(base.path, base.digest, 1 << 20), (IngestJob("poet", str(source)),))
    (state / "request.json").write_bytes(msgspec.json.encode(request))
    parent = (
        "import subprocess, sys\n"
        "command = [sys.executable, '-m', 'openlora.adapters.ingest_worker']\n"
        "worker = subprocess.Popen(command, stdin=open(sys.argv[1]), stdout=subprocess.PIPE)\n"
        "worker.stdout.readline()\n"
        "print(worker.pid, flush=True)\n"
        "worker.communicate()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent, str(state / "request.json")], stdout=subprocess.PIPE, text=True
    )
    worker = os.pidfd_open(int(process.stdout.readline()))
    process.kill()
    process.communicate()
    ended, _, _ = select.select([worker], [], [], 60)
    os.close(worker)
    assert ended
    assert known_records(state) == []


def test_a_damaged_cache_entry_is_replaced(state, base, adapters):
    result = add(state, base, adapters / "poet")
    os.truncate(state / "adapters" / result.digest / WEIGHTS, 100)
    assert add(state, base, adapters / "poet").status == "ready"
    assert adapter_manifest(state / "adapters" / result.digest).digest == result.digest


def test_a_source_written_while_it_is_copied_is_not_recorded(state, base, adapters, tmp_path):
    store = AdapterStore(tmp_path / "cache")
    written = []

    def write_meanwhile(size):
        if not written:
            written.append(size)
            with open(adapters / "poet" / WEIGHTS, "ab") as file:
                file.write(b"\0")

    with (
        SourceDirectory(adapters / "poet") as source,
        store.writing(),
        store.incoming() as incoming,
        pytest.raises(Unavailable, match="changed while they were copied"),
    ):
        copy_adapter(source, source.state(), incoming, 1 << 20, write_meanwhile)
    assert written
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_file_that_grows_while_it_is_copied_has_a_bound(adapters, tmp_path):
    path = adapters / "poet" / WEIGHTS
    size = path.stat().st_size

    def grow(copied):
        with open(path, "ab") as file:
            file.write(b"\0" * copied)

    (tmp_path / "copy").mkdir()
    with SourceDirectory(adapters / "poet") as source, pytest.raises(AdapterInvalid, match="grew past"):
        Incoming(tmp_path / "copy").copy(source, WEIGHTS, size + 100, grow)


def test_a_full_disk_is_not_the_adapters_fault(state, base, adapters):
    """The worker's file size limit stands for the full disk: the same OSError, made by the kernel."""
    script = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from openlora.adapters import ingest_worker, store\n"
        "original = store.Incoming.copy\n"
        "def copy(*arguments):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        "    try: original(*arguments)\n"
        "    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)\n"
        "store.Incoming.copy = copy\n"
        "ingest_worker.main()\n"
    )
    request = IngestRequest(str(state), base, (IngestJob("poet", str(adapters / "poet")),))
    done = subprocess.run(
        [sys.executable, "-c", script], input=msgspec.json.encode(request), capture_output=True, check=True
    )
    result = msgspec.json.decode(done.stdout.splitlines()[-1], type=IngestResult | Started | Copied)
    assert result.status == "failed"
    assert os.strerror(errno.EFBIG) in result.reason
    assert known_records(state) == []
    assert in_cache(state) == []


def test_a_base_that_can_not_be_checked_against_stops_everything(state, adapters, tmp_path):
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "config.json").write_text('{"model_type": "telepathy"}')
    with pytest.raises(UnsupportedModel, match="telepathy"):
        sync_directory(adapters, state, BaseFacts(str(tmp_path / "strange"), "e" * 64, 16))


def test_names_are_checked_before_anything_happens(state, base, adapters):
    for name in ("base", "../poet", ""):
        with pytest.raises(InvalidArgument):
            add(state, base, adapters / "poet", name or " ")
    assert not (state / "adapters").exists()


def test_an_adapter_that_can_not_be_read_any_more_keeps_its_access(state, base, adapters):
    """Its quarantine, and so its name, is told to those alone who were told of it before."""
    source, rule = adapters / "poet", {"policy": "allow-list", "callers": ["alice"]}
    card = source / "openlora.json"
    card.write_text(json.dumps({**CARD, "access": rule}))
    assert add(state, base, source).status == "ready"
    card.write_text("{")
    assert add(state, base, source).status == "quarantined"
    assert known_records(state)[-1].card["access"] == rule
    (source / WEIGHTS).unlink()
    (source / WEIGHTS).symlink_to("/etc/passwd")
    assert add(state, base, source).status == "quarantined"
    assert known_records(state)[-1].card["access"] == rule


def test_what_can_not_be_served_is_told_to_those_alone_whom_its_card_names(state, base, adapters, tmp_path):
    """From its first day on, whatever is wrong with the files beside the card."""
    source, rule = adapters / "poet", {"policy": "allow-list", "callers": ["alice"]}
    (source / "openlora.json").write_text(json.dumps({**CARD, "access": rule}))
    (source / WEIGHTS).rename(source / "adapter_model.bin")
    assert "a pickle file" in add(state, base, source).reason
    (record,) = known_records(state)
    policy = AccessPolicy(make_run(tmp_path))
    assert policy.allows("alice", record)
    assert not policy.allows(ANONYMOUS, record)


@pytest.mark.parametrize("card", ["{", json.dumps({**CARD, "access": {"policy": "allowlist", "callers": ["alice"]}})])
def test_while_the_first_card_can_not_be_read_its_name_is_nobodys(state, base, adapters, tmp_path, card):
    source = adapters / "poet"
    (source / "openlora.json").write_text(card)
    assert "openlora.json" in refused(state, base, source)
    policy = AccessPolicy(make_run(tmp_path))
    for caller in ("alice", ANONYMOUS):
        assert not policy.allows(caller, known_records(state)[0])
    (source / "openlora.json").write_text(json.dumps(CARD))
    assert add(state, base, source).status == "ready"
    assert policy.allows(ANONYMOUS, known_records(state)[-1])


def test_the_card_of_new_files_that_can_not_be_read_is_in_force(state, base, adapters):
    source, rule = adapters / "poet", {"policy": "allow-list", "callers": ["alice"]}
    assert add(state, base, source).status == "ready"
    (source / "openlora.json").write_text(json.dumps({**CARD, "access": rule}))
    (source / WEIGHTS).unlink()
    assert add(state, base, source).status == "quarantined"
    assert known_records(state)[-1].card["access"] == rule
