"""The interpreter that has vLLM: `make test-vllm` makes it; without it, tests of vLLM are skipped and say so."""

from __future__ import annotations

import os
from pathlib import Path

from environments import VLLM

DIRECTORY = Path(os.environ.get("OPENLORA_TEST_VLLM", Path(__file__).resolve().parents[1] / "var" / "peers" / "vllm"))
SKIP = f"NOT TESTED WITH vLLM: there is no {VLLM} in {DIRECTORY}; `make test-vllm` installs it and runs these tests"


def vllm_python() -> Path | None:
    """None where it isn't installed."""
    done = DIRECTORY / "installed"
    return DIRECTORY / "bin" / "python" if done.is_file() and done.read_text().strip() == VLLM else None
