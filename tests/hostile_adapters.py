"""A corpus of hostile adapters: kinds by name, each of which spoils one copy of a good adapter directory.

The good one is of the tiny Llama of `tiny_models` (hidden size 64, q_proj 64 → 64, v_proj 64 → 32, three layers), rank
4 on `q_proj` and `v_proj`, in F32. Each kind says what ingest must make of it and a part of the reason it must give.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from hostile_configs import CONFIGS
from hostile_files import CARDS, FILES
from hostile_kind import Hostile
from hostile_weights import KEYS, NUMBERS, RAW, TENSORS

CORPUS: dict[str, Hostile] = {**FILES, **CARDS, **RAW, **TENSORS, **KEYS, **NUMBERS, **CONFIGS}


def write_corpus(good: Path, directory: Path) -> dict[str, Path]:
    """All kinds that this machine can make, each in `directory/<name>`."""
    written = {}
    for name, kind in CORPUS.items():
        folder = directory / name
        shutil.copytree(good, folder)
        try:
            kind.make(folder)
        except PermissionError:  # device nodes want root
            shutil.rmtree(folder)
        else:
            written[name] = folder
    return written
