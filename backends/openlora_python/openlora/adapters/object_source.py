"""Adapters in object stores, through fsspec: `s3://`, `gs://`, `hf://`, each with its driver's own ways to log in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

from ..errors import Unavailable
from .sources import RemoteFile, SourceChanged, SourceLimits, SourceUri, Transient

BLOCK_BYTES = 4 << 20  # one request, and what is held in memory
TAGS = ("ETag", "etag", "generation", "md5Hash", "blob_id")  # s3fs, gcsfs, huggingface_hub: the first one there
MISSING = (404, 410)
DENIED = range(400, 500)
TRY_AGAIN = (408, 425, 429)


class ObjectSource:
    """A `Source` in an object store."""

    def __init__(self, uri: SourceUri, limits: SourceLimits) -> None:
        self._uri = uri
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
                facts = self._files.info(f"{self._root}/{name}")
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
        while start < file.size:
            end = min(start + BLOCK_BYTES, file.size)
            try:
                with self._translated(name):
                    block = self._files.cat_file(f"{self._root}/{name}", start=start, end=end)
            except FileNotFoundError:
                raise SourceChanged(f"{self._uri.public}/{name} was removed while it was downloaded") from None
            if len(block) != end - start:
                raise SourceChanged(f"{self._uri.public}/{name}: {end - start} bytes asked for, got {len(block)}")
            start = end
            yield block

    @contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        """Drivers raise whatever their libraries do; what isn't plainly an answer is worth another attempt."""
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:
            place = f"{self._uri.public}/{name}"
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


def _status(error: Exception) -> int | None:
    """The HTTP status behind an error of huggingface_hub, gcsfs or botocore."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return getattr(response, "status_code", None)
