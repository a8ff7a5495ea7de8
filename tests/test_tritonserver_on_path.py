"""A tritonserver that is found on PATH, laid out as in an NGC container, is the one that is used."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from live_server import LiveServer

from openlora.errors import Unavailable
from openlora.serving.tritonserver import find_tritonserver
from openlora_client import OpenLoRAClient


def container(root: Path) -> Path:
    """`root/bin` and `root/backends` as under /opt/tritonserver, from the parts of the installed package."""
    install = find_tritonserver()
    backend, binaries = root / "backends" / "python", root / "bin"
    backend.mkdir(parents=True)
    binaries.mkdir()
    for file in install.python_backend:
        shutil.copy2(file, backend)
    started = binaries / "tritonserver"
    started.write_text(
        f'#!/bin/sh\ntouch "{root}/used"\nLD_LIBRARY_PATH="{install.libraries}" exec "{install.binary}" "$@"\n'
    )
    started.chmod(0o755)
    return binaries


def test_the_one_on_path_serves(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binaries = container(tmp_path / "opt")
    monkeypatch.setenv("PATH", f"{binaries}{os.pathsep}{os.environ['PATH']}")
    server = LiveServer(demo / "model", demo / "adapters", tmp_path / "state", [], {"engine": {"threads": 1}}).start()
    try:
        with OpenLoRAClient(server.grpc_url) as client:
            answer = client.generate("Tell me about the cat.", "pirate", max_tokens=40, temperature=0)
        assert answer.text.startswith(" Arr")
        assert (tmp_path / "opt" / "used").exists()
    finally:
        server.stop()


def test_one_without_a_python_backend_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binaries = container(tmp_path / "opt")
    stub = tmp_path / "opt" / "backends" / "python" / "triton_python_backend_stub"
    stub.unlink()
    monkeypatch.setenv("PATH", f"{binaries}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(Unavailable, match=f"lacks {stub}"):
        find_tritonserver()
