"""Several weighted adapters as one: `cat`. Σ wᵢ·sᵢ·Bᵢ·Aᵢ = [w₁s₁B₁ … wₙsₙBₙ] · [A₁; …; Aₙ], exact for any ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..api import WEIGHT_ONE
from .peft_files import CONFIG_FILE, PREFIX, WEIGHTS_FILE, PeftAdapter

Matrices = dict[str, tuple[np.ndarray, np.ndarray]]


def concatenate(members: Sequence[tuple[PeftAdapter, int]]) -> Matrices:
    """A and B of every module that any member changes; weights (1e-6 units) and scalings are folded into B.

    All modules get the largest rank that any needs, filled up with zeros: engines differ in how they scale an adapter
    whose ranks differ, and agree on one whose ranks do not.
    """
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for adapter, weight in members:
        for module, (a, b) in adapter.modules.items():
            factor = adapter.scalings[module] * weight / WEIGHT_ONE
            parts.setdefault(module, []).append((a, (b.astype(np.float64) * factor).astype(np.float32)))
    joined = {
        module: (np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs], axis=1))
        for module, pairs in parts.items()
    }
    rank = max(len(a) for a, _ in joined.values())
    return {
        module: (np.pad(a, ((0, rank - len(a)), (0, 0))), np.pad(b, ((0, 0), (0, rank - len(a)))))
        for module, (a, b) in joined.items()
    }


def write_adapter(matrices: Matrices, directory: Path) -> None:
    """A PEFT adapter directory of scaling 1, whole or not at all."""
    temporary = directory.with_name(f"{directory.name}.{os.getpid()}.part")
    temporary.mkdir(parents=True, exist_ok=True)
    rank = len(next(iter(matrices.values()))[0])
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({module.rpartition(".")[2] for module in matrices}),
    }
    (temporary / CONFIG_FILE).write_text(json.dumps(config))
    tensors = {
        f"{PREFIX}{module}.lora_{side}.weight": matrix
        for module, pair in matrices.items()
        for side, matrix in zip("AB", pair, strict=True)
    }
    _write_safetensors(tensors, temporary / WEIGHTS_FILE)
    os.replace(temporary, directory)


def _write_safetensors(tensors: dict[str, np.ndarray], file: Path) -> None:
    header, end = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + 4 * tensor.size]}
        end += 4 * tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            stream.write(np.ascontiguousarray(tensor, "<f4").tobytes())
