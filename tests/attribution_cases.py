"""Requests and logs that the tests of journal, receipts and log share."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

from openlora.attribution.blobs import terms_blob
from openlora.attribution.card import Card, parse_card
from openlora.attribution.checkpointer import Checkpointer
from openlora.attribution.commitments import output_commitment, prompt_commitment
from openlora.attribution.journal import IntentFrame, Journal, JournalReader
from openlora.attribution.log import ReceiptLog
from openlora.attribution.projection import Projector

ALICE = "0x7E5F4552091A69125d5DfCb7b8C2659029395Bdf"
BOB = "0x2B5AD5c4795c026514f8317c7a215E218DcCD6cF"
BASE = "ba" * 32
FRENCH = "f1" * 32
LEGAL = "1e" * 32


def card(owner: str = ALICE, input_price: int = 1_000_000, output_price: int = 3_000_000) -> Card:
    datasets = [
        {
            "id": "corpus",
            "digest": "da" * 32,
            "licence": "CC-BY-4.0",
            "share_ppm": 1_000_000,
            "contributors": [
                {"name": "Alice", "address": ALICE, "share_ppm": 250_000},
                {"name": "Bob", "address": BOB, "share_ppm": 750_000},
            ],
        }
    ]
    prices = {"version": 1, "input": input_price, "output": output_price}
    return parse_card({"schema": 1, "owner": owner, "licence": "MIT", "prices": prices, "datasets": datasets})


def terms() -> dict[str, Any]:
    return terms_blob((BASE, card()), [(FRENCH, card(BOB, 500_000, 700_000)), (LEGAL, None)])


def request_id(number: int) -> str:
    return f"{number:064x}"


def salt(number: int) -> bytes:
    return bytes([number % 256]) * 32


def make_intent(number: int, prompt: str = "a prompt", **changes: Any) -> IntentFrame:
    fields: dict[str, Any] = {
        "request_id": request_id(number),
        "caller": "somebody",
        "label": "1",
        "base_digest": BASE,
        "runtime": {"engine": "torch", "version": "1", "dtype": "float32", "quantization": "none"},
        "adapters": {
            "adapters": [{"digest": FRENCH, "weight": 700_000}, {"digest": LEGAL, "weight": -300_000}],
            "method": "cat",
        },
        "terms": terms(),
        "prompt_salt": salt(number),
        "output_salt": salt(number + 1),
        "prompt_commit": prompt_commitment(salt(number), prompt),
        "in_tokens": 10 + number % 7,
        "started_at": 1_700_000_000 + number,
    }
    return IntentFrame(**(fields | changes))


def commit_of(number: int, text: str) -> bytes:
    """The output commitment of request `number` for a text."""
    return output_commitment(salt(number + 1), text).digest()


class Acknowledgements:
    """Collects a journal's callbacks; `wait` returns when a number of them has come."""

    def __init__(self) -> None:
        self.durable: list[Any] = []
        self.errors: list[BaseException] = []
        self._came = threading.Semaphore(0)

    def on_durable(self, *arguments: Any) -> None:
        self.durable.append(arguments[0] if arguments else None)
        self._came.release()

    def on_error(self, error: BaseException) -> None:
        self.errors.append(error)
        self._came.release()

    def wait(self, count: int = 1) -> None:
        for _ in range(count):
            if not self._came.acquire(timeout=60):
                raise TimeoutError("the journal did not answer")


def append_intent(journal: Journal, *numbers: int) -> None:
    """Journal intents and wait until they are durable."""
    acknowledged = Acknowledgements()
    journal.append([make_intent(number) for number in numbers], acknowledged.on_durable, acknowledged.on_error)
    acknowledged.wait()
    if acknowledged.errors:
        raise acknowledged.errors[0]


def append_completion(journal: Journal, number: int, status: int = 1, tokens: int = 5, text: str = "text") -> int:
    """Journal a completion, wait until it is durable, and return its number."""
    acknowledged = Acknowledgements()
    ended_at = 1_700_000_100 + number
    callbacks = (acknowledged.on_durable, acknowledged.on_error)
    journal.append_completion(request_id(number), status, tokens, commit_of(number, text), ended_at, *callbacks)
    acknowledged.wait()
    if acknowledged.errors:
        raise acknowledged.errors[0]
    return acknowledged.durable[0]


def python_environment(**changes: str) -> dict[str, str]:
    """An environment in which a child process imports what this one imports."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | changes


def read_frames(directory: Path, kind: type | tuple[type, ...]) -> list[Any]:
    return [entry.frame for entry in JournalReader(directory).read() if isinstance(entry.frame, kind)]


def serve_receipts(state: Path, *numbers: int, checkpointed: bool = True, **changes: Any) -> None:
    """What a server does with requests `numbers`: journal, receipts, and a checkpoint at the end."""
    acknowledged = Acknowledgements()
    callbacks = (acknowledged.on_durable, acknowledged.on_error)
    with Journal.open(state / "journal") as journal, ReceiptLog.open(state) as log:
        journal.append([make_intent(number, **changes) for number in numbers], *callbacks)
        for number in numbers:
            journal.append_completion(request_id(number), 1, 5, commit_of(number, "text"), 1_800_000_000, *callbacks)
        acknowledged.wait(len(numbers) + 1)
        if acknowledged.errors:
            raise acknowledged.errors[0]
        projector = Projector(state / "journal", log)
        while projector.project():
            pass
        if checkpointed:
            Checkpointer(log).sign_due(now=True)
