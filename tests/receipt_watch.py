"""What tests see of a server's receipt log and of Triton's own counters, while the server runs."""

from __future__ import annotations

import httpx
from live_server import LiveServer
from waiting import wait_for

from openlora.attribution.log import LoggedReceipt, ReceiptLog

COMPLETE, CANCELLED = 1, 2


def wait_for_receipt(server: LiveServer, request_id: str) -> LoggedReceipt:
    """The receipt of a request, by the server's id."""
    with ReceiptLog.open(server.state_dir, read_only=True) as log:
        return wait_for(f"receipt of {request_id}", lambda: log.get_by_request(request_id))


def log_size(server: LiveServer) -> int:
    with ReceiptLog.open(server.state_dir, read_only=True) as log:
        return log.size()


def wait_for_receipt_number(server: LiveServer, seq: int) -> LoggedReceipt:
    with ReceiptLog.open(server.state_dir, read_only=True) as log:
        return wait_for(f"receipt {seq}", lambda: log.get(seq))


def generations_taken(server: LiveServer) -> int:
    """Requests that the generation step has taken so far, by Triton's statistics."""
    answer = httpx.get(f"{server.http_url}/v2/models/generation/stats", timeout=10)
    answer.raise_for_status()
    return sum(model["execution_count"] for model in answer.json()["model_stats"])


def wait_for_generations(server: LiveServer, count: int) -> None:
    wait_for(f"{count} generations", lambda: True if generations_taken(server) >= count else None)
