"""Adapters over HTTP. httpx instead of fsspec's driver: that one reads an answer whole into memory, however long it is,
and can't be told which version of a file it should go on with.
"""

from __future__ import annotations

import asyncio
import os
import re
import ssl
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypeVar

import httpx

from ..errors import AdapterInvalid, InvalidArgument, Unavailable
from .sources import HTTP_SCHEMES, RemoteFile, SourceChanged, SourceLimits, SourceUri, Transient

MAX_REDIRECTS = 5
CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
GONE = (404, 410)
DENIED = (401, 403, 407)
TRY_AGAIN = (408, 425, 429)
NO_HEAD = (400, 403, 405, 501)  # what servers that only know GET, and URLs signed for GET, answer to HEAD

Result = TypeVar("Result")


class HttpSource:
    """A `Source` over HTTP(S). Credentials of the URI go to its own scheme, host and port, and nowhere else.

    On an event loop of its own: httpx's time-outs are those of one read, which may bring a single byte. What is awaited
    here ends in time as a whole, however much of a header, or of a chunk's, has come.
    """

    def __init__(self, uri: SourceUri, limits: SourceLimits) -> None:
        self._uri = uri
        parts = uri.parts
        self._login = None
        if "@" in parts.netloc:
            url = _url(parts.geturl())
            self._login = httpx.BasicAuth(url.username, url.password)
        self._parts = parts._replace(netloc=parts.netloc.rpartition("@")[2])
        self._origin = _origin(_url(self._parts.geturl()))
        self._patience, self._stall_seconds = limits.connect_seconds + limits.stall_seconds, limits.stall_seconds
        self._client = httpx.AsyncClient(
            auth=None if self._login else _netrc(),
            verify=trusted_certificates(),
            headers={"Accept-Encoding": "identity", "User-Agent": "openlora"},
            timeout=httpx.Timeout(limits.stall_seconds, connect=limits.connect_seconds),
        )
        self._loop = asyncio.new_event_loop()

    def close(self) -> None:
        self._loop.run_until_complete(self._client.aclose())
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def describe(self, name: str) -> RemoteFile | None:
        with self._answer("HEAD", name, {}) as response:
            if response.status_code not in NO_HEAD:
                return self._described(name, response)
        with self._answer("GET", name, {}) as response:  # its body isn't read
            return self._described(name, response)

    @contextmanager
    def reading(self, name: str, start: int, file: RemoteFile) -> Iterator[tuple[int, Iterator[bytes]]]:
        headers = {"Range": f"bytes={start}-", "If-Range": file.tag} if start else {}
        with self._answer("GET", name, headers) as response:
            found = self._described(name, response)
            if found is None or (found.tag, found.hint) != (file.tag, file.hint):
                raise SourceChanged(f"{self._place(name)} changed while it was downloaded")
            if response.status_code == 206:
                self._check_range(name, response, start, file)
            else:
                start = 0
                if None not in (found.size, file.size) and found.size != file.size:
                    raise SourceChanged(f"{self._place(name)} has {found.size} bytes, it had {file.size}")
            yield start, self._pieces(name, response)

    def _pieces(self, name: str, response: httpx.Response) -> Iterator[bytes]:
        pieces = response.aiter_raw()
        with self._translated(name):
            while piece := self._within(self._stall_seconds, _next(pieces)):
                yield piece

    def _described(self, name: str, response: httpx.Response) -> RemoteFile | None:
        status, place = response.status_code, self._place(name)
        if status in GONE:
            return None
        if status in DENIED:
            raise Unavailable(f"{place}: access denied ({status} {response.reason_phrase})")
        if status in TRY_AGAIN or status >= 500:
            raise Transient(f"{place}: {status} {response.reason_phrase}", _retry_after(response))
        if status in (412, 416):
            raise SourceChanged(f"{place} is shorter than it was ({status})")
        if status not in (200, 206):
            raise AdapterInvalid(f"{place}: {status} {response.reason_phrase}, a file is wanted")
        headers = response.headers
        if headers.get("content-type", "").lower().startswith("text/html"):
            raise AdapterInvalid(f"{place} is a web page (text/html), not a file")
        if (encoding := headers.get("content-encoding", "identity").lower()) != "identity":
            raise AdapterInvalid(f"{place} is sent as {encoding:.20}, plain bytes were asked for")
        length, tag = headers.get("content-length", ""), headers.get("etag", "")
        size = int(length) if re.fullmatch(r"\d{1,18}", length) else None
        if tag.startswith('"'):
            return RemoteFile(size, tag)
        return RemoteFile(size, "", f"{tag} {headers.get('last-modified', '')}")  # W/"…" promises similar bytes only

    def _check_range(self, name: str, response: httpx.Response, start: int, file: RemoteFile) -> None:
        sent = CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
        if not start or sent is None or int(sent[1]) != start or sent[3] not in ("*", str(file.size)):
            raise SourceChanged(f"{self._place(name)}: bytes from {start} on were asked for, others were sent")

    @contextmanager
    def _answer(self, method: str, name: str, headers: dict[str, str]) -> Iterator[httpx.Response]:
        """The answer after redirects, its body unread."""
        url = _url(self._parts._replace(path=f"{self._parts.path}/{name}").geturl())
        for _ in range(MAX_REDIRECTS + 1):
            own = self._login if self._login and _origin(url) == self._origin else httpx.USE_CLIENT_DEFAULT
            with self._translated(name):
                request = self._client.build_request(method, url, headers=headers)
                response = self._within(self._patience, self._client.send(request, auth=own, stream=True))
            try:
                if not response.has_redirect_location:
                    yield response
                    return
                url = self._redirected(name, url, response.headers["location"])
            finally:
                self._loop.run_until_complete(response.aclose())
        raise AdapterInvalid(f"{self._place(name)}: more than {MAX_REDIRECTS} redirects")

    def _redirected(self, name: str, url: httpx.URL, location: str) -> httpx.URL:
        try:
            target = url.join(location)
        except httpx.InvalidURL as error:
            raise AdapterInvalid(f"{self._place(name)}: redirected to what is no URL") from error
        if target.scheme not in HTTP_SCHEMES or not target.host:
            raise AdapterInvalid(f"{self._place(name)}: redirected to {target.scheme or 'no'}://, which isn't followed")
        if url.scheme == "https" and target.scheme == "http":
            raise AdapterInvalid(f"{self._place(name)}: redirected from https to http, which isn't followed")
        return target

    @contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        try:
            yield
        except (httpx.TimeoutException, TimeoutError) as error:
            raise Transient(f"{self._place(name)}: no answer for too long") from error
        except (httpx.TransportError, httpx.StreamError) as error:
            raise Transient(f"{self._place(name)}: {_cause(error)}") from error

    def _within(self, seconds: float, answer: Coroutine[None, None, Result]) -> Result:
        """Raises TimeoutError when it takes longer; what was waited for is given up then."""
        return self._loop.run_until_complete(asyncio.wait_for(answer, seconds))

    def _place(self, name: str) -> str:
        return f"{self._uri.public}/{name}"


async def _next(pieces: AsyncIterator[bytes]) -> bytes:
    """Empty when there are no more."""
    return await anext(pieces, b"")


def _url(text: str) -> httpx.URL:
    try:
        return httpx.URL(text)
    except httpx.InvalidURL:
        raise InvalidArgument("this is no URL that HTTP knows", field="source") from None


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _cause(error: BaseException) -> str:
    """What the operating system or TLS said, if that is below it."""
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, BaseExceptionGroup):  # of a host with several addresses
            below = below.exceptions[0]
        if isinstance(below, OSError):
            error = below
        below = below.__cause__ or below.__context__
    return str(error) or type(error).__name__


def _retry_after(response: httpx.Response) -> float:
    asked = response.headers.get("retry-after", "")
    return float(asked) if re.fullmatch(r"\d{1,9}", asked) else 0.0


@cache
def trusted_certificates() -> ssl.SSLContext:
    """The certificates that this process trusts, read once: that takes longer than a small adapter does."""
    return httpx.create_ssl_context()


def _netrc() -> httpx.NetRCAuth | None:
    """Logins of this user, as curl -n has them: so none has to be in a URI."""
    import netrc

    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return httpx.NetRCAuth(str(path)) if path.is_file() else None
    except netrc.NetrcParseError as error:
        raise InvalidArgument(f"{path} can't be read: line {error.lineno}", field="netrc") from error
