"""A Hugging Face causal language model as it is, run over the paged cache with adapters beside its linears."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..errors import InvalidArgument, UnsupportedModel
from .adaptable import make_adaptable
from .attention import IMPLEMENTATION, PagedStep, Span, register
from .decoder import NativeModel
from .decoder_plan import native_kernels
from .kv_cache import KVCache
from .linear import Pack, pack_linears
from .lora import NativeLora, WeightedAdapter, build_segments

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3")
"""Values of `model_type` that are supported: decoders with a standard cache and `nn.Linear` projections."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one sequence to compute in one forward."""

    token_ids: Sequence[int]
    start: int  # position of the first one
    blocks: Sequence[int]  # of the sequence, enough for all tokens up to the last one here
    adapters: tuple[WeightedAdapter, ...] = ()
    logits: int = 1  # of how many last tokens logits are wanted


def read_config(model_dir: str) -> PreTrainedConfig:
    """The configuration of a supported model.

    Raises:
        UnsupportedModel: naming the architecture, or the part of it that paged batches can't do.
    """
    if not Path(model_dir, "config.json").is_file():
        raise UnsupportedModel(f"{model_dir}: no config.json; a Hugging Face model directory is right")
    try:
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    except (ValueError, KeyError) as error:
        raise UnsupportedModel(f"{model_dir}: {error}") from error
    if config.model_type not in FAMILIES:
        raise UnsupportedModel(f"architecture {config.model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    if getattr(config, "quantization_config", None):
        raise UnsupportedModel("checkpoints that are already quantized are not supported; use the 16-bit checkpoint")
    if getattr(config, "use_bidirectional_attention", None):
        raise UnsupportedModel(f"{config.model_type} with bidirectional attention is not supported")
    return config


def longest_context(config: PreTrainedConfig) -> int:
    """The most tokens whose computation depends on nothing but the sequence itself.

    "dynamic" and "longrope" rotary embeddings change for the whole batch once any sequence in it passes the length
    of the original training, so they are used up to that length only.
    """
    limit = int(config.max_position_embeddings)
    parameters = config.rope_parameters or {}
    per_layer_type = [value for value in parameters.values() if isinstance(value, dict)]
    for rope in per_layer_type or [parameters]:
        if rope.get("rope_type") in ("dynamic", "longrope"):
            limit = min(limit, int(rope.get("original_max_position_embeddings") or limit))
    return limit


def eos_token_ids(model: PreTrainedModel) -> list[int]:
    """The tokens that end this model's texts, none if it names none."""
    found = model.generation_config.eos_token_id
    return [] if found is None else found if isinstance(found, list) else [found]


def head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def load(model_dir: str, dtype: str, device: torch.device) -> PreTrainedModel:
    """The model with transformers' own eager attention, in evaluation mode. `dtype` "auto" is the checkpoint's."""
    if dtype not in ("auto", *DTYPES):
        raise InvalidArgument(f"{dtype!r} is unknown; one of auto, {', '.join(DTYPES)} is right", field="dtype")
    config = read_config(model_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(
        model_dir, config=config, dtype=DTYPES.get(dtype, "auto"), attn_implementation="eager", local_files_only=True
    )
    return model.to(device).eval().requires_grad_(False)


class PagedModel:
    """A loaded model changed in place: paged attention, and every linear but the output layer adaptable."""

    def __init__(self, model: PreTrainedModel, cache: KVCache, pack: Pack = pack_linears) -> None:
        register()
        self.cache = cache
        self.device = cache.data.device
        kernels = native_kernels(model)
        self.linears, self.lora = make_adaptable(model, pack, kernels)
        self._native = None
        if isinstance(self.lora, NativeLora):
            self._native = NativeModel(model, kernels, cache, self.lora)
        model.set_attn_implementation(IMPLEMENTATION)
        self._model = model
        self._no_mask = torch.zeros(1, 1, 1, 1, device=self.device)  # of this shape, models take it for finished

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Compute all chunks as one flat batch and keep their keys and values.

        Returns:
            float32 logits `[rows, vocab]`: for each chunk, in the order given, its last `logits` tokens.
        """
        # Single tokens first, so that decoding rows are one slice; then by adapter, so that segments are few.
        order = sorted(
            range(len(chunks)),
            key=lambda index: (len(chunks[index].token_ids) > 1, [use.key for use in chunks[index].adapters]),
        )
        ordered = [chunks[index] for index in order]
        spans, row = [], 0
        for chunk in ordered:
            spans.append(Span(row, chunk.start, len(chunk.token_ids), chunk.blocks))
            row += len(chunk.token_ids)
        step = PagedStep(spans, self.cache)
        token_ids = torch.tensor([token for chunk in ordered for token in chunk.token_ids], device=self.device)
        ends = {index: span.row + span.tokens for index, span in zip(order, spans, strict=True)}
        wanted = [row for index, chunk in enumerate(chunks) for row in range(ends[index] - chunk.logits, ends[index])]
        rows = torch.tensor(wanted, dtype=torch.long, device=self.device)
        self.lora.begin(build_segments([(len(chunk.token_ids), chunk.adapters) for chunk in ordered]))
        try:
            if self._native is not None:
                return self._native.forward(token_ids, step, rows).float()
            output = self._model(
                input_ids=token_ids[None],
                position_ids=step.position_ids[None],
                attention_mask=self._no_mask,
                use_cache=False,
                logits_to_keep=rows,
                paged=step,
            )
            return output.logits[0].float()
        finally:
            self.lora.begin([])  # an evicted adapter must not live on here
