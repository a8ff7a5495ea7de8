"""Adapters in object stores, through fsspec: `s3://`, `gs://`, `hf://`, each with its driver's own ways to log in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Thread
from typing import Any

import fsspec
from fsspec.exceptions import FSTimeoutError

from ..errors import Unavailable
from .sources import MIN_BYTES_PER_SECOND, RemoteFile, SourceChanged, SourceLimits, SourceUri, Transient

BLOCK_BYTES = 4 << 20  # at most in one request, and what is held in memory
GROWTH = 4  # of a block that follows on one …
QUICK = 1 / 8  # … which took so much of the time that it had
TAGS = ("ETag", "etag", "generation", "md5Hash", "blob_id")  # s3fs, gcsfs, huggingface_hub: the first one there
MISSING = (404, 410)
DENIED = range(400, 500)
TRY_AGAIN = (408, 425, 429)


class ObjectSource:
    """A `Source` in an object store."""

    def __init__(self, uri: SourceUri, limits: SourceLimits) -> None:
        self._uri = uri
        self._limits = limits
        self._root = f"{uri.parts.netloc}{uri.parts.path}"
        self._files = fsspec.filesystem(
            uri.scheme, skip_instance_cache=True, use_listings_cache=False, **_options(uri.scheme, limits)
        )

    def close(self) -> None:
        """Connections are the driver's and end with the process."""

    def describe(self, name: str) -> RemoteFile | None:
        try:
            with self._translated(name):
                self._files.invalidate_cache()  # huggingface_hub's driver keeps listings, whatever it is told
                facts = self._called(self._files.info, f"{self._root}/{name}")
        except FileNotFoundError:
            return None
        if facts["type"] != "file":
            return None
        tag = next((str(facts[key]) for key in TAGS if facts.get(key)), "")
        return RemoteFile(facts["size"], tag)

    @contextmanager
    def reading(self, name: str, start: int, file: RemoteFile) -> Iterator[tuple[int, Iterator[bytes]]]:
        yield start, self._blocks(name, start, file)

    def _blocks(self, name: str, start: int, file: RemoteFile) -> Iterator[bytes]:
        if file.size is None:
            raise Unavailable(f"{self._uri.public}/{name}: the store doesn't say how long it is")
        # A block has the time in which nothing at all may come, so the first one is what may come least in it.
        size = max(int(self._limits.stall_seconds * MIN_BYTES_PER_SECOND), 1)
        while start < file.size:
            end, begun = min(start + min(size, BLOCK_BYTES), file.size), time.monotonic()
            try:
                with self._translated(name):
                    block = self._called(self._files.cat_file, f"{self._root}/{name}", start=start, end=end)
            except FileNotFoundError:
                raise SourceChanged(f"{self._uri.public}/{name} was removed while it was downloaded") from None
            if len(block) != end - start:
                raise SourceChanged(f"{self._uri.public}/{name}: {end - start} bytes asked for, got {len(block)}")
            if time.monotonic() - begun < QUICK * self._limits.stall_seconds:
                size *= GROWTH
            start = end
            yield block

    def _called(self, method: Callable[..., Any], path: str, **more: Any) -> Any:
        """What a method of the driver returns. TimeoutError: not in time, whatever has come of it."""
        seconds = self._limits.connect_seconds + self._limits.stall_seconds
        if self._files.async_impl:
            return method(path, timeout=seconds, **more)
        if method == self._files.cat_file:
            more["cache_type"] = "none"  # or it reads ahead, and throws away what it read
        return _within(seconds, lambda: method(path, **more))

    @contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        """Drivers raise whatever their libraries do; what isn't plainly an answer is worth another attempt."""
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:
            place = f"{self._uri.public}/{name}"
            if isinstance(error, TimeoutError | FSTimeoutError):
                raise Transient(f"{place}: no answer for too long") from error
            said = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
            status = _status(error)
            if status in MISSING:
                raise FileNotFoundError(place) from error
            denied = status in DENIED and status not in TRY_AGAIN
            if isinstance(error, PermissionError) or denied or "Credentials" in type(error).__name__:
                raise Unavailable(f"{place}: access denied ({said})") from error
            raise Transient(f"{place}: {said}") from error


def _options(scheme: str, limits: SourceLimits) -> dict[str, Any]:
    if scheme != "s3":
        return {}
    patience = {"connect_timeout": limits.connect_seconds, "read_timeout": limits.stall_seconds}
    return {"config_kwargs": {**patience, "retries": {"total_max_attempts": 1}}}


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """What `call` returns. One that takes longer is left alone, in a thread that holds up no process's end."""
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    Thread(target=run, daemon=True).start()
    return outcome.result(seconds)


def _status(error: Exception) -> int | None:
    """The HTTP status behind an error of huggingface_hub, gcsfs or botocore."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return getattr(response, "status_code", None)
