"""The page's verifier, run by node: frozen vectors, real proofs and changed ones. And that its libraries are npm's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path

import pytest
from browser_tools import NODE_MODULES, require_node_modules
from explorer_cases import make_log

from openlora.explorer.app import STATIC
from openlora.explorer.proofs import ProofMaker

ROOT = Path(__file__).resolve().parents[1]
VENDOR = STATIC / "vendor" / "noble"


@pytest.fixture(scope="module")
def proofs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Proofs of two logs with their key lines."""
    directory = tmp_path_factory.mktemp("proofs")
    for name, count, seq in (("mine", 11, 5), ("strangers", 3, 1)):
        with make_log(directory / name, count) as log:
            (directory / f"{name}.tlog-proof").write_text(str(ProofMaker().prove(log, seq)))
        shutil.copy(directory / name / "log.pub", directory / f"{name}.pub")
    return directory


@pytest.mark.parametrize("name", ["vectors", "proof"])
def test_verifier(name: str, proofs: Path) -> None:
    run = subprocess.run(
        ["node", "--test", f"tests/js/{name}.test.mjs"],
        cwd=ROOT,
        env=os.environ | {"PROOFS": str(proofs)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "# fail 0" in run.stdout and "# pass 0" not in run.stdout, run.stdout


def test_vendored_files_are_described() -> None:
    described = json.loads((VENDOR / "VENDOR.json").read_text())["files"]
    there = {str(file.relative_to(VENDOR)) for file in VENDOR.rglob("*") if file.is_file()} - {"VENDOR.json"}
    assert there == set(described)
    assert {"curves/LICENSE", "hashes/LICENSE"} <= there
    for name, hashes in described.items():
        assert sha256((VENDOR / name).read_bytes()).hexdigest() == hashes["served"], name


def test_vendored_files_are_those_of_the_packages() -> None:
    require_node_modules()
    described = json.loads((VENDOR / "VENDOR.json").read_text())
    for name, hashes in described["files"].items():
        assert sha256((NODE_MODULES / "@noble" / name).read_bytes()).hexdigest() == hashes["npm"], name
    run = subprocess.run(
        ["node", "build_scripts/vendor_noble.mjs", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stdout + run.stderr
