"""Compiles the native kernels for this machine: `python -m openlora.engine.kernels.build`, which the set-up runs.

They are compiled for the very CPU that will run them, so the set-up must run where the engine does; `load` notices when
it did not. Without a compiler the engine works with torch's operations, several times slower with adapters.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from . import LIBRARY, SOURCES

# -ffast-math is not among them: NaN must stay NaN, and the order of sums is part of what the engine promises.
_FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC", "-std=c++17"]


def compile_kernels() -> Path:
    """Compile all `*.cpp` here into one library; whoever has the old one open keeps it.

    Raises:
        RuntimeError: there is no compiler, or it failed; with its own words.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError("no C++ compiler found (Debian: apt-get install g++)")
    fresh = LIBRARY.with_name(f".native-{os.getpid()}.so")
    command = [compiler, *_FLAGS, *map(str, sorted(SOURCES.glob("*.cpp"))), "-o", str(fresh)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
        fresh.replace(LIBRARY)
    finally:
        fresh.unlink(missing_ok=True)
    return LIBRARY


if __name__ == "__main__":
    try:
        compile_kernels()
    except RuntimeError as error:
        sys.exit(f"kernels: {error}")
    print("kernels: compiled for this CPU")
