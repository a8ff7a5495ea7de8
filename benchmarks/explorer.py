"""How long the page takes over a log of 100,000 receipts: a fresh server, a fresh browser, then view by view.

    python benchmarks/explorer.py [--receipts 100000] [--runs 5] [--json FILE]

Needs `make browser-tools`. The log is made through the real ReceiptLog, in a temporary directory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from browser_tools import BROWSER_TESTS, require_chromium, require_node_modules  # noqa: E402
from explorer_cases import explorer, make_catalog, make_log  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--receipts", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="Append one line with all times, in ms.")
    options = parser.parse_args()
    require_node_modules()
    chromium = require_chromium()
    console = Console()
    with tempfile.TemporaryDirectory() as directory:
        state = Path(directory) / "state"
        with console.status(f"making {options.receipts} receipts …"):
            make_log(state, options.receipts).close()
            make_catalog(state)
        with console.status("looking …"), explorer(state) as page:
            taken = _look(page, options.runs, options.receipts, chromium)
    table = Table("view", "ms, median", "ms, longest", title=f"{options.receipts} receipts, {options.runs} runs")
    for name, times in taken.items():
        table.add_row(name, f"{statistics.median(times):.0f}", f"{max(times):.0f}")
    console.print(table)
    if options.json:
        with options.json.open("a") as file:
            file.write(json.dumps({"receipts": options.receipts, "ms": taken}) + "\n")


def _look(page: str, runs: int, receipts: int, chromium: str) -> dict[str, list[float]]:
    environment = {"PAGE": page, "RUNS": str(runs), "COUNT": str(receipts), "CHROMIUM": chromium}
    run = subprocess.run(
        ["node", "timing.mjs"],
        cwd=BROWSER_TESTS,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    if run.returncode != 0:
        sys.exit(run.stderr)
    return json.loads(run.stdout)


if __name__ == "__main__":
    main()
