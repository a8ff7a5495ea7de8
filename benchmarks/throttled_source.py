"""An HTTP server on loopback that serves a directory no faster than a network would: a process of its own.

    python benchmarks/throttled_source.py DIRECTORY --mb-per-s 100

It prints its port, and ends with its standard input.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import IO

PIECE = 64 << 10


class Throttled(SimpleHTTPRequestHandler):
    """Each answer by itself is sent at `bytes_per_second`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # as servers do: else a small file waits for the acknowledgement of its headers

    def __init__(self, *arguments: object, bytes_per_second: float, **more: object) -> None:
        self._bytes_per_second = bytes_per_second
        super().__init__(*arguments, **more)

    def end_headers(self) -> None:
        path = self.translate_path(self.path)
        if os.path.isfile(path):
            status = os.stat(path)
            self.send_header("ETag", f'"{status.st_size:x}-{status.st_mtime_ns:x}"')
        super().end_headers()

    def copyfile(self, source: IO[bytes], outputfile: IO[bytes]) -> None:
        began, sent = time.perf_counter(), 0
        while piece := source.read(PIECE):
            sent += len(piece)
            time.sleep(max(0.0, began + sent / self._bytes_per_second - time.perf_counter()))
            outputfile.write(piece)

    def log_message(self, *_: object) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--mb-per-s", type=float, default=100.0)
    options = parser.parse_args()
    handler = partial(Throttled, directory=options.directory, bytes_per_second=options.mb_per_s * 1e6)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
