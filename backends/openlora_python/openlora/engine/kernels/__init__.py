"""Native CPU kernels: linears, grouped LoRA products, paged attention, and what lies between the products of a layer.

Each has its form in torch beside it (`engine/lora.py`, `engine/attention.py`, the model's own modules), which is the
reference in the tests and what runs where there is no compiler. The library has a C interface and is loaded with
ctypes, so it depends on no version of torch. It uses torch's own OpenMP threads: both name `libgomp.so.1`.
"""

from __future__ import annotations

import ctypes
import logging
from functools import lru_cache
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
LIBRARY = SOURCES / "native.so"

_LOG = logging.getLogger(__name__)

DTYPES = {torch.float32: "float", torch.bfloat16: "bf16"}
"""What the kernels compute in, and the end of their names."""

_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "int8_linear": [_POINTER, _LONG, *[_POINTER] * 4, _LONG, _LONG, _LONG, _INT, _INT],
    "adapted_linear": [
        *[_POINTER, _LONG, _POINTER, _POINTER, _POINTER, *[_LONG] * 4],
        *[_POINTER, *[_LONG] * 3, _POINTER, _INT],
    ],
    "paged_attention": [_POINTER] * 8 + [_LONG, _POINTER, _INT],
    "rms_norm": [_POINTER, _LONG, _POINTER, _POINTER, _LONG, _LONG, _FLOAT, _FLOAT, _INT],
    "silu_multiply": [_POINTER, _LONG, _POINTER, _LONG, _POINTER, _LONG, _LONG, _INT],
    "rotate": [_POINTER, _LONG, _LONG, _POINTER, _POINTER, _POINTER, _LONG, _LONG, _LONG, _INT],
}


class Kernels:
    """The kernels for one dtype. Arguments are addresses, sizes and strides in elements, as the sources say.

    `threads` is what torch was set to use when this was made.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.threads = torch.get_num_threads()
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, f"{name}_{DTYPES[dtype]}")
            function.argtypes, function.restype = arguments, None
            setattr(self, name, function)


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
        _LOG.warning("native kernels are not used: %s; adapters and attention run through torch, slower", problem)
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
