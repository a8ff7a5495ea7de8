"""The messages between the generation step and the fetcher process: msgpack over an ipc socket."""

from __future__ import annotations

import msgspec

from ..adapters.catalog_rows import BaseFacts
from ..adapters.sources import SourceLimits
from ..engine.wire import Hello


class Fetch(msgspec.Struct, tag=True, frozen=True):
    """Have the bytes of this digest in the cache, from where the catalog says that `name` has them."""

    digest: str
    name: str


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The answer to a hello."""

    pid: int


class Fetched(msgspec.Struct, tag=True, frozen=True):
    """The bytes of a digest are in the cache, or why they are not."""

    digest: str
    error: str = ""  # str() of an OpenLoRAError


class FetcherConfig(msgspec.Struct, frozen=True):
    """What the launcher writes for the fetcher process."""

    state_dir: str
    base: BaseFacts
    limits: SourceLimits
    socket: str
    status_socket: str
    launcher_pid: int


ToFetcher = Hello | Fetch
FromFetcher = Ready | Fetched
