"""The check at start: the paged path must give the logits that transformers gives, or the engine does not start."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..errors import UnsupportedModel
from .model import Chunk, PagedModel

TOKENS = 16

# Largest difference allowed, relative to max|logit|: rounding only.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

# Of quantized models, |difference| relative to |logits|, of all as one vector: where activations become integers, what
# is rounded otherwise in one layer is rounded otherwise in all that follow. A wrong computation is at about 1.
_QUANTIZED_TOLERANCE = {"int8": 0.25, "int8-weight-only": 0.1}


def probe_tokens(vocab_size: int) -> list[int]:
    """16 token ids spread over the vocabulary."""
    return [(1 + 7919 * index) % vocab_size for index in range(TOKENS)]


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """What the unchanged model gives for every position, float32 `[tokens, vocab]`."""
    input_ids = torch.tensor([token_ids], device=model.device)
    return model(input_ids=input_ids, use_cache=False).logits[0].float()


def check(model: PagedModel, token_ids: list[int], expected: torch.Tensor, quantization: str = "none") -> None:
    """Compute the tokens twice side by side, each in two chunks: halves, and all but one then one (a decode step).

    What is expected of a quantized model comes from transformers over torchao's own linears.

    Raises:
        UnsupportedModel: with the largest difference and the limit.
    """
    tokens = len(token_ids)
    splits = (tokens // 2, tokens - 1)
    sequences = [model.cache.reserve(tokens) for _ in splits]
    if any(blocks is None for blocks in sequences):
        raise UnsupportedModel(f"the KV cache is too small for the self-check: {2 * tokens} tokens are needed")
    model.cache.grow([(blocks, tokens) for blocks in sequences])
    heads = model.forward(
        [Chunk(token_ids[:split], 0, blocks.ids, logits=split) for split, blocks in zip(splits, sequences, strict=True)]
    )
    tails = model.forward(
        [
            Chunk(token_ids[split:], split, blocks.ids, logits=tokens - split)
            for split, blocks in zip(splits, sequences, strict=True)
        ]
    )
    for blocks in sequences:
        model.cache.release(blocks)
    found = torch.cat([heads, tails])
    wanted = torch.cat([expected[:split] for split in splits] + [expected[split:] for split in splits])
    if quantization == "none":
        difference = (found - wanted).abs().max().item()
        limit = _TOLERANCE[model.cache.data.dtype] * wanted.abs().max().item()
    else:
        difference = (found - wanted).norm().item()
        limit = _QUANTIZED_TOLERANCE[quantization] * wanted.norm().item()
    if not difference <= limit:  # also when it is NaN
        raise UnsupportedModel(
            f"self-check failed: logits on {tokens} tokens differ from transformers by {difference:.3g}, "
            f"at most {limit:.3g} is right"
        )
