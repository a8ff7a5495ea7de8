"""Native CPU kernels: a list of operations, all layers of a decoder say, computed for the rows of a step in one call.

Every operation has its form in torch beside it (`engine/lora.py`, `engine/attention.py`, the model's own modules),
which is the reference in the tests and what runs where there is no compiler. The library has a C interface and is
loaded with ctypes, so it depends on no version of torch. It uses torch's own OpenMP threads: both name `libgomp.so.1`.
"""

from __future__ import annotations

import ctypes
import logging
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

SOURCES = Path(__file__).parent
LIBRARY = SOURCES / "native.so"

_LOG = logging.getLogger(__name__)

DTYPES = {torch.float32: "float", torch.bfloat16: "bf16"}
"""What the kernels compute in, and the end of their names."""

NORM, LINEAR, HEADS, ATTENTION, GATE = range(5)
"""Kinds of operations; kernels/decoder.cpp says what each computes."""

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}

OPERATION = np.dtype(
    [("kind", "i4"), ("input", "i4"), ("output", "i4"), ("residual", "i4")]
    + [(name, "u8") for name in ("weight", "key_weight", "bias", "scales", "keys", "values")]
    + [(name, "i8") for name in ("features", "columns", "group", "heads", "kv_heads", "head_dim", "rotated", "window")]
    + [("rotation", "i4"), ("activation", "i4"), ("parts", "i4"), ("unused", "i4")]
    + [("epsilon", "f4"), ("offset", "f4"), ("scaling", "f4"), ("softcap", "f4")],
    align=True,
)
BUFFER = np.dtype([("rows", "u8"), ("stride", "i8")])
STEP = np.dtype(
    [(name, "u8") for name in ("buffers", "segments", "shrunk", "quantized", "slots", "sequences", "tables")]
    + [("cos", "u8", 2), ("sin", "u8", 2)]
    + [(name, "i8") for name in ("rows", "segment_count", "members", "sequence_count", "table_width", "block_size")]
)
SEQUENCE = np.dtype([("row", "i4"), ("start", "i4"), ("tokens", "i4")])
"""`Operation`, `Buffer` and `Step` of kernels/decoder.cpp, `Sequence` of kernels/attention.h. Pointers are numbers."""


class Kernels:
    """The kernels for one dtype. `threads` is what torch was set to use when this was made."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.threads = torch.get_num_threads()
        self._compute = getattr(library, f"compute_{DTYPES[dtype]}")
        self._compute.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int]
        self._compute.restype = None

    def compute(self, operations: np.ndarray, step: np.ndarray) -> None:
        """Compute `operations`, OPERATION `[count]`, one after the other for all rows of `step`, one STEP.

        The caller keeps alive what the addresses in them name.
        """
        self._compute(operations.ctypes.data, len(operations), step.ctypes.data, self.threads)


def kernels_for(dtype: torch.dtype, device: torch.device) -> Kernels | None:
    """The native kernels, or None where torch's operations must do: on a GPU, in float16, or without a library."""
    if device.type != "cpu" or dtype not in DTYPES:
        return None
    library = _load()
    return None if library is None else Kernels(library, dtype)


@lru_cache(maxsize=1)
def _load() -> ctypes.CDLL | None:
    problem = _why_not(LIBRARY)
    if problem:
        _LOG.warning("native kernels are not used: %s; models run through torch, slower", problem)
        return None
    return ctypes.CDLL(str(LIBRARY))


def _why_not(library: Path) -> str:
    """Why the library can't be used, if so."""
    again = "run `python -m openlora.engine.kernels.build`"
    if not library.is_file():
        return f"not compiled, {again}"
    sources = [*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]
    if max(source.stat().st_mtime for source in sources) > library.stat().st_mtime:
        return f"older than their sources, {again}"
    compiled_for = ctypes.CDLL(str(library)).cpu_is_right
    if not compiled_for():
        return f"compiled for another CPU, {again}"
    return ""
