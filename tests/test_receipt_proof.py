"""Proof files, the export and fsck: what they say is so, and every change to them is found."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from attribution_cases import ALICE, python_environment, request_id, salt, serve_receipts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from second_settlement import Export, tree_root
from typer.testing import CliRunner

from openlora.attribution.checkpoint import Checkpoint, sign_checkpoint
from openlora.attribution.commands import receipts_app
from openlora.attribution.export import BUNDLE, ENTRIES, LogExport, bundle_path, write_export
from openlora.attribution.fsck import check_export, check_log
from openlora.attribution.keys import load_keys
from openlora.attribution.log import ReceiptLog
from openlora.attribution.log_key import LogKey
from openlora.attribution.merkle_tree import MerkleTree
from openlora.attribution.proof import parse_proof, verify_proof
from openlora.attribution.prove import prove
from openlora.attribution.receipt import leaf_hash
from openlora.attribution.registry_reference import RegistryReference
from openlora.errors import InvalidArgument, ReceiptInvalid, Unavailable

REFERENCE = RegistryReference(31337, ALICE, 12, b"\xbb" * 32)
COUNT = 300


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state directory with 300 receipts under a checkpoint and one without."""
    state = tmp_path_factory.mktemp("served") / "state"
    serve_receipts(state, *range(COUNT - 1))
    serve_receipts(state, COUNT - 1, registry=REFERENCE.preimage)
    serve_receipts(state, COUNT, checkpointed=False)
    return state


@pytest.fixture(scope="module")
def key(served: Path) -> LogKey:
    return LogKey.parse((served / "log.pub").read_text().strip())


@pytest.fixture
def state(served: Path, tmp_path: Path) -> Path:
    return shutil.copytree(served, tmp_path / "state")


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(receipts_app, [str(one) for one in arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_every_receipt_under_the_checkpoint_is_proven(served: Path, key: LogKey) -> None:
    with closing(ReceiptLog.open(served, read_only=True)) as log:
        for seq in (0, 1, 127, 255, 256, COUNT - 1):
            proof = prove(log, seq)
            assert parse_proof(str(proof).encode()) == proof
            found = verify_proof(proof, key)
            assert found.receipt.known and found.receipt.receipt.seq == seq and found.checkpoint.size == COUNT
            assert verify_proof(proof, None).receipt.known is False
            assert "salts" not in proof.document
        assert prove(log, 3, with_salts=True).document["salts"]["prompt"] == "0x" + salt(3).hex()
        assert prove(log, COUNT - 1).document["blobs"]["registry"] == REFERENCE.document
        with pytest.raises(Unavailable, match="no checkpoint covers receipt 300"):
            prove(log, COUNT)
        with pytest.raises(InvalidArgument, match="no receipt"):
            prove(log, COUNT + 1)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_byte_of_a_proof_can_be_changed(served: Path, key: LogKey, data: st.DataObject) -> None:
    """Of the JSON only its writing may change, not its meaning: nothing signs where its spaces are."""
    with closing(ReceiptLog.open(served, read_only=True)) as log:
        proof = prove(log, 77)
    content = bytearray(str(proof).encode())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] = data.draw(st.integers(0, 255).filter(lambda byte: byte != content[place]))
    try:
        mutated = parse_proof(bytes(content))
        verify_proof(mutated, key)
    except ReceiptInvalid:
        return
    assert (mutated.document, mutated.hashes, mutated.note.text) == (proof.document, proof.hashes, proof.note.text)


def test_a_proof_is_for_its_receipt_its_place_and_its_log(served: Path, key: LogKey, tmp_path: Path) -> None:
    with closing(ReceiptLog.open(served, read_only=True)) as log:
        one, two = prove(log, 5), prove(log, 6)
        tree = MerkleTree(log.leaf_hashes())
    keys = load_keys(served / "keys", create=False)
    stranger = tmp_path / "stranger"
    serve_receipts(stranger, *range(8))
    with closing(ReceiptLog.open(stranger, read_only=True)) as log:
        foreign = prove(log, 5)
    forked = sign_checkpoint(Checkpoint(key.origin, COUNT, tree.root(COUNT - 1)), keys.checkpoint)

    def changed(**changes: Any) -> Any:
        return type(one)(**({"document": one.document, "index": 5, "hashes": one.hashes, "note": one.note} | changes))

    verify_proof(changed(), key)
    for changes in (
        {"index": 6},
        {"document": two.document},
        {"document": two.document, "index": 6},
        {"hashes": one.hashes[:-1]},
        {"hashes": (*one.hashes, one.hashes[0])},
        {"hashes": two.hashes},
        {"note": forked},
        {"note": foreign.note},
        {"document": foreign.document},
        {"document": foreign.document, "note": foreign.note},
        {"document": copy.deepcopy(one.document) | {"price": 1}},
    ):
        with pytest.raises(ReceiptInvalid):
            verify_proof(changed(**changes), key)
    with pytest.raises(ReceiptInvalid, match="not of the pinned"):
        verify_proof(foreign, key)
    assert verify_proof(foreign, None).receipt.known is False


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("@v1", "@v2"),
        lambda text: text.replace("index 9", "index 09"),
        lambda text: text.replace("\nindex 9", ""),
        lambda text: text.replace("\nextra ", "\nextras "),
        lambda text: text.replace("index 9\n", "index 9\n\n"),
        lambda text: text.replace("index 9\n", "index 9\n" + 60 * "qqqq\n"),
        lambda text: text.split("\n\n")[0],
        lambda text: "\n" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text + "more",
        lambda text: "",
    ],
)
def test_files_of_another_form_are_no_proofs(served: Path, change: Any) -> None:
    with closing(ReceiptLog.open(served, read_only=True)) as log:
        text = str(prove(log, 9))
    with pytest.raises(ReceiptInvalid):
        verify_proof(parse_proof(change(text).encode()), None)
    with pytest.raises(ReceiptInvalid):
        parse_proof(text.encode() + b"\xff")


def test_the_commands_prove_verify_and_show_the_checkpoint(served: Path, tmp_path: Path) -> None:
    state, pin, file = ("--state-dir", served), ("--log", served / "log.pub"), tmp_path / "receipt.tlog-proof"
    for which in ("8", request_id(8), "0x" + request_id(8)):
        assert run("prove", which, "--out", file, *state)[0] == 0
        assert run("prove", which, *state)[1] == file.read_text()
    code, text = run("verify", file, *pin)
    assert code == 0 and "leaf 8 of the 300" in text
    assert json.loads(run("verify", file, "--json", *pin)[1])["tree_size"] == COUNT
    code, text = run("verify", file)
    assert code == 3 and "consistent, log unknown" in text
    (tmp_path / "prompt").write_text("a prompt")
    assert run("verify", file, *pin, "--prompt-file", tmp_path / "prompt")[0] == 1  # it takes the salts
    assert run("prove", "8", "--salts", "--out", file, *state)[0] == 0
    assert run("verify", file, *pin, "--prompt-file", tmp_path / "prompt")[0] == 0
    file.write_text(file.read_text().replace("index 8", "index 7"))
    assert run("verify", file, *pin)[0] == 1
    assert run("prove", COUNT, *state)[0] == 7
    assert run("prove", COUNT + 5, *state)[0] == 2
    assert run("checkpoint", *state)[1] == (served / "log" / "checkpoint").read_text()
    found = json.loads(run("checkpoint", "--json", *state)[1])
    assert (found["size"], found["receipts"]) == (COUNT, COUNT + 1)


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_an_export_is_the_log_in_files_and_grows(served: Path, key: LogKey, tmp_path: Path) -> None:
    small, grown, whole = tmp_path / "small", tmp_path / "grown", tmp_path / "whole"
    state = tmp_path / "growing"
    serve_receipts(state, *range(200))
    assert run("export", grown, "--state-dir", state)[0] == 0
    assert (grown / "tile/entries/000.p/200").exists()
    first = files(grown)
    for count in (56, 1, 300):
        serve_receipts(state, *range(1_000 * count, 1_000 * count + count))
        assert run("export", grown, "--state-dir", state)[0] == 0
    full = (grown / "tile/entries/000").stat()
    assert run("export", grown, "--state-dir", state)[0] == 0 and run("export", whole, "--state-dir", state)[0] == 0
    assert (grown / "tile/entries/000").stat().st_ino == full.st_ino  # kept
    assert files(grown) == files(whole)
    assert sorted(path for path in files(whole) if "entries" in path) == [
        "tile/entries/000",
        "tile/entries/001",
        "tile/entries/002.p/45",
    ]
    assert set(first) - set(files(grown)) == {"signatures/000.p/200", "tile/entries/000.p/200"}

    assert json.loads(run("export", small, "--json", "--state-dir", served)[1])["receipts"] == COUNT
    export = LogExport(small)
    assert (export.key, export.size) == (key, COUNT)
    with closing(ReceiptLog.open(served, read_only=True)) as log:
        logged = log.list(limit=COUNT)
        assert list(export.leaves()) == [one.leaf for one in logged]
        assert list(export.leaves(250, 260)) == [one.leaf for one in logged[250:260]]
        assert [export.signature(seq) for seq in range(COUNT)] == [one.signature for one in logged]
        assert export.signature(COUNT) is None
        for name in logged[-1].receipt.blob_hashes:
            assert export.blob(name) == log.blob(name) is not None
        assert export.blob(logged[-1].receipt.registry_ref) == REFERENCE.preimage
    assert export.blob(b"x" * 32) is None
    assert MerkleTree(leaf_hash(leaf) for leaf in export.leaves()).root() == export.checkpoint.root
    assert list(check_export(export)) == []
    everything = b"".join(files(small).values())
    assert salt(3) not in everything
    with pytest.raises(InvalidArgument):
        list(export.leaves(0, COUNT + 1))


@pytest.mark.parametrize(
    ("number", "width", "path"),
    [
        (0, 256, "tile/entries/000"),
        (7, 3, "tile/entries/007.p/3"),
        (999, 256, "tile/entries/999"),
        (1_000, 256, "tile/entries/x001/000"),
        (1_234_067, 255, "tile/entries/x001/x234/067.p/255"),
    ],
)
def test_bundles_have_the_names_of_the_specification(number: int, width: int, path: str) -> None:
    assert str(bundle_path(ENTRIES, number, width)) == path


def test_an_export_that_was_interrupted_is_finished_and_a_foreign_one_refused(state: Path, tmp_path: Path) -> None:
    target, whole = tmp_path / "target", tmp_path / "whole"

    class Cut(Exception):
        pass

    def cut(done: int, of: int) -> None:
        raise Cut

    with closing(ReceiptLog.open(state, read_only=True)) as log:
        with pytest.raises(Cut):
            write_export(log, target, cut)
        write_export(log, target)
        write_export(log, whole)
        assert files(target) == files(whole)
    other = tmp_path / "other"
    serve_receipts(other, 1)
    assert run("export", target, "--state-dir", other)[0] == 2
    assert run("export", tmp_path, "--state-dir", other)[0] == 2  # not empty, and no export
    assert files(target) == files(whole)
    empty = tmp_path / "empty"
    ReceiptLog.open(empty).close()
    assert run("export", tmp_path / "new", "--state-dir", empty)[0] == 7
    assert run("fsck", "--export", tmp_path / "nowhere")[0] == 2


def test_what_went_missing_from_an_export_is_written_again(state: Path, tmp_path: Path) -> None:
    target, whole = tmp_path / "target", tmp_path / "whole"
    with closing(ReceiptLog.open(state, read_only=True)) as log:
        write_export(log, whole)
        write_export(log, target)
        assert log.size() > BUNDLE
        for name in ("tile/entries/000", "signatures/000", next((target / "blobs").iterdir()).relative_to(target)):
            (target / name).unlink()
            write_export(log, target)
            assert files(target) == files(whole)


def change_rows(state: Path, sql: str, *values: Any) -> None:
    with closing(sqlite3.connect(state / "log" / "receipts.sqlite")) as connection, connection:
        assert connection.execute(sql, values).rowcount > 0


def flipped(content: bytes, place: int = -1) -> bytes:
    place %= len(content)
    return content[:place] + bytes((content[place] ^ 1,)) + content[place + 1 :]


def stored(state: Path, column: str) -> bytes:
    with closing(sqlite3.connect(state / "log" / "receipts.sqlite")) as connection:
        return connection.execute(f"SELECT {column} FROM receipts WHERE seq = 9").fetchone()[0]


def test_fsck_finds_nothing_in_a_good_log_and_every_change_of_one(state: Path) -> None:
    assert run("fsck", "--state-dir", state) == (0, "301 receipts, 0 faults\n")
    pristine = (state / "log" / "receipts.sqlite").read_bytes()
    connection = sqlite3.connect(state / "log" / "receipts.sqlite")
    blob = connection.execute("SELECT sha256 FROM blobs LIMIT 1").fetchone()[0]
    connection.close()
    leaf, signature = stored(state, "leaf"), stored(state, "signature")
    changes: list[tuple[str, str, tuple[Any, ...]]] = [
        ("signed by|fits no key", "UPDATE receipts SET leaf = ? WHERE seq = 9", (flipped(leaf, 511),)),
        ("its leaf says", "UPDATE receipts SET leaf = ? WHERE seq = 9", (flipped(leaf, 95),)),
        ("of log", "UPDATE receipts SET leaf = ? WHERE seq = 9", (flipped(leaf, 40),)),
        ("receipt 9", "UPDATE receipts SET leaf = ? WHERE seq = 9", (leaf[:-1],)),
        ("receipt 9", "UPDATE receipts SET signature = ? WHERE seq = 9", (flipped(signature, 5),)),
        ("stored hash", "UPDATE receipts SET leaf_hash = ? WHERE seq = 9", (bytes(32),)),
        ("another request", "UPDATE receipts SET request_id = ? WHERE seq = 9", (b"r" * 32,)),
        ("some are missing", "DELETE FROM receipts WHERE seq = 9", ()),
        ("there are 250", "DELETE FROM receipts WHERE seq >= 250", ()),
        ("is missing or changed", "DELETE FROM blobs WHERE sha256 = ?", (blob,)),
        ("is missing or changed", "UPDATE blobs SET content = ? WHERE sha256 = ?", (b"x", blob)),
        ("checkpoint of 300", "UPDATE checkpoints SET root = ? WHERE size = 300", (bytes(32),)),
        ("checkpoint of 300", "UPDATE checkpoints SET note = 'x' WHERE size = 300", ()),
    ]
    for words, sql, values in changes:
        change_rows(state, sql, *values)
        with closing(ReceiptLog.open(state, read_only=True)) as log:
            faults = list(check_log(log, state / "journal"))
        assert any(word in fault for fault in faults for word in words.split("|")), (sql, faults)
        code, text = run("fsck", "--json", "--state-dir", state)
        assert code == 1 and json.loads(text)["faults"] == faults
        (state / "log" / "receipts.sqlite").write_bytes(pristine)
    assert run("fsck", "--state-dir", state)[0] == 0


def test_fsck_finds_a_journal_that_says_something_else(state: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    serve_receipts(other, *range(50, 60))
    shutil.rmtree(state / "journal")
    shutil.copytree(other / "journal", state / "journal")
    code, text = run("fsck", "--state-dir", state)
    assert code == 1 and "receipt 0: not of the journal's completion 0" in text


def test_fsck_finds_every_change_of_an_export(served: Path, tmp_path: Path) -> None:
    export = tmp_path / "export"
    with closing(ReceiptLog.open(served, read_only=True)) as log:
        write_export(log, export)
    assert run("fsck", "--export", export) == (0, "300 receipts, 0 faults\n")
    for name, content in files(export).items():
        path = export / name
        for other in (None, content[:-1], content + b"\0", flipped(content, 3), flipped(content)):
            if name == "log.pub" and other is not None and other.strip() == content.strip():
                continue  # space around the line is not of the line
            path.unlink() if other is None else path.write_bytes(other)
            code, text = run("fsck", "--export", export)
            assert code != 0, f"{name} was changed to {other!r}, and nobody noticed"
            path.write_bytes(content)
    assert run("fsck", "--export", export)[0] == 0


def test_a_shorter_checkpoint_needs_its_own_bundles(served: Path, tmp_path: Path) -> None:
    export = tmp_path / "export"
    with closing(ReceiptLog.open(served, read_only=True)) as log:
        write_export(log, export)
        root = MerkleTree(log.leaf_hashes()).root(COUNT - 1)
    keys = load_keys(served / "keys", create=False)
    note = sign_checkpoint(Checkpoint(LogExport(export).key.origin, COUNT - 1, root), keys.checkpoint)
    (export / "checkpoint").write_text(str(note))
    assert len(list(LogExport(export).leaves(0, BUNDLE))) == BUNDLE
    with pytest.raises(ReceiptInvalid, match="bundle 1 is missing"):
        list(LogExport(export).leaves(BUNDLE))


def test_a_reader_made_from_the_page_alone_reads_the_same(served: Path, tmp_path: Path) -> None:
    assert run("export", tmp_path / "export", "--state-dir", served)[0] == 0
    ours, theirs = LogExport(tmp_path / "export"), Export(tmp_path / "export")
    assert (theirs.log_id, theirs.size, theirs.leaves) == (ours.key.log_id, ours.size, list(ours.leaves()))
    assert theirs.signatures == [ours.signature(seq) for seq in range(ours.size)]
    assert tree_root(theirs.leaves) == ours.checkpoint.root
    assert theirs.blob(hashlib.sha256(REFERENCE.preimage).digest()) == REFERENCE.preimage


def test_verifying_a_proof_imports_no_server_part(served: Path) -> None:
    script = (
        "import sys; from openlora.attribution.proof import parse_proof, verify_proof; "
        "print(verify_proof(parse_proof(sys.stdin.buffer.read()), None).receipt.known); print(*sys.modules)"
    )
    with closing(ReceiptLog.open(served, read_only=True)) as log:
        proof = str(prove(log, 4)).encode()
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=proof,
        env=python_environment(),
        capture_output=True,
        timeout=60,
        check=True,
    )
    known, modules = done.stdout.decode().splitlines()
    assert known == "False"
    assert {"sqlite3", "torch", "zmq", "httpx", "openlora.attribution.log"}.isdisjoint(modules.split())
