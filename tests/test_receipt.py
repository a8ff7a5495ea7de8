"""The receipt's encoding, hashes, signature and keys, each against an independent implementation."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import eth_abi
import pytest
import rfc8785
from attribution_cases import (
    ALICE,
    BASE,
    BOB,
    FRENCH,
    LEGAL,
    card,
    commit_of,
    make_intent,
    python_environment,
    request_id,
    terms,
)
from coincurve import PrivateKey
from eth_account import Account
from eth_account.messages import encode_typed_data
from eth_utils import keccak

from openlora.attribution.blobs import adapters_blob, check_blobs, price, runtime_blob, terms_blob
from openlora.attribution.card import parse_card
from openlora.attribution.commitments import blob_hash, output_commitment, prompt_commitment
from openlora.attribution.journal import CompletionFrame
from openlora.attribution.keys import load_keys
from openlora.attribution.log_key import LogKey, load_known_logs, load_log_key
from openlora.attribution.receipt import (
    RECEIPT_TYPE,
    Receipt,
    ReceiptHasher,
    decode_leaf,
    encode_leaf,
    leaf_hash,
    receipt_from_frames,
    recover_signer,
    sign_digest,
)
from openlora.attribution.receipt_json import receipt_document
from openlora.engine.api import AdapterUse, EngineInfo
from openlora.errors import Internal, InvalidArgument

# eth_account brings py_ecc, which raises this to 100,000: deep JSON would end the test process instead of raising.
sys.setrecursionlimit(1_000)

CURVE_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
TYPES = [tuple(member.split(" ")) for member in RECEIPT_TYPE.removeprefix("Receipt(").removesuffix(")").split(",")]
VECTOR = json.loads((Path(__file__).parent / "vectors" / "receipt_v1.json").read_text())


def sample(**changes: Any) -> Receipt:
    completion = CompletionFrame(request_id(7), 41, 1, 50, commit_of(7, "answer"), 1_700_000_200)
    receipt = receipt_from_frames(make_intent(7), completion, b"L" * 32).receipt
    return dataclasses.replace(receipt, **changes)


def typed_data(receipt: Receipt) -> dict[str, Any]:
    """The receipt for eth_account: the schema's own camelCase names, taken from the type string."""
    values = [0x0101, *dataclasses.astuple(receipt)]
    domain = [("name", "string"), ("version", "string"), ("salt", "bytes32")]
    return {
        "types": {
            "EIP712Domain": [{"name": name, "type": kind} for name, kind in domain],
            "Receipt": [{"name": name, "type": kind} for kind, name in TYPES],
        },
        "primaryType": "Receipt",
        "domain": {"name": "OpenLoRA Receipt", "version": "1", "salt": receipt.log_id},
        "message": {name: value for (_, name), value in zip(TYPES, values, strict=True)},
    }


def test_the_schema_has_the_names_and_the_order_of_the_specification() -> None:
    camel = [
        name.split("_")[0] + "".join(part.title() for part in name.split("_")[1:]) for name in Receipt.__match_args__
    ]
    assert ["schema", *camel] == [name for _, name in TYPES]


def test_the_leaf_is_the_abi_encoding_and_decodes_to_the_same_receipt() -> None:
    receipt = sample(price=2**128 - 1, seq=2**64 - 1)
    leaf = encode_leaf(receipt)
    assert leaf == eth_abi.encode([kind for kind, _ in TYPES], [0x0101, *dataclasses.astuple(receipt)])
    assert len(leaf) == 608
    assert decode_leaf(leaf) == receipt
    assert leaf_hash(leaf) == hashlib.sha256(b"\0" + leaf).digest()


def test_the_digest_and_signature_are_those_of_eth_account() -> None:
    receipt = sample()
    signable = encode_typed_data(full_message=typed_data(receipt))
    digest = ReceiptHasher(receipt.log_id).digest(encode_leaf(receipt))
    assert digest == keccak(b"\x19" + signable.version + signable.header + signable.body)
    key = PrivateKey(b"\x07" * 32)
    signature = sign_digest(key, digest)
    assert signature == Account.sign_message(signable, key.secret).signature  # both deterministic (RFC 6979)
    assert recover_signer(digest, signature) == Account.from_key(key.secret).address
    assert recover_signer(digest, signature) == Account.recover_message(signable, signature=signature)


def test_the_other_form_of_a_signature_is_refused() -> None:
    digest = b"d" * 32
    signature = sign_digest(PrivateKey(b"\x07" * 32), digest)
    low = int.from_bytes(signature[32:64], "big")
    assert low <= CURVE_ORDER // 2
    high = signature[:32] + (CURVE_ORDER - low).to_bytes(32, "big") + bytes([55 - signature[64]])
    assert Account._recover_hash(digest, signature=high) == recover_signer(digest, signature)  # it would fit
    with pytest.raises(InvalidArgument, match="higher s"):
        recover_signer(digest, high)
    for bad in (
        signature[:64],
        signature[:64] + b"\x00",
        signature + b"\x1b",
        bytes(64) + b"\x1b",
        b"\xff" * 32 + bytes(33),
    ):
        with pytest.raises(InvalidArgument):
            recover_signer(digest, bad)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("log_id", b"short"),
        ("request_id", "0x" + "00" * 32),
        ("base_model", "hello"),
        ("runtime_hash", None),
        ("compute_proof", bytearray(32)),
        ("seq", -1),
        ("seq", 2**64),
        ("seq", "7"),
        ("in_tokens", 2**32),
        ("in_tokens", True),
        ("out_tokens", 1.0),
        ("price", 2**128),
        ("status", 0),
        ("status", 5),
    ],
)
def test_nothing_is_coerced_into_a_receipt(field: str, value: object) -> None:
    with pytest.raises(InvalidArgument, match=field):
        sample(**{field: value})


def test_bytes_that_no_receipt_encodes_to_are_not_decoded() -> None:
    leaf = encode_leaf(sample())
    assert decode_leaf(leaf) == sample()
    wrong_schema = (0x0102).to_bytes(32, "big") + leaf[32:]
    wide_status = leaf[: 4 * 32] + b"\1" + leaf[4 * 32 + 1 :]
    for bad in (leaf[:-1], leaf + b"\0", wrong_schema, wide_status):
        with pytest.raises(InvalidArgument):
            decode_leaf(bad)


def test_commitments_and_blob_hashes_follow_the_specification() -> None:
    salt = bytes(range(32))
    assert prompt_commitment(salt, "Grüße") == hashlib.sha256(b"openlora/prompt/v1" + salt + "Grüße".encode()).digest()
    running = output_commitment(salt)
    for delta in ("Hel", "lo ", "🙂"):
        running.update(delta.encode())
        running.digest()
    assert running.digest() == hashlib.sha256(b"openlora/output/v1" + salt + "Hello 🙂".encode()).digest()
    blob = terms()
    assert blob_hash(b"openlora/terms/v1", blob) == hashlib.sha256(b"openlora/terms/v1" + rfc8785.dumps(blob)).digest()
    for bad in ({"a": float("nan")}, {"a": 2**53}, {"a": "\ud800"}):
        with pytest.raises(InvalidArgument, match="canonical"):
            blob_hash(b"openlora/terms/v1", bad)


def test_the_receipt_follows_from_its_frames() -> None:
    intent = make_intent(7)
    completion = CompletionFrame(request_id(7), 41, 2, 50, commit_of(7, "answer"), 1_700_000_200)
    receipt = receipt_from_frames(intent, completion, b"L" * 32).receipt
    assert receipt == Receipt(
        log_id=b"L" * 32,
        seq=41,
        request_id=bytes.fromhex(request_id(7)),
        status=2,
        base_model=bytes.fromhex(BASE),
        runtime_hash=blob_hash(b"openlora/runtime/v1", intent.runtime),
        adapters_hash=blob_hash(b"openlora/adapters/v1", intent.adapters),
        terms_hash=blob_hash(b"openlora/terms/v1", intent.terms),
        registry_ref=bytes(32),
        prompt_commit=intent.prompt_commit,
        output_commit=completion.output_commit,
        in_tokens=10,
        out_tokens=50,
        started_at=1_700_000_007,
        ended_at=1_700_000_200,
        price=(10 * 1_000_000 + 50 * 3_000_000) // 10**6 + (10 * 500_000 + 50 * 700_000) // 10**6,
        payment_ref=bytes(32),
        compute_proof=bytes(32),
    )


@pytest.mark.parametrize(("status", "due"), [(1, 200), (2, 200), (3, 0), (4, 0)])
def test_only_answers_cost(status: int, due: int) -> None:
    completion = CompletionFrame(request_id(7), 0, status, 50, bytes(32), 1_700_000_200)
    assert receipt_from_frames(make_intent(7), completion, bytes(32)).receipt.price == due


def test_each_models_price_is_rounded_down_by_itself() -> None:
    blob = terms_blob((BASE, card(ALICE, 999_999, 0)), [(FRENCH, card(BOB, 999_999, 0))])
    adapters = {"adapters": [{"digest": FRENCH, "weight": 1}], "method": "cat"}
    runtime = make_intent(1).runtime
    assert price(check_blobs(BASE, runtime, adapters, blob), in_tokens=1, out_tokens=0) == 0
    assert price(check_blobs(BASE, runtime, adapters, blob), in_tokens=2, out_tokens=0) == 2


def test_blobs_are_made_from_what_the_engine_and_the_cards_say() -> None:
    info = EngineInfo("torch", "2.1", BASE, "bfloat16", "none", "cpu", 1, 1, 1, 1)
    assert runtime_blob(info) == {"engine": "torch", "version": "2.1", "dtype": "bfloat16", "quantization": "none"}
    uses = [AdapterUse(FRENCH, "/somewhere", 500_000)]
    assert adapters_blob(uses) == {"adapters": [{"digest": FRENCH, "weight": 500_000}], "method": "cat"}
    blob = terms_blob((BASE, None), [(FRENCH, card())])
    check_blobs(BASE, runtime_blob(info), adapters_blob(uses), blob)
    nobody = {"digest": BASE, "owner": "0x" + "00" * 20, "input": "0", "output": "0", "datasets": []}
    assert (blob["price_version"], blob["parameters"], blob["base"]) == (2, "0" * 64, nobody)
    (dataset,) = blob["adapters"][0]["datasets"]
    assert dataset["contributors"] == [{"address": ALICE, "ppm": 250_000}, {"address": BOB, "ppm": 750_000}]
    assert check_blobs(BASE, runtime_blob(info), adapters_blob([]), terms_blob((BASE, None), [])).adapters == []
    with pytest.raises(InvalidArgument, match="terms"):
        check_blobs(BASE, runtime_blob(info), adapters_blob(uses), terms_blob((BASE, None), [(LEGAL, card())]))


def test_cards_are_whole_and_paid_to_real_addresses() -> None:
    good = card().model_dump(by_alias=True, mode="json")
    assert parse_card(good) == card()
    contributor = {"name": "x", "address": ALICE, "share_ppm": 1_000_000}
    changes: list[tuple[list[Any], Any, str]] = [
        (["owner"], ALICE.lower(), "checksummed form is " + ALICE),
        (["owner"], "0x" + "00" * 20, "zero address"),
        (["owner"], "alice", "not a checksummed"),
        (["schema"], 2, "schema"),
        (["licence"], "", "licence"),
        (["prices", "input"], 1.0, "prices.input"),
        (["prices", "input"], 2**53, "less than 2"),
        (["prices", "input"], "01", "without leading zeros"),
        (["prices", "input"], "1e3", "not a whole number"),
        (["prices", "input"], str(10**30 + 1), "at most 10"),
        (["prices", "output"], -1, "prices.output"),
        (["datasets", 0, "share_ppm"], 999_999, "add up to 999999"),
        (["datasets", 0, "digest"], "DA" * 32, "digest"),
        (["datasets", 0, "contributors"], [], "contributors"),
        (["datasets", 0, "contributors"], [contributor, contributor], "more than once"),
        (["datasets", 0, "contributors", 0, "share_ppm"], 250_001, "add up to 1000001"),
        (["datasets"], [good["datasets"][0]] * 2, "more than once"),
        (["colour"], "blue", "colour"),
    ]
    for path, value, message in changes:
        bad = json.loads(json.dumps(good))
        place = bad
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        with pytest.raises(InvalidArgument, match=message) as caught:
            parse_card(bad)
        assert "Value error" not in str(caught.value)


def test_a_log_id_is_the_hash_of_its_initialisation_and_the_line_carries_all_of_it(tmp_path: Path) -> None:
    key = LogKey("example.org/log", ALICE, b"c" * 32, b"n" * 32, b"p" * 32)
    origin_hash = hashlib.sha256(b"openlora/origin/v1" + b"example.org/log").digest()
    kinds = ["uint16", "bytes32", "bytes32", "address", "bytes32", "bytes32", "bytes32"]
    leaf = eth_abi.encode(kinds, [0x0301, bytes(32), origin_hash, ALICE, b"c" * 32, b"n" * 32, b"p" * 32])
    assert key.init_leaf == leaf and key.log_id == hashlib.sha256(leaf).digest()
    assert LogKey.parse(key.line) == key
    (tmp_path / "log.pub").write_text(key.line + "\n")
    (tmp_path / "known").write_text(f"# mine\n\n{key.line}\n")
    assert load_log_key(str(tmp_path / "log.pub")) == load_log_key(key.line) == key
    assert load_known_logs(tmp_path / "known") == [key]
    for place, character in enumerate(key.line):
        other = "1" if character != "1" else "2"
        with pytest.raises(InvalidArgument):
            LogKey.parse(key.line[:place] + other + key.line[place + 1 :])
    for bad in ("", key.line + " ", key.line.replace(ALICE, ALICE.lower())):
        with pytest.raises(InvalidArgument):
            LogKey.parse(bad)
    for origin in ("", "two words", "a+b", "ü"):
        with pytest.raises(InvalidArgument, match="origin"):
            dataclasses.replace(key, origin=origin)
    with pytest.raises(InvalidArgument, match="can't read"):
        load_log_key(str(tmp_path / "nowhere"))


def test_keys_are_made_once_and_for_their_owner_only(tmp_path: Path) -> None:
    with pytest.raises(Internal, match="receipt.key"):
        load_keys(tmp_path / "keys", create=False)
    keys = load_keys(tmp_path / "keys", create=True)
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in (tmp_path / "keys").iterdir()) == ["checkpoint.key", "receipt.key"]
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "keys").iterdir()} == {0o600}
    again = load_keys(tmp_path / "keys", create=True)
    assert (again.signer, again.checkpoint_public) == (keys.signer, keys.checkpoint_public)
    assert keys.signer == Account.from_key(keys.receipt.secret).address
    path = tmp_path / "keys" / "receipt.key"
    path.chmod(0o640)
    with pytest.raises(Internal, match="0640"):
        load_keys(tmp_path / "keys", create=False)
    path.chmod(0o600)
    path.write_text("ab\n")
    with pytest.raises(Internal, match="64 hex digits"):
        load_keys(tmp_path / "keys", create=False)


def test_keys_are_refused_with_the_slow_curve(tmp_path: Path) -> None:
    script = "import sys, pathlib; from openlora.attribution.keys import load_keys; "
    script += "load_keys(pathlib.Path(sys.argv[1]), create=True)"
    native = python_environment(ECC_BACKEND_CLASS="eth_keys.backends.NativeECCBackend")
    command = [sys.executable, "-c", script, str(tmp_path / "keys")]
    result = subprocess.run(command, env=native, capture_output=True, text=True, timeout=60)
    assert "it must use coincurve" in result.stderr
    assert not (tmp_path / "keys").exists()


def test_the_frozen_vector_still_comes_out() -> None:
    """Schema 0x0101 never changes: if this fails, the code is wrong, not the file."""
    given, wanted = VECTOR["given"], VECTOR["expected"]
    binary = ("prompt_salt", "output_salt", "prompt_commit")
    intent = make_intent(0, **{k: bytes.fromhex(v) if k in binary else v for k, v in given["intent"].items()})
    completion = CompletionFrame(
        **{k: bytes.fromhex(v) if k == "output_commit" else v for k, v in given["completion"].items()}
    )
    assert intent.prompt_commit == prompt_commitment(intent.prompt_salt, given["prompt"])
    assert completion.output_commit == output_commitment(intent.output_salt, given["output"]).digest()
    secret = PrivateKey(bytes.fromhex(given["receipt_private_key"]))
    key = LogKey.parse(wanted["log_key"])
    assert (key.origin, key.nonce.hex()) == (given["origin"], given["nonce"])
    assert key.log_id.hex() == wanted["log_id"]
    unsigned = receipt_from_frames(intent, completion, key.log_id)
    assert [blob.hex() for blob in unsigned.blobs] == [
        wanted["blobs"][name] for name in ("runtime", "adapters", "terms")
    ]
    assert unsigned.leaf.hex() == wanted["leaf"]
    assert leaf_hash(unsigned.leaf).hex() == wanted["leaf_hash"]
    digest = ReceiptHasher(key.log_id).digest(unsigned.leaf)
    assert digest.hex() == wanted["eip712_digest"]
    signature = sign_digest(secret, digest)
    assert signature.hex() == wanted["signature"]
    document = receipt_document(
        unsigned.receipt, signature, key, unsigned.blobs, (intent.prompt_salt, intent.output_salt)
    )
    assert document == wanted["document"]
