"""Where adapters come from besides a directory of this machine: URIs, their drivers, and what every driver can do.

A source is a prefix below which lie `adapter_config.json`, `adapter_model.safetensors` and perhaps `openlora.json`.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Protocol
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from pydantic import Field

from ..errors import InvalidArgument

HTTP_SCHEMES = ("http", "https")
DRIVERS = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "hf": ("huggingface_hub", "hf")}  # module, extra of ours
HF_REVISION = re.compile(r"@(refs/(convert|pr)/[^/]+|[^/]*)")  # in hf://ORGANISATION/REPOSITORY@REVISION/PATH
MAX_URI_LENGTH = 2048
HIDDEN = "…"
MIN_BYTES_PER_SECOND = 1024  # on average over a stall's time

Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class SourceLimits:
    """How sources are read and how much is kept: `sources` of the settings."""

    __pydantic_config__ = {"extra": "forbid"}

    attempts: Positive = 5  # in a row that bring nothing new
    first_wait_seconds: Seconds = 0.5  # at most; doubled after every further attempt …
    longest_wait_seconds: Seconds = 30.0  # … up to this
    connect_seconds: Seconds = 10.0
    stall_seconds: Seconds = 30.0  # without an answer, or with less than a KiB a second
    parallel: Positive = 4  # adapters at once
    max_parts: Positive = 8  # interrupted downloads that are kept to be continued
    part_age_seconds: Positive = 86_400
    cache_bytes: Positive | None = None  # of all adapters on disk; None = what the disk holds
    keep_seconds: Positive = 900  # what was used within these isn't evicted: longer than any request may run


class SourceFault(Exception):
    """No fault of the adapter; `retry_after` is how long the server asks to be left alone, in seconds."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Transient(SourceFault):
    """May work when it is tried again, going on where it stopped."""


class SourceChanged(SourceFault):
    """Other bytes than were described before: everything has to be read anew."""


@dataclass(frozen=True)
class RemoteFile:
    """What a source says of one file. The same non-empty `tag` = the same bytes.

    Another `hint`, of what has no tag, = other bytes; the same one proves nothing, so no download goes on by it.
    """

    size: int | None
    tag: str
    hint: str = ""


class Source(Protocol):
    """Reads one adapter. `name` is that of a file in it.

    Raises:
        Transient, SourceChanged: worth another attempt.
        AdapterInvalid: what is there can't be an adapter's file.
        Unavailable: access denied.
    """

    def describe(self, name: str) -> RemoteFile | None:
        """Without reading it; None when it isn't there."""

    def reading(self, name: str, start: int, file: RemoteFile) -> AbstractContextManager[tuple[int, Iterator[bytes]]]:
        """The bytes of `file` from `start` on, or from 0 when the source can't continue; where they begin is told."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class SourceUri:
    """A parsed URI. Only `public` may be shown or stored: it has neither user name nor password nor query."""

    parts: SplitResult

    @property
    def scheme(self) -> str:
        return self.parts.scheme

    @property
    def public(self) -> str:
        host = self.parts.netloc.rpartition("@")[2] if self.scheme in HTTP_SCHEMES else self.parts.netloc
        return f"{self.scheme}://{host}{self.parts.path}"

    @property
    def has_login(self) -> bool:
        """Whether it has a part that is never stored: without it, its files can't be had again."""
        return self.parts.geturl() != self.public

    @property
    def name(self) -> str:
        """The last part of its path, without a revision: what an adapter from here is called by default."""
        path = HF_REVISION.sub("", self.public, count=1) if self.scheme == "hf" else self.public
        return unquote(path.rpartition("/")[2])

    def redacted(self, text: str) -> str:
        """`text` without anything secret of this URI."""
        if self.scheme not in HTTP_SCHEMES:
            return text
        secrets = [self.parts.query, self.parts.username, self.parts.password]
        secrets += [value for _, value in parse_qsl(self.parts.query)]
        for secret in sorted({part for found in secrets if found for part in (found, unquote(found))}, key=len)[::-1]:
            text = text.replace(secret, HIDDEN)
        return text


def is_uri(source: str) -> bool:
    return "://" in source


def parse_uri(text: str) -> SourceUri:
    """A URI that adapters can be read from.

    Raises:
        InvalidArgument: naming the part that is wrong, or the extra that brings the missing driver. No message repeats
            what may be a password.
    """
    if len(text) > MAX_URI_LENGTH or re.search(r"[\x00-\x20\x7f\\\ud800-\udfff]", text):
        raise InvalidArgument(
            f"at most {MAX_URI_LENGTH} characters without spaces or backslashes are a URI",
            field="source",
        )
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError as error:
        raise InvalidArgument("this is no URI: its host or port can't be read", field="source") from error
    parts = parts._replace(path=parts.path.rstrip("/"))
    scheme = parts.scheme
    if scheme not in HTTP_SCHEMES and scheme not in DRIVERS:
        known = ", ".join(f"{known}://" for known in (*HTTP_SCHEMES, *DRIVERS))
        raise InvalidArgument(f"{scheme}:// is no source: a local path or one of {known} is wanted", field="source")
    if parts.fragment:
        raise InvalidArgument("a URI with a #fragment names no adapter", field="source")
    if not parts.netloc.rpartition("@")[2] or not parts.path.strip("/"):
        place = "HOST" if scheme in HTTP_SCHEMES else "NAME"
        raise InvalidArgument(f"{scheme}://{place}/PATH is wanted", field="source")
    if any(part in (".", "..") for part in unquote(parts.path).split("/")):
        raise InvalidArgument("a path with . or .. is no source", field="source")
    if scheme in DRIVERS:
        _check_driver(scheme)
        if parts.query or "@" in parts.netloc:
            raise InvalidArgument(
                f"{scheme}:// takes no credentials and no ?query in the URI: set them in the environment",
                field="source",
            )
    return SourceUri(parts)


def open_source(uri: SourceUri, limits: SourceLimits) -> Source:
    """What reads from `uri`; close it afterwards."""
    if uri.scheme in HTTP_SCHEMES:
        from .http_source import HttpSource

        return HttpSource(uri, limits)
    from .object_source import ObjectSource

    return ObjectSource(uri, limits)


def _check_driver(scheme: str) -> None:
    module, extra = DRIVERS[scheme]
    if importlib.util.find_spec(module) is None:
        raise InvalidArgument(
            f"{scheme}:// needs the package {module}: pip install 'openlora-triton[{extra}]'", field="source"
        )
