"""What the access tests share: a run without a server, adapters of a catalog without bytes, and a clock to set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openlora.adapters.catalog import Catalog
from openlora.adapters.catalog_rows import AdapterRecord, BaseFacts
from openlora.attribution.log_key import LogKey
from openlora.config import BaseModelFacts, RunConfig, load_settings
from openlora.serving.seal import write_run_key

BASE = "ba" * 32
OWNER = "0x70997970C51812dc3A010C7d01b50e0d17dc79C8"
CARD = {"schema": 1, "owner": OWNER, "licence": "MIT", "prices": {"version": 1, "input": 1, "output": 2}}


@dataclass
class SetClock:
    """Seconds, as a test says."""

    now: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def make_run(root: Path, **access: Any) -> RunConfig:
    """A run over a state directory in `root`, with these access settings."""
    state = root / "state"
    (state / "run").mkdir(parents=True, exist_ok=True)
    settings = load_settings(model=root / "model", state_dir=state, **{"access": access})
    base = BaseModelFacts(name="m", path=root / "model", digest=BASE, card=None, eos_token_ids=(0,), max_model_len=512)
    run = RunConfig(
        settings=settings, base=base, state_dir=state, socket_dir=state / "run", shm_prefix="x", launcher_pid=1
    )
    write_run_key(run.run_key_path)
    return run


def write_log_key(run: RunConfig, nonce: bytes = bytes(32)) -> str:
    """What attribution publishes at its first start; the log id in hex."""
    key = LogKey("localhost/openlora", OWNER, b"\1" * 32, nonce)
    run.log_key_path.write_text(key.line + "\n")
    return key.log_id.hex()


def adapter(name: str, access: dict[str, Any] | None = None, **changes: Any) -> AdapterRecord:
    """A ready adapter whose card says `access`."""
    card = CARD if access is None else {**CARD, "access": access}
    fields = {"version": 1, "digest": name.encode().hex().ljust(64, "0"), "rank": 4, "status": "ready", "reason": ""}
    return AdapterRecord(name, **{**fields, "card": card, "base": BASE, "source": "test", **changes})


def fill_catalog(run: RunConfig, *records: AdapterRecord) -> None:
    with Catalog(run.catalog_path) as catalog:
        catalog.set_base(BaseFacts("model", BASE, 128))
        for record in records:
            catalog.put(record)
            (run.adapter_cache / record.digest).mkdir(parents=True, exist_ok=True)  # the resolver looks for it
