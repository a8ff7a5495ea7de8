"""A live server over a small random model: seconds to start, and adapters whose effect shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from live_server import LiveServer
from make_shape import TARGETS, make_adapter, make_model
from transformers import LlamaConfig

ADDRESS = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"  # from EIP-55
CONFIG = LlamaConfig(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
    vocab_size=400,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


def card(tasks: Sequence[str]) -> dict[str, Any]:
    prices = {"version": 1, "input": 1, "output": 2}
    return {"schema": 1, "owner": ADDRESS, "licence": "MIT", "prices": prices, "tasks": list(tasks)}


def small_server(root: Path, adapters: Mapping[str, Sequence[str]], settings: dict[str, Any]) -> LiveServer:
    """Not started yet. `adapters` names them, with the tasks in their cards."""
    shapes = make_model(root / "model", CONFIG, torch.float32, seed=1)
    for seed, (name, tasks) in enumerate(adapters.items()):
        make_adapter(root / "adapters" / name, shapes, 8, TARGETS, torch.float32, seed)
        (root / "adapters" / name / "openlora.json").write_text(json.dumps(card(tasks)))
    engine = {"dtype": "float32", "threads": 1, "kv_cache_tokens": 4096}
    tree = {**settings, "engine": {**engine, **settings.get("engine", {})}}
    return LiveServer(root / "model", root / "adapters", root / "state", list(adapters), tree)
