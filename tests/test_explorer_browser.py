"""The page in headless Chromium, over 100,000 receipts."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from browser_tools import BROWSER_TESTS, require_chromium, require_node_modules
from explorer_cases import explorer, make_catalog, make_log

from openlora.explorer.proofs import ProofMaker


def test_page(tmp_path: Path) -> None:
    chromium = require_chromium()
    require_node_modules()
    state, empty, files = tmp_path / "state", tmp_path / "empty", tmp_path / "files"
    empty.mkdir()
    files.mkdir()
    make_log(state, 100_000).close()
    make_catalog(state)
    with make_log(tmp_path / "strangers", 3) as log:
        (files / "strangers.tlog-proof").write_text(str(ProofMaker().prove(log, 1)))
    shutil.copy(state / "log.pub", files)
    with explorer(state) as page, explorer(empty) as nothing:
        run = subprocess.run(
            ["node", "--test", "page.test.mjs"],
            cwd=BROWSER_TESTS,
            env=os.environ | {"PAGE": page, "EMPTY": nothing, "FILES": str(files), "CHROMIUM": chromium},
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "# fail 0" in run.stdout and "# pass 0" not in run.stdout, run.stdout
