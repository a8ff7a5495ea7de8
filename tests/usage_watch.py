"""A server's books seen from outside: the usage journal as it grows, the receipt log, and whether they agree."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

from load import Outcome

from openlora.attribution.journal import CompletionFrame, IntentFrame, JournalReader, ProgressFrame
from openlora.attribution.log import LoggedReceipt, ReceiptLog

POLL_SECONDS = 0.005


class UsageWatch:
    """Follows the journal of a state directory, over any number of restarts. Only durable frames are seen."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self.intents: dict[str, IntentFrame] = {}  # by request id, as are the others
        self.completions: dict[str, CompletionFrame] = {}
        self.progress: dict[str, list[ProgressFrame]] = {}
        self._reader = JournalReader(state_dir / "journal")

    def read(self) -> UsageWatch:
        """Take in what is new. AssertionError: a request begins or ends twice, or a number is left out."""
        for frame, _, _ in self._reader.read():
            if isinstance(frame, IntentFrame):
                assert frame.request_id not in self.intents, f"two intents of {frame.request_id}"
                self.intents[frame.request_id] = frame
            elif isinstance(frame, ProgressFrame):
                self.progress.setdefault(frame.request_id, []).append(frame)
            elif isinstance(frame, CompletionFrame):
                assert frame.request_id not in self.completions, f"two completions of {frame.request_id}"
                assert frame.seq == len(self.completions), f"completion {frame.seq} after {len(self.completions)}"
                self.completions[frame.request_id] = frame
        return self

    @property
    def unfinished(self) -> list[str]:
        return [request_id for request_id in self.intents if request_id not in self.completions]

    def by_label(self, label: str) -> str | None:
        """The request id behind a client's own id, once its intent is durable."""
        found = [request_id for request_id, intent in self.intents.items() if intent.label == label]
        assert len(found) <= 1, f"{len(found)} requests are called {label}"
        return found[0] if found else None

    async def begun(self, label: str, seconds: float = 20.0) -> str:
        """Wait until the request is in the journal; its id."""
        await self.until(lambda: self.by_label(label), seconds, f"the intent of {label}")
        return self.by_label(label)

    async def ended(self, request_id: str, seconds: float) -> CompletionFrame:
        """Wait until its completion is."""
        await self.until(lambda: request_id in self.completions, seconds, f"the completion of {request_id}")
        return self.completions[request_id]

    async def until(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, f"{what} did not come in {seconds:.1f} s"
            await asyncio.sleep(POLL_SECONDS)
            self.read()


def logged_receipts(state_dir: Path) -> dict[str, LoggedReceipt]:
    """The whole log by request id. AssertionError: a request has two, or a number is left out."""
    with closing(ReceiptLog.open(state_dir, read_only=True)) as log:
        receipts = log.list(0, 1_000_000)
    by_request = {one.receipt.request_id.hex(): one for one in receipts}
    assert len(by_request) == len(receipts), "a request has two receipts"
    assert [one.seq for one in receipts] == [one.receipt.seq for one in receipts] == list(range(len(receipts)))
    return by_request


async def settled_receipts(watch: UsageWatch, seconds: float = 10.0) -> dict[str, LoggedReceipt]:
    """The log once every intent has its receipt. AssertionError: one doesn't get it."""
    receipts: dict[str, LoggedReceipt] = {}

    def all_there() -> bool:
        if watch.read().unfinished:
            return False
        receipts.update(logged_receipts(watch.state_dir))
        return len(receipts) >= len(watch.intents)

    await watch.until(all_there, seconds, "a receipt for every intent")
    assert receipts.keys() == watch.intents.keys()
    for request_id, frame in watch.completions.items():
        receipt = receipts[request_id].receipt
        assert (receipt.seq, receipt.status, receipt.out_tokens) == (frame.seq, frame.status, frame.out_tokens)
    return receipts


def check_outcomes(outcomes: Iterable[Outcome], receipts: dict[str, LoggedReceipt]) -> None:
    """What clients saw is in the log: delivered receipts byte for byte, and never fewer tokens than arrived."""
    for outcome in outcomes:
        if outcome.delivered:
            logged = receipts[outcome.receipt["request_id"].removeprefix("0x")]
            assert outcome.receipt["leaf"] == "0x" + logged.leaf.hex()
            assert outcome.receipt["signature"] == "0x" + logged.signature.hex()
            assert logged.receipt.out_tokens == outcome.tokens, outcome
        elif outcome.request_id:
            assert receipts[outcome.request_id].receipt.out_tokens >= outcome.tokens, outcome
        else:
            assert outcome.tokens == 0, outcome


def verify_all(state_dir: Path) -> None:
    """`openlora receipts verify --all` against the log's public key, as its owner would."""
    command = [sys.executable, "-m", "openlora.cli", "receipts", "verify", "--all"]
    done = subprocess.run(
        [*command, "--state-dir", str(state_dir), "--log", str(state_dir / "log.pub")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
