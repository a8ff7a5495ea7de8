"""Manifests: the digest is the documented formula, covers what it should, and the hash cache is never wrong."""

import hashlib
import json
import os

import pytest

from openlora.adapters.manifest import HashCache, adapter_manifest, model_manifest
from openlora.errors import AdapterInvalid, InvalidArgument


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "poet"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes(b"{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes(b"{}")
    (folder / "model.safetensors").write_bytes(b"x" * 1000)
    return folder


def age(path, seconds):
    """Set mtime back; ctime can't be."""
    past = path.stat().st_mtime_ns - seconds * 10**9
    os.utime(path, ns=(past, past))


def test_digest_is_the_documented_formula(adapter):
    def entry(name, content):
        return {"path": name, "sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}

    files = [entry("adapter_config.json", b"{}"), entry("adapter_model.safetensors", b"weights")]
    # for ASCII strings and integers, sorted keys without blanks are the JCS form
    jcs = json.dumps({"files": files}, sort_keys=True, separators=(",", ":")).encode()
    assert adapter_manifest(adapter).digest == hashlib.sha256(b"openlora/manifest/v1" + jcs).hexdigest()


def test_card_and_other_files_are_no_part_of_an_adapter(adapter):
    before = adapter_manifest(adapter)
    (adapter / "openlora.json").write_text('{"schema": 1}')
    (adapter / "README.md").write_text("hello")
    assert adapter_manifest(adapter) == before


def test_an_incomplete_adapter_has_no_manifest(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterInvalid, match="adapter_model.safetensors is missing"):
        adapter_manifest(adapter)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "chat_template.jinja",
        "vocab.json",
        "merges.txt",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
    ],
)
def test_what_decides_a_models_answers_is_in_its_digest(model, name):
    before = model_manifest(model).digest
    (model / name).write_text("something else")
    assert model_manifest(model).digest != before


def test_what_does_not_decide_them_is_not(model):
    before = model_manifest(model).digest
    (model / "README.md").write_text("hello")
    (model / "openlora.json").write_text("{}")
    assert model_manifest(model).digest == before


def test_a_directory_without_safetensors_is_no_model(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(InvalidArgument, match="no \\*.safetensors weights"):
        model_manifest(model)
    (model / "config.json").unlink()
    with pytest.raises(InvalidArgument, match="no config.json"):
        model_manifest(model)


def test_hash_cache_answers_only_for_the_same_bytes(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"one")
    status = path.stat()
    aged = os.stat_result(status, {"st_mtime_ns": 0, "st_ctime_ns": 0})
    cache = HashCache(tmp_path / "digests.json")
    cache.put(path, aged, "0" * 64)
    cache.save()
    again = HashCache(tmp_path / "digests.json")
    assert again.get(path, aged) == "0" * 64
    assert again.get(path, status) is None  # other times
    assert again.get(tmp_path / "other", aged) is None


def test_a_young_file_is_not_remembered(model, tmp_path):
    """Its ctime is now, whatever its mtime says: a second change could leave the same timestamps."""
    age(model / "model.safetensors", 3600)
    before = model_manifest(model, tmp_path / "digests.json").digest
    assert json.loads((tmp_path / "digests.json").read_text()) == {}
    (model / "model.safetensors").write_bytes(b"y" * 1000)
    assert model_manifest(model, tmp_path / "digests.json").digest != before


def test_cached_hashes_are_used_and_progress_covers_all_bytes(model, tmp_path):
    path = (model / "model.safetensors").resolve()
    status = path.stat()
    planted = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev, "f" * 64]
    (tmp_path / "digests.json").write_text(json.dumps({str(path): planted}))
    seen = []
    manifest = model_manifest(model, tmp_path / "digests.json", seen.append)
    assert {file.path: file.sha256 for file in manifest.files}["model.safetensors"] == "f" * 64
    assert sum(seen) == sum(file.size for file in manifest.files) == 1002


def test_a_damaged_cache_is_only_slower(model, tmp_path):
    (tmp_path / "digests.json").write_text("{ not JSON")
    assert model_manifest(model, tmp_path / "digests.json") == model_manifest(model)
