"""Errors of commands: one line of one form on stderr and the exit code of the error's kind, from every group."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FAILING = {
    "serve --model nowhere --http-port 0": (2, "[INVALID_ARGUMENT] http_port: "),
    "stop --state-dir nowhere": (7, "[UNAVAILABLE] no server runs on nowhere"),
    "generate -a poet=much hello": (2, "[INVALID_ARGUMENT] adapter: 'poet=much': "),
    "adapters show nobody --state-dir nowhere": (7, "[UNAVAILABLE] "),
    "keys list --state-dir nowhere": (2, "[INVALID_ARGUMENT] "),
    "receipts list --state-dir nowhere": (2, "[INVALID_ARGUMENT] state-dir: no receipt log at nowhere"),
    "network revoke abc --key none --deployment none": (2, "[INVALID_ARGUMENT] deployment: can't read "),
    "engines show nothing --recipes nowhere": (2, "[INVALID_ARGUMENT] "),
}


@pytest.mark.parametrize("words", FAILING)
def test_an_error_is_one_line_and_an_exit_code(words: str, tmp_path: Path) -> None:
    code, start = FAILING[words]
    done = subprocess.run(
        [sys.executable, "-m", "openlora.cli", *words.split()], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert done.stderr.startswith(start)
    assert done.stderr.count("\n") == 1
