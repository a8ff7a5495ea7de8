"""Contracts: the artifacts are those of the sources, forge's tests hold, transactions cost what is recorded."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import pytest
from contract_gas import EARNERS, GAS_FILE, local_chain, measure
from public_vectors import needs_public_vectors, rfc6962_vectors
from web3 import Web3

from openlora.errors import InvalidArgument, Unavailable
from openlora.network import tools
from openlora.network.artifacts import load_artifact
from openlora.network.tools import find_tool

CONTRACTS = Path(__file__).resolve().parents[1] / "contracts"
NAMES = ("AdapterRegistry", "AttributionLog", "RewardDistributor", "RewardToken")
VECTORS = Path(__file__).parent / "vectors" / "settlement_v1.json"
PUBLIC_VECTORS = "^test_public_vectors"
OUR_OWN = ("--no-match-test", PUBLIC_VECTORS)
FIRST_ANCHOR_GAS = 80_000
NEXT_ANCHOR_GAS = 45_000
NEXT_CLAIM_GAS = 68_000


def run(command: list[str], timeout: int = 280, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=CONTRACTS, env={**os.environ, **environment}, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    return done.stdout


def test_artifacts_are_what_the_sources_compile_to(tmp_path: Path) -> None:
    run(["node", "build.mjs", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.json" for name in NAMES]
    committed = resources.files("openlora.network.artifacts")
    for name in NAMES:
        assert (tmp_path / f"{name}.json").read_bytes() == (committed / f"{name}.json").read_bytes(), (
            f"{name}: `make contracts` writes it anew"
        )


@pytest.mark.timeout(300)
def test_forge() -> None:
    said = run([str(find_tool("forge")), "test", *OUR_OWN])
    passed = re.search(r"(\d+) tests passed, 0 failed, 0 skipped", said)
    assert passed is not None and int(passed[1]) >= 120, said[-2000:]


@needs_public_vectors
def test_forge_with_the_public_vectors() -> None:
    place = CONTRACTS / "cache" / "public"  # the one that foundry.toml lets forge read
    place.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(rfc6962_vectors(), place / "rfc6962.json")
    said = run([str(find_tool("forge")), "test", "--match-test", PUBLIC_VECTORS])
    assert "1 tests passed, 0 failed, 0 skipped" in said, said[-2000:]


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_forge_with_longer_invariants_and_more_cases() -> None:
    said = run([str(find_tool("forge")), "test", *OUR_OWN], timeout=3500, FOUNDRY_PROFILE="soak")
    assert re.search(r"(\d+) tests passed, 0 failed, 0 skipped", said) is not None, said[-2000:]


def test_golden_vectors_come_out_of_viem_and_openzeppelins_tree(tmp_path: Path) -> None:
    run(["node", "vectors.mjs", str(tmp_path / "vectors.json")])
    assert (tmp_path / "vectors.json").read_bytes() == VECTORS.read_bytes()


def test_gas_is_what_is_recorded_and_within_the_bounds() -> None:
    with local_chain() as web3:
        gas = measure(web3)
    assert gas == json.loads(GAS_FILE.read_text()), "build_scripts/contract_gas.py --write records it anew"
    assert gas["anchor, first"] <= FIRST_ANCHOR_GAS
    again = [used for name, used in gas.items() if name.startswith("anchor, again")]
    assert len(again) == 3 and max(again) <= NEXT_ANCHOR_GAS
    assert gas[f"claim, again, {EARNERS} earners"] <= NEXT_CLAIM_GAS


def test_deployed_code_is_the_artifact_but_for_its_immutables() -> None:
    artifact = load_artifact("AttributionLog")
    with local_chain() as web3:
        factory = web3.eth.contract(abi=artifact.abi, bytecode=artifact.bytecode)
        sent = factory.constructor().transact({"from": web3.eth.accounts[0]})
        address = web3.eth.wait_for_transaction_receipt(sent, poll_latency=0.005)["contractAddress"]
        code = bytearray(web3.eth.get_code(address))
    expected = bytearray(Web3.to_bytes(hexstr=artifact.deployed_bytecode))
    assert code != expected
    for places in artifact.immutable_references:
        for place in places:
            code[place["start"] : place["start"] + place["length"]] = bytes(place["length"])
    assert code == expected


def test_no_contract_of_that_name() -> None:
    with pytest.raises(InvalidArgument, match="'Nothing' is not one of AdapterRegistry, AttributionLog"):
        load_artifact("Nothing")


def test_tools_of_npm_win_over_the_path_and_their_absence_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tools.MODULES in find_tool("anvil").parents
    monkeypatch.setattr(tools, "MODULES", tmp_path / "nothing")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match="anvil is not installed: `make chain-tools`"):
        find_tool("anvil")
    (tmp_path / "anvil").write_text("#!/bin/sh\n")
    (tmp_path / "anvil").chmod(0o755)
    assert find_tool("anvil") == tmp_path / "anvil"


@pytest.mark.parametrize("script", ["chain_tools", "browser_tools"])
@pytest.mark.parametrize(
    ("version", "said"), [(None, "is needed"), ("v18.20.4", "this is v18.20.4"), ("v20.18.3", "this is v20.18.3")]
)
def test_tools_of_npm_say_which_node_is_needed(tmp_path: Path, script: str, version: str | None, said: str) -> None:
    done = run_with_node(tmp_path, script, version)
    assert done.returncode == 1
    assert script.replace("_", "-") + ": Node.js 20.19 or newer" in done.stderr and said in done.stderr


@pytest.mark.parametrize("version", ["v20.19.0", "v24.1.0"])
def test_newer_nodes_will_do(tmp_path: Path, version: str) -> None:
    done = run_with_node(tmp_path, "need_node", version)
    assert (done.returncode, done.stderr) == (0, "")


def run_with_node(folder: Path, script: str, version: str | None) -> subprocess.CompletedProcess[str]:
    """One of build_scripts/, in a shell that finds a node of this version, or none, and an npm that can't work."""
    for tool in ("bash", "dirname"):
        (folder / tool).symlink_to(Path("/usr/bin") / tool)
    if version is not None:
        for name, does in (("node", f"echo {version}"), ("npm", "exit 9")):
            (folder / name).write_text(f"#!{folder}/bash\n{does}\n")
            (folder / name).chmod(0o755)
    return subprocess.run(
        ["bash", str(CONTRACTS.parent / "build_scripts" / f"{script}.sh"), script],
        env={**os.environ, "PATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_lock_names_no_registry() -> None:
    packages = json.loads((CONTRACTS / "package-lock.json").read_text())["packages"]
    assert all("integrity" in package for path, package in packages.items() if path)
    assert not any("resolved" in package for package in packages.values())
