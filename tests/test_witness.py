"""The witness protocol: every answer of the specification, the rollback race, and a real process over HTTP."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from attribution_cases import python_environment, serve_receipts
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from live_server import free_ports
from typer.testing import CliRunner
from waiting import wait_for

from openlora.attribution.checkpoint import Checkpoint, sign_checkpoint, verify_checkpoint, verify_cosignatures
from openlora.attribution.commands import receipts_app
from openlora.attribution.log import ReceiptLog
from openlora.attribution.log_key import LogKey
from openlora.attribution.merkle_tree import EMPTY_ROOT, MerkleTree
from openlora.attribution.receipt import leaf_hash
from openlora.attribution.signed_note import NoteKey, SignedNote, parse_note, parse_signature_lines
from openlora.attribution.witness import Answer, Witness
from openlora.attribution.witness_client import WitnessAddress, WitnessClient

LOG_PRIVATE = Ed25519PrivateKey.from_private_bytes(b"\x01" * 32)
PRIVATE = Ed25519PrivateKey.from_private_bytes(b"\x03" * 32)
SIGNER = "0x7E5F4552091A69125d5DfCb7b8C2659029395Bdf"
LOG = LogKey("example.org/log", SIGNER, LOG_PRIVATE.public_key().public_bytes_raw(), bytes(32))
TREE = MerkleTree(leaf_hash(bytes([number])) for number in range(40))
OTHER_TREE = MerkleTree(leaf_hash(bytes([number, 1])) for number in range(40))
NAME = "witness.example/w1"


def signed(size: int, tree: MerkleTree = TREE, origin: str = LOG.origin, key: Ed25519PrivateKey = LOG_PRIVATE) -> str:
    return str(sign_checkpoint(Checkpoint(origin, size, tree.root(size)), key))


def body(old: int, size: int, tree: MerkleTree = TREE, note: str | None = None) -> bytes:
    proof = tree.consistency_proof(old, size) if old <= size else []
    lines = [f"old {old}", *(base64.b64encode(one).decode() for one in proof)]
    return ("\n".join(lines) + "\n\n" + (note or signed(size, tree))).encode()


@pytest.fixture
def witness(tmp_path: Path) -> Iterator[Witness]:
    with closing(Witness(tmp_path / "witness", [LOG], PRIVATE, NAME, clock=lambda: 1_700_000_000)) as one:
        yield one


def size_of(witness: Witness) -> int:
    """What the witness says it has seen: a request with an impossible old size is told."""
    answer = witness.add_checkpoint(body(39, 40))
    assert (answer.status, answer.content_type) == (409, "text/x.tlog.size")
    return int(answer.body)


def test_a_log_is_cosigned_from_nothing_on(witness: Witness, tmp_path: Path) -> None:
    origin = hashlib.sha256(LOG.origin.encode()).hexdigest()
    assert witness.newest(origin).status == 404
    for old, size in ((0, 0), (0, 1), (1, 5), (5, 5), (5, 32), (32, 38)):
        answer = witness.add_checkpoint(body(old, size))
        assert answer.status == 200, answer
        note = parse_note(signed(size))
        cosigned = SignedNote(note.text, note.signatures + parse_signature_lines(answer.body))
        (found,) = verify_cosignatures(cosigned, [witness.public])
        assert found.time == 1_700_000_000
        newest = parse_note(witness.newest(origin).body)
        assert verify_checkpoint(newest, LOG).size == size and verify_cosignatures(newest, [witness.public])
    assert size_of(witness) == 38
    with closing(Witness(tmp_path / "witness", [LOG], PRIVATE, NAME)) as again:
        assert size_of(again) == 38
    assert witness.newest("0" * 64).status == 404


def test_every_refusal_of_the_specification_and_nothing_is_changed_by_it(witness: Witness) -> None:
    assert witness.add_checkpoint(body(0, 8)).status == 200
    good = body(8, 12)
    lines = good.decode().split("\n")
    text, signatures = signed(12).split("\n\n")
    wrong_signature = text + "\n\n" + signed(11).split("\n\n")[1]
    zero = str(sign_checkpoint(Checkpoint(LOG.origin, 0, TREE.root(1)), LOG_PRIVATE))
    cases: list[tuple[int, bytes]] = [
        (404, body(8, 12, note=signed(12, origin="example.org/unknown"))),
        (403, body(8, 12, note=signed(12, key=PRIVATE))),
        (403, body(8, 12, note=wrong_signature)),
        (403, body(8, 12, note=signed(12) + wrong_signature.split("\n\n")[1])),
        (400, body(9, 8)),
        (409, body(7, 12)),
        (409, body(0, 12)),
        (409, b"old 0\n\n" + zero.encode()),
        (422, body(8, 12, OTHER_TREE)),
        (422, b"old 8\n\n" + signed(12).encode()),
        (422, b"old 8\n\n" + signed(8, OTHER_TREE).encode()),
        (422, b"old 8\n" + base64.b64encode(EMPTY_ROOT) + b"\n\n" + signed(8).encode()),
        (422, "\n".join([lines[0], *lines[2:]]).encode()),
        (400, good.replace(b"old 8", b"old 08")),
        (400, good.replace(b"old 8", b"old  8")),
        (400, good.replace(b"old 8", b"new 8")),
        (400, good.replace(b"\n\n", b"\n")),
        (400, good.replace(b"old 8\n", b"old 8\n" + 64 * (base64.b64encode(EMPTY_ROOT) + b"\n"))),
        (400, good.replace(b"old 8\n", b"old 8\n!\n")),
        (400, good[:-1]),
        (400, b"\xff" + good),
        (400, b""),
    ]
    for status, request in cases:
        assert witness.add_checkpoint(request).status == status, request
        assert size_of(witness) == 8
    assert witness.add_checkpoint(body(8, 8)).status == 200
    assert witness.add_checkpoint(good).status == 200


def test_from_nothing_the_proof_is_empty_and_the_empty_tree_has_its_root(witness: Witness) -> None:
    hashes = base64.b64encode(EMPTY_ROOT)
    assert witness.add_checkpoint(b"old 0\n" + hashes + b"\n\n" + signed(5).encode()).status == 422
    wrong = str(sign_checkpoint(Checkpoint(LOG.origin, 0, TREE.root(1)), LOG_PRIVATE))
    assert witness.add_checkpoint(b"old 0\n\n" + wrong.encode()).status == 422
    assert size_of(witness) == 0


def test_of_two_requests_from_one_size_one_wins_and_the_state_never_goes_back(tmp_path: Path) -> None:
    """The race of the specification, between threads of one witness and between two on the same state."""
    state = tmp_path / "witness"
    with closing(Witness(state, [LOG], PRIVATE, NAME)) as one, closing(Witness(state, [LOG], PRIVATE, NAME)) as two:
        seen = 0
        for step in range(1, 13):
            requests = [(one, seen + step % 3 + 1), (two, seen + 1), (one, seen + 3), (two, seen + 2)]
            answers: list[tuple[int, Answer]] = []
            start = threading.Barrier(len(requests))

            def ask(
                witness: Witness,
                size: int,
                old: int = seen,
                start: threading.Barrier = start,
                answers: list[tuple[int, Answer]] = answers,
            ) -> None:
                start.wait()
                answers.append((size, witness.add_checkpoint(body(old, size))))

            threads = [threading.Thread(target=ask, args=request) for request in requests]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            (winner,) = [size for size, answer in answers if answer.status == 200]
            assert {answer.body for _, answer in answers if answer.status == 409} == {f"{winner}\n"}
            assert len(answers) == 4 and size_of(one) == size_of(two) == winner > seen
            seen = winner


def test_a_witness_process_cosigns_and_proofs_carry_it(tmp_path: Path) -> None:
    state, other = tmp_path / "state", tmp_path / "other"
    serve_receipts(state, 1, 2, 3)
    serve_receipts(other, 1)
    (port,) = free_ports(1)
    options = ["--known-logs", state / "log.pub", "--key", tmp_path / "w.key", "--state-dir", tmp_path / "witness"]
    command = [sys.executable, "-m", "openlora.cli", "witness", "serve", *options, "--port", port]
    with subprocess.Popen(
        [str(one) for one in command], env=python_environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            line = process.stdout.readline().strip()
            wait_for("witness", lambda: is_open(port))
            vkey = NoteKey.parse(line.split(" ")[1]).vkey
            assert (tmp_path / "w.key").stat().st_mode & 0o777 == 0o600

            def run(*arguments: object) -> tuple[int, str]:
                result = CliRunner().invoke(receipts_app, [str(one) for one in arguments])
                return result.exit_code, result.output

            proof, pin = tmp_path / "proof", ("--log", state / "log.pub")
            assert run("prove", 0, "--state-dir", state, "--out", proof)[0] == 0
            assert run("verify", proof, *pin)[0] == 0
            assert run("verify", proof, *pin, "--witness", vkey)[0] == 1
            for numbers in ((4,), (5, 6)):
                assert run("cosign", "--witness", line, "--state-dir", state)[0] == 0
                serve_receipts(state, *numbers)
            assert run("cosign", "--witness", line, "--state-dir", state)[0] == 0
            assert run("prove", 4, "--state-dir", state, "--out", proof)[0] == 0
            code, text = run("verify", proof, *pin, "--witness", vkey)
            assert code == 0 and "cosigned by localhost/witness" in text
            assert run("verify", proof, *pin, "--witness", vkey, "--quorum", 2)[0] == 2
            code, text = run("cosign", "--witness", line, "--state-dir", other)
            assert code == 7 and "404" in text
            nobody = f"http://127.0.0.1:{free_ports(1)[0]} {vkey}"
            assert run("cosign", "--witness", nobody, "--state-dir", state)[0] == 7
            code, text = run("cosign", "--witness", nobody, "--witness", line, "--state-dir", state)
            assert code == 0 and "does not answer" in text
            with (
                closing(ReceiptLog.open(state, read_only=True)) as log,
                closing(WitnessClient(WitnessAddress.parse(line))) as client,
            ):
                assert client.newest(log.key).size == 6
                assert client.newest(LOG) is None
                assert verify_checkpoint((state / "log" / "cosigned").read_bytes(), log.key).size == 6
        finally:
            process.terminate()


def is_open(port: int) -> bool | None:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/x/checkpoint", timeout=5).status_code == 404
    except httpx.ConnectError:
        return None
