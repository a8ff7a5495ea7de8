"""What a server is made of on this machine: its processes, their memory, and what is left of them."""

from __future__ import annotations

import contextlib
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from waiting import wait_for

STUBS = ("adapter_resolver", "generation", "attribution")
PARTS = ("engine", "fetcher", "tritonserver", "gateway", *STUBS)


def server_processes(launcher_pid: int) -> dict[str, psutil.Process]:
    """The processes under a launcher by their part in it, the launcher among them."""
    found = {"launcher": psutil.Process(launcher_pid)}
    for process in found["launcher"].children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if part := _part(process.cmdline()):
                found[part] = process
    return found


def _part(command: list[str]) -> str | None:
    match command:
        case [program, model, *_] if program.endswith("triton_python_backend_stub"):
            return Path(model).parents[1].name  # …/model_repository/<model>/1/model.py
        case [program, *_] if program.endswith("tritonserver"):
            return "tritonserver"
        case [_, "-m", "openlora.engine.host", *_]:
            return "engine"
        case [_, "-m", "openlora.serving.fetcher", *_]:
            return "fetcher"
        case [_, "-m", "openlora_gateway", *_]:
            return "gateway"
    return None  # one that has not become what it will be


def pss_bytes(pid: int) -> int:
    """Proportional set size: what the process would free, with its share of what it shares."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/{pid}/smaps_rollup has no Pss line")


class MemoryWatch:
    """The memory of a server's processes over time, by part. A process that dies meanwhile is an error."""

    def __init__(self, launcher_pid: int) -> None:
        self.samples: dict[str, list[int]] = {}
        self._processes = server_processes(launcher_pid)

    def sample(self) -> None:
        for part, process in self._processes.items():
            self.samples.setdefault(part, []).append(pss_bytes(process.pid))


@dataclass(frozen=True)
class Leftovers:
    """What still belongs to a server of this state directory. Empty is false."""

    processes: tuple[str, ...]
    shared_memory: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.processes or self.shared_memory)


def leftovers(state_dir: Path) -> Leftovers:
    """Every process on the machine that names the state directory, and the shared memory of its servers."""
    root = state_dir.resolve()
    processes = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), *process.environ().values()]
            if process.status() != psutil.STATUS_ZOMBIE and any(_is_inside(word, root) for word in words):
                processes.append(f"{process.pid} {' '.join(process.cmdline())[:120]}")
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue  # gone meanwhile, or another user's
    prefix = f"openlora_{hashlib.sha256(str(root).encode()).hexdigest()[:12]}_"
    return Leftovers(tuple(processes), tuple(sorted(path.name for path in Path("/dev/shm").glob(f"{prefix}*"))))


def wait_until_gone(state_dir: Path, seconds: float) -> float:
    """How long it took until nothing was left. AssertionError: something still is."""
    begun = time.monotonic()
    wait_for("end of it all", lambda: not leftovers(state_dir), seconds, lambda: leftovers(state_dir))
    return time.monotonic() - begun


def _is_inside(word: str, root: Path) -> bool:
    return word == str(root) or word.startswith(f"{root}/")
