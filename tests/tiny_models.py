"""Tiny random models of every supported family, adapters for them, and an engine that collects its outputs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from engine_rig import InProcessRig
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from openlora.adapters.manifest import adapter_manifest
from openlora.engine.api import WEIGHT_ONE, AdapterUse, EngineOutput
from openlora.engine.torch_engine import TorchEngine
from openlora.errors import AdapterInvalid

# Models this small gain nothing from a second thread, and lose a lot to it where cores are shared.
torch.set_num_threads(1)

VOCAB = 128
WINDOW = 12  # shorter than the prompts, so that windows matter

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3")
MIXES = (
    (),
    (("all", 1.0),),
    (("some", 1.0),),
    (("patterns", 1.0),),
    (("all", -0.5),),
    (("all", 0.6), ("some", 0.4)),
    (("some", 1.25), ("all", -0.3), ("patterns", 0.000001)),
)


def config_of(family: str) -> PreTrainedConfig:
    """A configuration that uses what sets the family apart: windows, soft caps, query scaling, fused projections."""
    match family:
        case "llama":
            return LlamaConfig(**_SHAPE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
        case "qwen2":
            return Qwen2Config(
                **_SHAPE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1, layer_types=_LAYER_TYPES
            )
        case "qwen3":
            return Qwen3Config(**_SHAPE)
        case "mistral":
            return MistralConfig(**_SHAPE, sliding_window=WINDOW)
        case "gemma2":
            return Gemma2Config(
                **_SHAPE,
                sliding_window=WINDOW,
                layer_types=_LAYER_TYPES,
                query_pre_attn_scalar=24,
                attn_logit_softcapping=5.0,
                final_logit_softcapping=20.0,
                tie_word_embeddings=False,
            )
        case "gemma3_text":
            return Gemma3TextConfig(
                **_SHAPE,
                sliding_window=WINDOW,
                layer_types=_LAYER_TYPES,
                query_pre_attn_scalar=24,
                tie_word_embeddings=False,
            )
        case "phi3":
            return Phi3Config(**_SHAPE, sliding_window=WINDOW)
    raise AssertionError(f"no tiny {family}")


def make_model(directory: Path, family: str = "llama", **changes: Any) -> str:
    """Save a random fp32 model of the family; the same one every time."""
    config = config_of(family)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return str(directory)


def make_adapter(model_dir: str, directory: Path, seed: int, std: float = 0.3, **settings: Any) -> str:
    """Save a random adapter, by default one whose effect shows; `settings` are those of `LoraConfig`."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir))
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=std)
    adapted.save_pretrained(directory)
    return str(directory)


def make_mixed_adapters(model_dir: str, directory: Path, names: list[str]) -> dict[str, str]:
    """Those of `MIXES`, below `directory`: different ranks, rsLoRA, patterns, partial targets among the projections."""
    settings: dict[str, dict[str, Any]] = {
        "all": dict(r=4, lora_alpha=6, target_modules=names),
        "some": dict(r=9, lora_alpha=3, use_rslora=True, target_modules=[names[0], "down_proj"]),
        "patterns": dict(
            r=2,
            lora_alpha=4,
            target_modules=names,
            rank_pattern={"down_proj": 5, r"layers\.1\.self_attn\..*": 3},
            alpha_pattern={"o_proj": 1, "layers.2.mlp.down_proj": 9},
        ),
    }
    return {
        name: make_adapter(model_dir, directory / name, seed, **setting)
        for seed, (name, setting) in enumerate(settings.items(), start=1)
    }


def projections(family: str) -> list[str]:
    """All projections of a family by name."""
    if family == "phi3":
        return ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    return ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def digest_of(path: str) -> str:
    """What names the adapter in the directory `path`; of one that isn't whole, what nothing has."""
    try:
        return adapter_manifest(Path(path)).digest
    except AdapterInvalid:
        return hashlib.sha256(path.encode()).hexdigest()


def use(path: str, weight: float = 1.0) -> AdapterUse:
    return AdapterUse(digest_of(path), path, round(weight * WEIGHT_ONE))


def make_prompt(seed: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, VOCAB, (length,), generator=generator).tolist())


def save_word_tokenizer(directory: Path) -> None:
    """One word a token, so that any token ids can be asked for as text."""
    tokenizer = Tokenizer(models.WordLevel({f"t{token}": token for token in range(VOCAB)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))


class Engine(InProcessRig):
    """A running `TorchEngine`, for a `with` block.

    `gate`, when given, is called on the engine's thread after each step with that step's outputs: a test can hold the
    engine between two steps.
    """

    def __init__(self, model_dir: str, gate=None, **settings: Any) -> None:
        defaults = {"dtype": "float32", "device": "cpu", "max_model_len": 96, "kv_cache_tokens": 4096}
        super().__init__(TorchEngine(model_dir, "0" * 64, **{**defaults, **settings}))
        self._gate = gate

    def take(self, outputs: Sequence[EngineOutput]) -> None:
        super().take(outputs)
        if self._gate is not None:
            self._gate(outputs)

    def assert_nothing_held(self) -> None:
        """No row, block, reservation or pin is left once everything is answered."""
        scheduler = self.engine._scheduler
        assert (len(scheduler.running), len(scheduler.waiting)) == (0, 0)
        assert scheduler.cache.used_blocks == 0
        pool = scheduler.cache.pool
        assert pool.available == pool.total
        assert scheduler.residency.held == 0
        assert self.engine._live == {}
