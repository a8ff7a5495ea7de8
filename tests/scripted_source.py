"""A real HTTP server on loopback that serves files, and whose faults are scripted request by request."""

from __future__ import annotations

import base64
import hashlib
import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CHUNK = 4096
DRIP_SECONDS = 0.1


@dataclass(frozen=True)
class Fault:
    """What is wrong with one answer. Positions are those of the file, whatever range was asked for."""

    status: int | None = None  # this, and no file
    headers: dict[str, str] = field(default_factory=dict)
    cut_at: int | None = None  # the connection is closed here …
    reset: bool = False  # … by a reset
    stall_at: int | None = None  # nothing is sent from here on, until the test is over
    claim: int | None = None  # Content-Length
    body: bytes | None = None  # instead of the file
    ranges: bool = True
    endless: bool = False  # chunks of zeros, without a length
    drip: bytes | None = None  # the answer begins like this, and goes on a byte at a time until the test is over
    before: Callable[[], Any] = lambda: None  # is called before the answer


class ScriptedSource:
    """`files` by path; `faults` by path, then by method: used up one by one, the last one stays when `for_ever`.
    `marks` are the headers that tell one content from another."""

    def __init__(self, certificate: Path | None = None) -> None:
        """`certificate` is a PEM file with its key: HTTPS then."""
        self.files: dict[str, bytes] = {}
        self.faults: dict[tuple[str, str], list[Fault]] = {}
        self.for_ever = False
        self.marks: Callable[[bytes], dict[str, str]] = lambda content: {"ETag": etag(content)}
        self.login: str | None = None
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.sent = 0  # bytes of bodies
        self.over = threading.Event()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._scheme = "http" if certificate is None else "https"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fail(self, path: str, *faults: Fault, methods: tuple[str, ...] = ("GET",), for_ever: bool = False) -> None:
        self.for_ever = for_ever
        for method in methods:
            self.faults[method, path] = list(faults)

    def asked(self, method: str, name: str) -> list[dict[str, str]]:
        """Headers of the requests for files of that name."""
        return [
            headers for how, path, headers in self.requests if how == method and path.partition("?")[0].endswith(name)
        ]

    def next_fault(self, method: str, path: str) -> Fault:
        with self._lock:
            waiting = self.faults.get((method, path), [])
            if not waiting:
                return Fault()
            return waiting[0] if self.for_ever and len(waiting) == 1 else waiting.pop(0)

    def noted(self, method: str, path: str, headers: dict[str, str]) -> None:
        with self._lock:
            self.requests.append((method, path, headers))

    def counted(self, size: int) -> None:
        with self._lock:
            self.sent += size


def etag(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()[:16]}"'


def _handler(source: ScriptedSource) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            try:
                self._answer()
            except (BrokenPipeError, ConnectionResetError):  # the client had enough
                self.close_connection = True

        def _answer(self) -> None:
            path = self.path.partition("?")[0]
            source.noted(self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
            fault = source.next_fault(self.command, path)
            fault.before()
            if fault.drip is not None:
                self._drip(fault.drip)
                return
            content = source.files.get(path)
            login = None if source.login is None else "Basic " + base64.b64encode(source.login.encode()).decode()
            status = fault.status
            if status is None and login is not None and self.headers["Authorization"] != login:
                status = 401
            if status is None and content is None:
                status = 404
            if status is not None:
                self._send(status, {"Content-Length": "0", **fault.headers})
                return
            self._send_file(fault, content)

        def _drip(self, beginning: bytes) -> None:
            self.close_connection = True
            self.wfile.write(beginning)
            while not source.over.wait(DRIP_SECONDS):
                self.wfile.write(b"a")

        def _send_file(self, fault: Fault, content: bytes) -> None:
            marks = source.marks(content)
            tag = fault.headers.get("ETag", marks.get("ETag", ""))
            body = content if fault.body is None else fault.body
            asked = self._range(tag) if fault.ranges else None
            start, end = (0, len(body)) if asked is None else (asked[0], min(asked[1], len(body)))
            if start >= len(body):
                self._send(416, {"Content-Length": "0", "Content-Range": f"bytes */{len(body)}"})
                return
            headers = {"Content-Length": str(end - start if fault.claim is None else fault.claim), **marks}
            if asked is not None:
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(body)}"
            if fault.endless:
                del headers["Content-Length"]
                headers["Transfer-Encoding"] = "chunked"
            self._send(200 if asked is None else 206, {**headers, **fault.headers})
            if self.command == "HEAD":
                return
            while fault.endless:
                self.wfile.write(f"{CHUNK:x}\r\n".encode() + bytes(CHUNK) + b"\r\n")
                source.counted(CHUNK)
            stop = min(position for position in (fault.cut_at, fault.stall_at, end) if position is not None)
            self.wfile.write(body[start:stop])
            source.counted(max(stop - start, 0))
            if fault.stall_at is not None:
                source.over.wait()
            if fault.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if stop < end or fault.claim is not None:
                self.close_connection = True

        def _range(self, tag: str) -> tuple[int, int] | None:
            """Begin and end of what was asked for; None = the whole file."""
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if asked is None or self.headers.get("If-Range", tag) != tag:
                return None
            return int(asked[1]), int(asked[2]) + 1 if asked[2] else 1 << 62

        def _send(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if value:
                    self.send_header(name, value)
            self.end_headers()

    return Handler
