"""The messages between the generation step and the engine process: msgpack over an ipc socket, one a step each way."""

from __future__ import annotations

import msgspec

from .api import EngineInfo, EngineOutput, EngineRequest, EngineStats


class Hello(msgspec.Struct, tag=True, frozen=True):
    """First word of a client; the engine drops the requests of a client whose process ends."""

    pid: int


class Submit(msgspec.Struct, tag=True, frozen=True):
    """Requests to queue; each is answered until an output of it has a finish reason."""

    requests: tuple[EngineRequest, ...]


class Cancel(msgspec.Struct, tag=True, frozen=True):
    """Requests to stop; ids that are not known are ignored."""

    request_ids: tuple[str, ...]


class Welcome(msgspec.Struct, tag=True, frozen=True):
    """The answer to a hello: another pid than before is another engine, which knows no request of the last one."""

    pid: int
    info: EngineInfo


class Outputs(msgspec.Struct, tag=True, frozen=True):
    """What one step made for the requests of one client."""

    outputs: tuple[EngineOutput, ...]


class Figures(msgspec.Struct, tag=True, frozen=True):
    """The engine's statistics, told every second or so to whoever may publish them."""

    stats: EngineStats


class EngineConfig(msgspec.Struct, frozen=True):
    """What the launcher writes for the engine process, which must not import the server's libraries."""

    kind: str  # `engine.kind` of the settings
    model_dir: str
    base_digest: str  # manifest digest, 64 hex digits
    socket: str  # where it takes requests
    status_socket: str  # where it tells the launcher how it is
    launcher_pid: int  # it ends with that process
    threads: int | None  # of computing; None = as the libraries like it
    options: dict[str, object]  # keyword arguments of the engine's class


class Report(msgspec.Struct, frozen=True):
    """What a process tells the launcher: at its start, when its state changes, and every second or so."""

    name: str  # engine | fetcher | adapter_resolver | generation | attribution
    pid: int
    ready: bool
    reason: str = ""
    stats: EngineStats | None = None


ToEngine = Hello | Submit | Cancel
ToClient = Welcome | Outputs | Figures
