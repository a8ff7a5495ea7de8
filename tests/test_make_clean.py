"""`make clean` removes what can be made again, and nothing of a server's state, which lies in var as well."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from documents import ROOT

STATE = ["keys/receipt.key", "journal/journal-00000000.seg", "log/receipts.sqlite", "log.pub", "callers.sqlite"]
STATE += ["catalog.sqlite", "closed/0123/log.pub", "settle/outbox.sqlite", "devnet/keys/admin.key", "bench.jsonl"]
MADE = [".venv/installed", "contracts/node_modules/installed", "tests/browser/node_modules/installed"]
MADE += ["var/demo/model/config.json", "var/tools/perf_analyzer", "var/peers/shape/model/config.json"]


@pytest.mark.parametrize("served", [True, False])
def test_clean_keeps_state(tmp_path: Path, served: bool) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    state = [tmp_path / "var" / name for name in STATE] if served else []
    made = [tmp_path / name for name in MADE]
    for file in state + made:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("here")
    done = subprocess.run(["make", "clean"], cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert [file for file in state if not file.exists()] == []
    assert [file for file in made if file.exists()] == []
    assert ("kept: var" in done.stdout) == served
