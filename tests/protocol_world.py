"""What the checks of engines work on: an engine, a small model and adapters for it.

`REFUSES` is what each engine says that it does not do.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from engine_rig import Rig
from safetensors.torch import load_file, save_file
from tiny_models import make_adapter, make_mixed_adapters, make_model, make_prompt, projections, use

from openlora.engine.api import AdapterUse

SLOTS, MAX_RANK, MAX_MODEL_LEN, MAX_BATCH = 8, 64, 96, 16
OPTIONS = {
    "dtype": "float32", "max_model_len": MAX_MODEL_LEN, "max_batch": MAX_BATCH, "max_adapters": SLOTS,
    "max_rank": MAX_RANK,
}  # fmt: skip
# What each engine says that it does not do; what it did instead of refusing would fail a check.
NONE_OF_TENSORRT_LLM = frozenset({"min_tokens", "bad_words", "priority"})
NOT_BEFORE_PENALTIES = NONE_OF_TENSORRT_LLM | {
    "repetition_penalty", "presence_penalty", "frequency_penalty", "min_p", "seed",
}  # fmt: skip
REFUSES = {
    "tensorrt_llm-1.1": NOT_BEFORE_PENALTIES,
    "tensorrt_llm-1.2": NOT_BEFORE_PENALTIES,
    "tensorrt_llm-1.3": NONE_OF_TENSORRT_LLM,
    "tensorrt_llm-1.2-built": NONE_OF_TENSORRT_LLM,
}
PROMPT = make_prompt(1, 20)


@dataclass
class Store:
    """A model and its adapters, on disk, for all engines of a session."""

    root: Path
    model_dir: str = ""
    adapters: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model_dir = make_model(self.root / "model", head_dim=32)  # the smallest that vLLM computes on a CPU
        self.adapters = make_mixed_adapters(self.model_dir, self.root, projections("llama"))

    def more(self, count: int) -> list[str]:
        """Small adapters of different ranks."""
        for seed in range(count):
            if not (self.root / f"more-{seed}").exists():
                targets = ["q_proj", "up_proj"]
                make_adapter(
                    self.model_dir, self.root / f"more-{seed}", 50 + seed, r=1 + seed % 8, target_modules=targets
                )
        return [str(self.root / f"more-{seed}") for seed in range(count)]


@dataclass
class World:
    rig: Rig
    store: Store
    scratch: Path  # an empty directory of this check's own
    refuses: frozenset[str] = frozenset()  # parameters that this engine says it does not do

    @property
    def one_adapter(self) -> bool:
        return self.rig.info.one_adapter

    def uses(self, mix) -> list[AdapterUse]:
        return [use(self.store.adapters[name], weight) for name, weight in mix]

    def copy(self, name: str, tensors: Callable[[dict[str, torch.Tensor]], object] | None = None, **config) -> str:
        """A changed copy of an adapter."""
        directory = self.scratch / f"copy-{len(list(self.scratch.iterdir()))}"
        shutil.copytree(self.store.adapters[name], directory)
        file = directory / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
        if tensors is not None:
            values = load_file(directory / "adapter_model.safetensors")
            tensors(values)
            save_file(values, directory / "adapter_model.safetensors")
        return str(directory)
