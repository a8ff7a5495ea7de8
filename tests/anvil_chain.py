"""A real chain for tests: anvil in a process of its own, the contracts on it, and a server between that fails."""

from __future__ import annotations

import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from chain import rpc
from live_server import free_ports
from waiting import wait_for
from web3 import HTTPProvider, Web3

from openlora.network.deploy import DeploymentPlan, deploy
from openlora.network.deployment import Deployment
from openlora.network.signer import devnet_account
from openlora.network.tools import find_tool

ADMIN, OWNER, SUBMITTER, OTHER, PUBLISHER, ATTESTOR, GUARDIAN = (devnet_account(index) for index in range(7))
EPOCH_CAP = 10**24


class Anvil:
    """One anvil. It mines each transaction at once until told otherwise."""

    def __init__(self, *options: str, port: int | None = None) -> None:
        self.port = port or free_ports(1)[0]
        self.url = f"http://127.0.0.1:{self.port}"
        self.web3 = Web3(HTTPProvider(self.url))
        command = [str(find_tool("anvil")), "--port", str(self.port), "--silent", "--slots-in-an-epoch", "1", *options]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        wait_for("answer of anvil", self._answers)

    def _answers(self) -> bool:
        assert self._process.poll() is None, f"anvil ended with status {self._process.poll()}"
        return self.web3.is_connected()

    def rpc(self, method: str, *values: Any) -> Any:
        return rpc(self.web3, method, *values)

    def hold(self) -> None:
        """No blocks any more but those of `mine`."""
        self.rpc("evm_setAutomine", False)

    def release(self) -> None:
        """Each transaction in a block of its own again; those that wait get into the next one now."""
        self.rpc("evm_setAutomine", True)
        self.mine()

    def mine(self, blocks: int = 1) -> None:
        self.rpc("anvil_mine", hex(blocks))

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def anvil(*options: str, port: int | None = None) -> Iterator[Anvil]:
    chain = Anvil(*options, port=port)
    try:
        yield chain
    finally:
        chain.stop()


def deploy_contracts(chain: Anvil, file: Path, confirmations: int = 0) -> Deployment:
    """The four contracts, and their deployment file."""
    plan = DeploymentPlan(
        notice_seconds=10,
        delay_seconds=1,
        epoch_cap=EPOCH_CAP,
        threshold=1,
        publishers=[PUBLISHER.address],
        attestors=[ATTESTOR.address],
        guardians=[GUARDIAN.address],
        confirmations=confirmations,
    )
    deployment = deploy(chain.web3, ADMIN, plan)
    deployment.save(file)
    return deployment


class FaultyRpc:
    """A JSON-RPC server that hands calls on, or fails: `mode` is pass, hang, 500 or garbage."""

    def __init__(self, upstream: str) -> None:
        self.upstream, self.mode = upstream, "pass"
        self.lose_answer_to: str | None = None  # a method whose call goes through and whose answer doesn't
        self._woken = threading.Event()
        faulty = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if faulty.mode == "hang":
                    faulty._woken.wait()
                    return
                status, answer = 200, b"<html>no JSON</html>"
                if faulty.mode == "500":
                    status = 500
                elif faulty.mode == "pass":
                    request = urllib.request.Request(faulty.upstream, body, {"Content-Type": "application/json"})
                    with urllib.request.urlopen(request, timeout=10) as reply:
                        answer = reply.read()
                    lost = faulty.lose_answer_to
                    if lost is not None and lost.encode() in body:
                        status, answer = 500, b""
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._woken.set()
        self._server.shutdown()
        self._server.server_close()
