"""What the log's tree costs: building it anew at a start, a checkpoint under traffic, proofs, verifying a proof file.

    python benchmarks/receipt_tree.py [--receipts 1000000] [--work DIR] [--json FILE]

A log of many rows is made in the form of the real one (leaf hashes are random, so nothing can be verified in it but the
tree), then opened as the attribution step does. One JSON line, then a table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sqlite3
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from openlora.attribution.checkpointer import Checkpointer
from openlora.attribution.log import ReceiptLog
from openlora.attribution.merkle_tree import MerkleTree, verify_consistency, verify_inclusion

REPEATS = 200
GATES = {"start_s": 3.0}


def measure_tree(receipts: int, state: Path) -> dict[str, Any]:
    """Seconds of wall time: `start_s` is what the attribution step waits for before it serves."""
    ReceiptLog.open(state).close()
    path = state / "log" / "receipts.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        rows = ((seq, os.urandom(32), bytes(608), os.urandom(32), bytes(65)) for seq in range(receipts))
        connection.executemany("INSERT INTO receipts VALUES (?, ?, ?, ?, ?)", track(rows, "rows", total=receipts))
    with closing(ReceiptLog.open(state)) as log:
        checkpointer = Checkpointer(log)
        first, _ = _timed(lambda: checkpointer.sign_due(now=True))
    with closing(ReceiptLog.open(state)) as log:
        cpu = time.process_time()
        start, _ = _timed(lambda: Checkpointer(log))
        cpu = time.process_time() - cpu
        tree_s, tree = _timed(lambda: MerkleTree(log.leaf_hashes()))
        leaves = [hashlib.sha256(bytes((one % 256,))).digest() for one in range(REPEATS)]
        sign_s, _ = _timed(lambda: [log.sign_checkpoint(receipts + 1 + n, leaf) for n, leaf in enumerate(leaves)])
        leaf, root = next(iter(log.leaf_hashes(receipts // 3, receipts // 3 + 1))), tree.root()
    proof = tree.inclusion_proof(receipts // 3)
    prove_s, _ = _timed(lambda: [tree.inclusion_proof(receipts // 3) for _ in range(REPEATS)])
    extend = tree.consistency_proof(receipts // 2)
    half = tree.root(receipts // 2)
    verify_s, good = _timed(
        lambda: all(verify_inclusion(leaf, receipts // 3, receipts, proof, root) for _ in range(REPEATS))
    )
    consistent_s, also = _timed(
        lambda: all(verify_consistency(receipts // 2, half, receipts, root, extend) for _ in range(REPEATS))
    )
    if not good or not also:
        raise RuntimeError("a proof did not verify")
    return {
        "receipts": receipts,
        "start_s": round(start, 3),
        "start_cpu_s": round(cpu, 3),
        "first_checkpoint_s": round(first, 3),
        "whole_tree_s": round(tree_s, 3),
        "checkpoint_ms": round(sign_s / REPEATS * 1e3, 3),
        "prove_us": round(prove_s / REPEATS * 1e6, 1),
        "verify_inclusion_us": round(verify_s / REPEATS * 1e6, 1),
        "verify_consistency_us": round(consistent_s / REPEATS * 1e6, 1),
    }


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    before = time.perf_counter()
    result = work()
    return time.perf_counter() - before, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--receipts", type=int, default=1_000_000)
    parser.add_argument("--work", type=Path, help="a directory on the disk to measure; a temporary one without it")
    parser.add_argument("--json", type=Path, help="append the JSON line to this file")
    arguments = parser.parse_args()
    if arguments.work is not None:
        arguments.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.work) as scratch:
        measured = measure_tree(arguments.receipts, Path(scratch) / "state")
    line = json.dumps({"benchmark": "receipt_tree", **measured})
    print(line)
    if arguments.json is not None:
        with arguments.json.open("a") as file:
            file.write(line + "\n")
    table = Table("", "measured", "gate")
    for name, value in measured.items():
        table.add_row(name, str(value), f"<= {GATES[name]:g}" if name in GATES else "")
    Console().print(table)


if __name__ == "__main__":
    main()
