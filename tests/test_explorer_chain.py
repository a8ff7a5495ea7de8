"""The page over a real chain: anchors, deposits, earners and epochs of a node that settles by its commands."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser_tools import BROWSER_TESTS, require_chromium, require_node_modules
from chain import Devnet
from explorer_cases import explorer
from explorer_chain import DEPOSIT, SettledNode
from waiting import wait_for

COUNT, SETTLED = 84, 50
PATIENCE_SECONDS = 60.0


@pytest.fixture(scope="module")
def node(devnet: Devnet, tmp_path_factory: pytest.TempPathFactory) -> SettledNode:
    return SettledNode(devnet, tmp_path_factory.mktemp("node"), COUNT, SETTLED)


def when_ready(page: str) -> dict[str, Any]:
    """The overview of the chain, once it and the amounts are known."""

    def knows_amounts() -> bool:
        seen = httpx.get(f"{page}api/earners").json()
        assert seen["state"] != "error", seen
        return seen["state"] == "ready" and seen["agrees"] is not None

    wait_for("reading of the chain", knows_amounts, PATIENCE_SECONDS)
    return httpx.get(f"{page}api/overview").json()["chain"]


def test_settlement_is_what_the_chain_says_and_this_node_recomputes(node: SettledNode, tmp_path: Path) -> None:
    with explorer(node.state, "--deployment", str(node.devnet.deployment_file)) as page:
        seen = when_ready(page)
        assert (seen["anchor"]["size"], int(seen["deposited"])) == (COUNT, DEPOSIT)
        pending, accepted = httpx.get(f"{page}api/epochs").json()["epochs"][:2]
        assert (pending["state"], accepted["state"]) == ("pending", "accepted")
        (first,), (second,) = accepted["allocations"], pending["allocations"]
        assert (first["from"], first["to"], second["from"], second["to"]) == (0, SETTLED, SETTLED, COUNT)
        assert int(first["amount"]) == int(seen["settled"]) > 0
        assert first["voids"].keys() == second["voids"].keys() == {"status"}
        earners = httpx.get(f"{page}api/earners").json()
        assert earners["agrees"] is True
        (claimed,) = [one for one in earners["earners"] if one["account"] == node.claimed]
        assert claimed["claimed"] == claimed["cumulative"] != "0" and claimed["pending"] == "0"
        assert any(one["claimed"] == "0" != one["pending"] for one in earners["earners"])
        _in_the_browser(page, node)


def test_a_chain_that_does_not_answer_is_said_and_receipts_go_on(node: SettledNode, tmp_path: Path) -> None:
    elsewhere = tmp_path / "deployment.json"
    text = node.devnet.deployment_file.read_text()
    elsewhere.write_text(text.replace(node.devnet.deployment.rpc_url, "http://127.0.0.1:9"))
    with explorer(node.state, "--deployment", str(elsewhere)) as page:
        wait_for("word of the chain", lambda: httpx.get(f"{page}api/epochs").json()["state"] != "loading")
        seen = httpx.get(f"{page}api/epochs").json()
        assert seen["state"] == "error" and "127.0.0.1:9" in seen["message"]
        assert httpx.get(f"{page}api/receipts").json()["size"] == COUNT


def _in_the_browser(page: str, node: SettledNode) -> None:
    chromium = require_chromium()
    require_node_modules()
    environment = {"PAGE": page, "EARNER": node.claimed, "CHROMIUM": chromium}
    run = subprocess.run(
        ["node", "--test", "settlement.test.mjs"],
        cwd=BROWSER_TESTS,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0 and "# pass 0" not in run.stdout, run.stdout + run.stderr
