"""Where a real tritonserver is on this machine, and how it is started for this project."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from ..config import RUN_DIR_VARIABLE, RunConfig
from ..errors import Unavailable

REPOSITORY_ROOT = Path(__file__).resolve().parents[4]
CLOSED_APIS = "model-repository,shared-memory,trace,logging"


@dataclass(frozen=True)
class TritonInstall:
    """A server binary with its python backend."""

    binary: Path
    python_backend: tuple[Path, ...]  # libtriton_python.so, triton_python_backend_utils.py, the stub
    libraries: Path | None  # what the stub needs on LD_LIBRARY_PATH


def find_tritonserver() -> TritonInstall:
    """An NGC container's `tritonserver` on PATH, else the one inside the `nvidia-pytriton` package.

    Raises:
        Unavailable: there is neither, or its python backend is not whole.
    """
    on_path = shutil.which("tritonserver")
    if on_path:
        binary = Path(on_path).resolve()
        backend = binary.parent.parent / "backends" / "python"
        install = TritonInstall(binary, _backend_files(backend, backend), None)
    else:
        spec = importlib.util.find_spec("pytriton")
        if spec is None or not spec.submodule_search_locations:
            raise Unavailable("no tritonserver on PATH and no nvidia-pytriton in this environment: run `make setup`")
        package = Path(next(iter(spec.submodule_search_locations)))
        server = package / "tritonserver"
        stub = server / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}"
        install = TritonInstall(
            server / "bin" / "tritonserver",
            _backend_files(server / "backends" / "python", stub),
            package.parent / "nvidia_pytriton.libs",
        )
    missing = [str(path) for path in (install.binary, *install.python_backend) if not path.is_file()]
    if missing:
        raise Unavailable(f"this tritonserver lacks {', '.join(missing)}")
    return install


def _backend_files(backend: Path, stub: Path) -> tuple[Path, ...]:
    return (
        backend / "libtriton_python.so",
        backend / "triton_python_backend_utils.py",
        stub / "triton_python_backend_stub",
    )


def build_backend_directory(install: TritonInstall, target: Path) -> None:
    """`target/python` and `target/openlora_python`: what `--backend-directory` wants.

    Files that tritonserver opens are copies: it refuses links that leave the directory.
    """
    shutil.rmtree(target, ignore_errors=True)
    source = REPOSITORY_ROOT / "backends" / "openlora_python"
    (target / "python").mkdir(parents=True)
    for file in install.python_backend:
        shutil.copy2(file, target / "python")
    (target / "openlora_python").mkdir()
    shutil.copy2(source / "model.py", target / "openlora_python")
    (target / "openlora_python" / "openlora").symlink_to(source / "openlora")


def server_command(install: TritonInstall, run: RunConfig, backends: Path, shm_prefix: str) -> list[str]:
    """The command line. Admin APIs are closed with a value that nobody is told."""
    settings = run.settings
    closed = f"openlora-admin={secrets.token_hex(32)}"
    return [
        str(install.binary),
        f"--model-repository={REPOSITORY_ROOT / 'model_repository'}",
        f"--backend-directory={backends}",
        "--model-control-mode=none",
        "--disable-auto-complete-config",
        f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
        "--backend-config=python,thread-pool-size=2",  # of responses in flight; its own 40 only wake each other
        f"--http-restricted-api={CLOSED_APIS},model-config:{closed}",
        # perf_analyzer cannot work without ModelConfig over gRPC; ours holds no parameters, only the committed text.
        f"--grpc-restricted-protocol={CLOSED_APIS}:{closed}",
        f"--http-address={settings.host}",
        f"--grpc-address={settings.host}",
        f"--metrics-address={settings.host}",
        f"--http-port={settings.http_port}",
        f"--grpc-port={settings.grpc_port}",
        f"--metrics-port={settings.metrics_port}",
        "--allow-gpu-metrics=false",
        "--exit-timeout-secs=5",
    ]


def server_environment(install: TritonInstall, run: RunConfig) -> dict[str, str]:
    """The stub runs the `python3` that is first on PATH: this interpreter's."""
    environment = dict(os.environ)
    environment[RUN_DIR_VARIABLE] = str(run.run_dir)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
    if install.libraries is not None:
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(
            filter(None, [str(install.libraries), environment.get("LD_LIBRARY_PATH", "")])
        )
    return environment
