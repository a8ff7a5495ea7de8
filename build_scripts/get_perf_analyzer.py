"""Fetch perf_analyzer: the last build that runs on Debian 12 is inside the tritonclient 2.50.0 wheel.

The wheel is unpacked, never installed. Two libraries that the binary wants lie in the nvidia-pytriton package.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "tritonclient==2.50.0"
MEMBER = "perf_analyzer"
LIBRARIES = {"libb64.so.0d": "libb64-*.so*", "libcudart.so.12": "libcudart-*.so.12*"}


def get_perf_analyzer(target: Path) -> Path:
    """The binary in `target`, with its libraries in `target/lib`; fetched once."""
    binary = target / MEMBER
    if binary.is_file():
        return binary
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps", WHEEL]
            + ["--only-binary=:all:", "--platform", "manylinux1_x86_64", "--dest", folder],
            check=True,
        )
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(f"/bin/{MEMBER}")]
            incoming = target / f".{MEMBER}.{os.getpid()}"
            incoming.write_bytes(archive.read(member))
    incoming.chmod(incoming.stat().st_mode | stat.S_IXUSR)
    _link_libraries(target / "lib")
    incoming.replace(binary)
    return binary


def _link_libraries(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    package = Path(importlib.util.find_spec("pytriton").submodule_search_locations[0])
    for name, pattern in LIBRARIES.items():
        (source,) = (package.parent / "nvidia_pytriton.libs").glob(pattern)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(source)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("var/tools"))
    print(get_perf_analyzer(parser.parse_args().out))
