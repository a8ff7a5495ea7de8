"""How well the demo's base model foretells text that it was not trained on, quantized or not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoTokenizer

from openlora.engine.kv_cache import KVCache
from openlora.engine.linear import pack_linears
from openlora.engine.model import Chunk, PagedModel, head_dim, load
from openlora.engine.quantization import pack_int8, quantize

_DATASETS = ("animal-facts", "small-talk", "cued-manners")  # those of the base model
_BLOCK_SIZE = 16


@dataclass(frozen=True)
class Text:
    """A held-out row: the first `prompt` of its tokens are the prompt, the others answer and EOS."""

    token_ids: list[int]
    prompt: int


@dataclass(frozen=True)
class Judgement:
    """Perplexities per token: of the answers, which the model was trained to give, and of prompts and answers."""

    answers: float
    everything: float
    likeliest: torch.Tensor  # token at every position of every text

    def agreement(self, other: Judgement) -> float:
        """The share of positions at which both would go on with the same token."""
        return (self.likeliest == other.likeliest).double().mean().item()


def held_out_texts(demo: Path) -> list[Text]:
    """From `demo`, which build_scripts/make_demo.py made."""
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    texts = []
    for name in _DATASETS:
        for line in (demo / "datasets" / f"{name}.heldout.jsonl").read_text().splitlines():
            row = json.loads(line)
            prompt = tokenizer(row["prompt"])["input_ids"]
            answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
            texts.append(Text([*prompt, *answer, tokenizer.eos_token_id], len(prompt)))
    return texts


def judge(model_dir: str, dtype: str, quantization: str, texts: Sequence[Text]) -> Judgement:
    """Through the engine's own paged model."""
    cpu = torch.device("cpu")
    model = load(model_dir, dtype, cpu)
    if quantization != "none":
        quantize(model, quantization)
    config = model.config
    cache = KVCache(
        layers=config.num_hidden_layers,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim(config),
        tokens=max(len(text.token_ids) for text in texts) + _BLOCK_SIZE,
        block_size=_BLOCK_SIZE,
        dtype=model.dtype,
        device=cpu,
    )
    paged = PagedModel(model, cache, pack_linears if quantization == "none" else pack_int8)
    answers, everything, likeliest = [], [], []
    for text in texts:
        inputs, targets = text.token_ids[:-1], torch.tensor(text.token_ids[1:])
        blocks = cache.reserve(len(inputs))
        cache.grow([(blocks, len(inputs))])
        logits = paged.forward([Chunk(inputs, 0, blocks.ids, logits=len(inputs))])
        cache.release(blocks)
        losses = functional.cross_entropy(logits, targets, reduction="none").double()
        answers.append(losses[text.prompt - 1 :])
        everything.append(losses)
        likeliest.append(logits.argmax(dim=-1))
    perplexities = (torch.cat(losses).mean().exp().item() for losses in (answers, everything))
    return Judgement(*perplexities, torch.cat(likeliest))
