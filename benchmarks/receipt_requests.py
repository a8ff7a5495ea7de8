"""Requests as generation journals them: for many adapters, each with a card that names a data set and who is paid."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from openlora.attribution.blobs import adapters_blob, terms_blob
from openlora.attribution.card import parse_card
from openlora.attribution.journal import IntentFrame
from openlora.engine.api import WEIGHT_ONE, AdapterUse

OWNERS = ("0x7E5F4552091A69125d5DfCb7b8C2659029395Bdf", "0x2B5AD5c4795c026514f8317c7a215E218DcCD6cF")
BASE = "ba" * 32
TERMS = 200  # different adapters that are in use, each with its terms


class Requests:
    """Intents of requests for many adapters with cards, as generation makes them."""

    def __init__(self) -> None:
        self._blobs = [self._of_adapter(f"{number:064x}") for number in range(TERMS)]
        self._runtime = {"engine": "torch", "version": "1", "dtype": "bfloat16", "quantization": "none"}

    def intents(self, count: int) -> list[IntentFrame]:
        salts = np.random.default_rng(1).bytes(96 * count)
        return [self._intent(number, salts[96 * number : 96 * number + 96]) for number in range(count)]

    def _intent(self, number: int, random: bytes) -> IntentFrame:
        adapters, terms = self._blobs[number % TERMS]
        return IntentFrame(
            request_id=f"{number:064x}",
            caller="caller",
            label=f"{number}",
            base_digest=BASE,
            runtime=self._runtime,
            adapters=adapters,
            terms=terms,
            prompt_salt=random[:32],
            output_salt=random[32:64],
            prompt_commit=random[64:],
            in_tokens=100,
            started_at=int(time.time()),
        )

    def _of_adapter(self, digest: str) -> tuple[dict[str, Any], dict[str, Any]]:
        contributors = [
            {"name": f"{place}", "address": owner, "share_ppm": 500_000} for place, owner in enumerate(OWNERS)
        ]
        dataset = {"id": "corpus", "digest": "da" * 32, "licence": "MIT", "share_ppm": 1_000_000}
        card = parse_card(
            {
                "schema": 1,
                "owner": OWNERS[0],
                "licence": "MIT",
                "prices": {"version": 1, "input": 500_000, "output": 1_500_000},
                "datasets": [dataset | {"contributors": contributors}],
            }
        )
        return adapters_blob([AdapterUse(digest, "", WEIGHT_ONE)]), terms_blob((BASE, card), [(digest, card)])
