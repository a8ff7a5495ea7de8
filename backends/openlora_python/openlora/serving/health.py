"""`/readyz` and `/livez` of the launcher: Triton's own readiness cannot be turned off by a model."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class HealthServer:
    """Serves on a thread of its own; `faults()` says what is not ready, part by part, empty when all is."""

    def __init__(self, host: str, port: int, faults: Callable[[], dict[str, str]]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # noqa: N802 - the library's name
                if self.path == "/livez":
                    self._answer(200, {"live": True})
                elif self.path == "/readyz":
                    found = faults()
                    self._answer(503 if found else 200, {"ready": not found, "faults": found})
                else:
                    self._answer(404, {"error": "only /readyz and /livez"})

            def _answer(self, status: int, body: dict[str, object]) -> None:
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
                """Probes every second are no news."""

        self._server = ThreadingHTTPServer((host, port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, name="health", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
