"""Where the public RFC 6962 vectors are. They are not ours, and no part of this repository: who has them names them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VARIABLE = "OPENLORA_RFC6962_VECTORS"
_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "vectors" / "rfc6962" / "vectors.json"


def rfc6962_vectors() -> Path | None:
    """The file that the variable names, else the one beside the checkout; None: there is none."""
    named = os.environ.get(VARIABLE)
    if named and not Path(named).is_file():
        raise FileNotFoundError(f"{VARIABLE}: there is no {named}")
    return Path(named) if named else _BESIDE if _BESIDE.is_file() else None


needs_public_vectors = pytest.mark.skipif(
    rfc6962_vectors() is None, reason=f"{VARIABLE} names no vectors.json of transparency-dev/merkle"
)
