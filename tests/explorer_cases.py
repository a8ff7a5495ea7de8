"""State directories for the page to look at: receipts by the thousand through the real log, and adapters."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from attribution_cases import BASE, BOB, card, make_intent, python_environment

from openlora.adapters.catalog import Catalog
from openlora.adapters.catalog_rows import AdapterRecord, BaseFacts
from openlora.attribution.blobs import NO_PARAMETERS, TermsBlob, check_blobs, terms_blob
from openlora.attribution.card import Card, parse_card
from openlora.attribution.checkpointer import Checkpointer
from openlora.attribution.frames import CompletionFrame
from openlora.attribution.log import NewReceipt, ReceiptLog
from openlora.attribution.receipt import UnsignedReceipt, encode_leaf, receipt_from_frames, receipt_price
from openlora.config import BaseModelFacts, RunConfig, Settings

MARKUP = '<img src=x onerror="document.title=1"> & <b>set</b>'
START = 1_790_000_000
NAMES = ("pirate", "shout", "legal-french", "haiku", "sql", "emoji", "secret")
DIGESTS = {name: f"{number:02x}{name.encode().hex():0<62.62}" for number, name in enumerate(NAMES, 0xA1)}
_BATCH = 10_000


def adapter_card(name: str) -> Card:
    """The card of a test adapter; one declares a data set whose name is markup."""
    document = card(BOB, 500_000 + 1000 * len(name), 900_000).model_dump(by_alias=True, mode="json", exclude_none=True)
    document |= {"description": f"Answers in the manner of {name}", "base": BASE}
    if name == "haiku":
        document["description"] = document["datasets"][0]["id"] = MARKUP
    if name == "secret":
        document["access"] = {"policy": "allow-list", "callers": ["alice"]}
    return parse_card(document)


MIXES = ((), ("pirate",), ("shout",), ("pirate", "shout"), ("haiku",), ("legal-french", "sql", "emoji"), ("secret",))


@dataclass(frozen=True)
class Agreed:
    """What receipts go by: cards, and the parameters and the block of a registry if they can be settled."""

    base: Card = field(default_factory=card)
    adapters: Mapping[str, Card] = field(default_factory=lambda: {name: adapter_card(name) for name in NAMES})
    parameters: str = NO_PARAMETERS
    registry: bytes = b""  # RegistryReference.preimage


def make_log(state: Path, count: int, agreed: Agreed | None = None) -> ReceiptLog:
    """A log of `count` receipts under a released checkpoint; the caller closes it."""
    log = ReceiptLog.open(state, origin="demo.example/openlora")
    agreed = agreed or Agreed()
    kinds = [_template(log, agreed, mix, status) for mix in MIXES for status in (1, 1, 1, 1, 2, 3)]
    for first in range(0, count, _BATCH):
        batch = [_numbered(kinds[seq * 11 % len(kinds)], seq) for seq in range(first, min(first + _BATCH, count))]
        log.append(batch, log.low_water)
    Checkpointer(log).sign_due(now=True)
    return log


def _template(log: ReceiptLog, agreed: Agreed, mix: tuple[str, ...], status: int) -> tuple[UnsignedReceipt, TermsBlob]:
    """A receipt of a mix of adapters, whose number, tokens and times are to be replaced."""
    adapters = {
        "adapters": [{"digest": DIGESTS[name], "weight": 1_000_000 // len(mix)} for name in mix],
        "method": "cat",
    }
    models = [(DIGESTS[name], agreed.adapters[name]) for name in mix]
    terms = terms_blob((BASE, agreed.base), models, agreed.parameters)
    intent = make_intent(0, adapters=adapters, terms=terms, registry=agreed.registry)
    completion = CompletionFrame(intent.request_id, 0, status, 0, made_of("answer"), START)
    typed = check_blobs(BASE, intent.runtime, adapters, terms)
    return receipt_from_frames(intent, completion, log.key.log_id), typed


def _numbered(kind: tuple[UnsignedReceipt, TermsBlob], seq: int) -> NewReceipt:
    unsigned, terms = kind
    in_tokens, out_tokens = 7 + seq * 13 % 900, seq * 29 % 700
    receipt = dataclasses.replace(
        unsigned.receipt,
        seq=seq,
        request_id=made_of(f"request {seq}"),
        in_tokens=in_tokens,
        out_tokens=out_tokens,
        started_at=START + seq // 3,
        ended_at=START + seq // 3 + seq % 5,
        price=receipt_price(unsigned.receipt.status, terms, in_tokens, out_tokens),
    )
    salts = made_of(f"prompt salt {seq}"), made_of(f"output salt {seq}")
    return NewReceipt(receipt, encode_leaf(receipt), unsigned.blobs, *salts)


def made_of(text: str) -> bytes:
    """32 bytes that look like no others."""
    return hashlib.sha256(text.encode()).digest()


def make_catalog(state: Path) -> None:
    """The adapters of the mixes in the catalog, as while a server runs on the directory."""
    with Catalog(state / "catalog.sqlite") as catalog:
        catalog.set_base(BaseFacts("/model", BASE, 64))
        for name in NAMES:
            document = adapter_card(name).model_dump(by_alias=True, mode="json", exclude_none=True)
            catalog.put(AdapterRecord(name, 0, DIGESTS[name], 16, "ready", "", document, ("q_proj",), BASE))
    run_dir = state / "run"
    run_dir.mkdir(mode=0o700)
    RunConfig(
        settings=Settings(model=Path("/model"), state_dir=state),
        base=BaseModelFacts(
            name="demo", path=Path("/model"), digest=BASE, card=None, eos_token_ids=(1,), max_model_len=512
        ),
        state_dir=state,
        socket_dir=run_dir,
        shm_prefix="x",
        launcher_pid=1,
    ).save()


@contextmanager
def explorer(state: Path, *options: str) -> Iterator[str]:
    """`openlora explore` on a free port; its address."""
    command = [sys.executable, "-m", "openlora.cli", "explore", "--state-dir", str(state), "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=python_environment())
    try:
        line = process.stderr.readline()
        assert line.startswith("explorer at http://"), line + process.stderr.read()
        yield line.split()[-1]
    finally:
        process.terminate()
        process.wait(timeout=30)
        process.stderr.close()
