"""The page's server: what it tells, what it never tells, and its headers. Over a real log and catalog."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from explorer_cases import DIGESTS, explorer, made_of, make_catalog, make_log
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from openlora.attribution.log import ReceiptLog
from openlora.attribution.proof import parse_proof, verify_proof
from openlora.attribution.prove import prove
from openlora.cli import app as command_line
from openlora.explorer import receipts_view
from openlora.explorer.app import STATIC, create_app
from openlora.explorer.settlement_view import SettlementView

COUNT = 120


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = tmp_path_factory.mktemp("explored") / "state"
    make_log(state, COUNT).close()
    make_catalog(state)
    return state


@pytest.fixture
def page(state: Path) -> Iterator[TestClient]:
    with TestClient(create_app(state, SettlementView())) as client:
        yield client


def test_overview(page: TestClient, state: Path) -> None:
    log = page.get("/api/overview").json()["log"]
    assert log["key_line"] + "\n" == (state / "log.pub").read_text()
    assert (log["size"], log["checkpoint"]["size"]) == (COUNT, COUNT)


def test_pages_hold_every_receipt_once_newest_first(page: TestClient) -> None:
    seen, before = [], None
    while True:
        answer = page.get("/api/receipts", params={"limit": 50} | ({} if before is None else {"before": before})).json()
        seen += [one["seq"] for one in answer["receipts"]]
        before = answer["before"]
        if before is None:
            break
    assert seen == list(range(COUNT))[::-1]


@pytest.mark.parametrize("scanned", [1, 7, 1000])
def test_receipts_of_an_adapter_are_all_found(page: TestClient, monkeypatch: pytest.MonkeyPatch, scanned: int) -> None:
    monkeypatch.setattr(receipts_view, "SCANNED", scanned)
    everything = page.get("/api/receipts", params={"limit": COUNT}).json()["receipts"]
    digest = DIGESTS["shout"]
    wanted = [one["seq"] for one in everything if digest in [used["digest"] for used in one["adapters"]]]
    seen, before = [], COUNT
    while before is not None:
        answer = page.get("/api/receipts", params={"limit": 4, "before": before, "adapter": digest}).json()
        seen += [one["seq"] for one in answer["receipts"]]
        before = answer["before"]
    assert len(wanted) > 10 and seen == wanted


def test_a_proof_is_the_librarys(page: TestClient, state: Path) -> None:
    answer = page.get("/api/receipts/17/proof")
    assert answer.headers["content-disposition"] == 'attachment; filename="receipt-17.tlog-proof"'
    with ReceiptLog.open(state, read_only=True) as log:
        assert answer.text == str(prove(log, 17))
        assert verify_proof(parse_proof(answer.content), log.key).checkpoint.size == COUNT


def test_secrets_and_private_names_are_never_told(page: TestClient) -> None:
    paths = ["overview", f"receipts?limit={COUNT}", "adapters?limit=200", "earners", "epochs"]
    paths += [f"receipts/{seq}" for seq in range(40)] + [f"receipts/{seq}/proof" for seq in range(40)]
    for path in paths:
        answer = page.get(f"/api/{path}")
        assert answer.status_code == 200
        told = answer.text
        if path.endswith("proof"):
            told += decoded_receipt(told)
        assert "salts" not in told and "somebody" not in told and "alice" not in told
        assert '"secret"' not in told and "manner of secret" not in told
        salts = (made_of(f"{kind} salt {seq}").hex() for kind in ("prompt", "output") for seq in range(40))
        assert not any(one in told for one in salts)


def decoded_receipt(proof: str) -> str:
    return base64.b64decode(re.search(r"^extra (.*)$", proof, re.MULTILINE)[1]).decode()


def test_adapters_are_told_while_a_server_runs(page: TestClient, state: Path) -> None:
    listed = page.get("/api/adapters").json()
    assert [one["name"] for one in listed["adapters"]] == ["emoji", "haiku", "legal-french", "pirate", "shout", "sql"]
    assert page.get("/api/adapters", params={"wanted": DIGESTS["pirate"][:9]}).json()["count"] == 1
    run = state / "run" / "run.json"
    content = run.read_text()
    run.unlink()
    try:
        assert page.get("/api/adapters").json() == {"adapters": [], "count": 0, "after": None, "running": False}
        assert all(
            used["name"] is None for one in page.get("/api/receipts").json()["receipts"] for used in one["adapters"]
        )
    finally:
        run.write_text(content)
    settings = json.loads(content)
    settings["settings"]["access"]["private"] = {"pirate": ["alice"]}
    run.write_text(json.dumps(settings))  # a server that was started anew with another setting
    try:
        assert "pirate" not in page.get("/api/adapters").text
    finally:
        run.write_text(content)


def test_headers_let_nothing_in_from_elsewhere(page: TestClient) -> None:
    for path in ("/", "/main.js", "/style.css", "/api/overview", "/api/receipts/999999", "/none"):
        headers = page.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"


def test_nothing_of_the_page_is_inline_or_from_elsewhere() -> None:
    html = (STATIC / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:", html)
    for file in STATIC.rglob("*"):
        if file.suffix in (".html", ".css", ".js") and "vendor" not in file.parts:
            content = file.read_text()
            assert not re.search(r"https?://|innerHTML|insertAdjacentHTML|\beval\(|new Function", content), file


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("receipts/120", 400),
        ("receipts/-1", 400),
        ("receipts/99999999999999999999", 400),
        ("receipts/x", 422),
        ("receipts/120/proof", 400),
        ("receipts?limit=100000", 422),
        ("receipts?before=-1", 422),
        ("receipts?adapter=zz", 400),
        ("requests/zz", 404),
        ("requests/" + "0" * 64, 404),
        ("../app.py", 404),
        ("%2e%2e/%2e%2e/commands.py", 404),
    ],
)
def test_bad_questions_get_a_clear_no(page: TestClient, path: str, status: int) -> None:
    answer = page.get(f"/api/{path}")
    assert answer.status_code == status
    assert "Traceback" not in answer.text


def test_only_reading(page: TestClient, state: Path) -> None:
    for method in ("post", "put", "delete", "patch"):
        assert getattr(page, method)("/api/receipts/1").status_code == 405
    before = (state / "log" / "receipts.sqlite").read_bytes()
    page.get("/api/receipts")
    assert (state / "log" / "receipts.sqlite").read_bytes() == before


def test_a_new_state_directory_is_no_error(tmp_path: Path) -> None:
    with TestClient(create_app(tmp_path, SettlementView())) as client:
        assert client.get("/api/overview").json()["log"] is None
        assert client.get("/api/receipts").json() == {"receipts": [], "before": None, "size": 0}
        assert client.get("/api/receipts/0").status_code == 400
        assert client.get("/api/requests/" + "0" * 64).status_code == 404


def test_command_refuses_what_is_no_state_directory(tmp_path: Path) -> None:
    result = CliRunner().invoke(command_line, ["explore", "--state-dir", str(tmp_path / "none")])
    assert result.exit_code == 2 and "no state directory" in result.output


def test_command_serves_the_page(state: Path) -> None:
    with explorer(state) as address:
        assert "OpenLoRA" in httpx.get(address).text
        assert httpx.get(f"{address}api/overview").json()["log"]["size"] == COUNT
