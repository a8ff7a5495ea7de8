"""Paged attention behind transformers' attention registry: one flat batch, decode rows together, prefill by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from .kernels import Kernels
from .kv_cache import NULL_BLOCK, KVCache

IMPLEMENTATION = "openlora_paged"
"""The name under which models select this attention (`config._attn_implementation`)."""

_SMALLEST_GROUP_BLOCKS = 8

SEQUENCE = np.dtype([("row", "i4"), ("start", "i4"), ("tokens", "i4")])
SHAPE = np.dtype(
    [(name, "i8") for name in ("heads", "kv_heads", "head_dim", "block_size", "query_token", "query_head", "key_token",
                               "key_head", "value_token", "value_head", "table_width", "window")]
    + [("scaling", "f4"), ("softcap", "f4")]
)  # fmt: skip
"""`Sequence` and `Shape` of kernels/attention.cpp."""


@dataclass(frozen=True)
class Span:
    """Where the consecutive tokens of one sequence lie: in the flat batch, in the sequence, in the cache."""

    row: int  # of its first token in the flat batch
    start: int  # position of its first token in the sequence
    tokens: int
    blocks: Sequence[int]  # of the sequence, enough for start + tokens


@dataclass(frozen=True)
class Group:
    """Sequences with the same number of new tokens, attended to in one call."""

    rows: torch.Tensor | slice  # of the flat batch, sequence by sequence
    tokens: int  # new tokens of each sequence
    block_table: torch.Tensor  # [sequences, blocks], padded with the null block
    positions: torch.Tensor  # [sequences, tokens] of the new tokens
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, block_size: int, window: int | None) -> torch.Tensor:
        """True where a token may look, `[sequences, 1, tokens, keys]`; made once a step for all layers."""
        if window not in self.masks:
            keys = torch.arange(self.block_table.shape[1] * block_size, device=self.positions.device)
            query = self.positions[:, None, :, None]  # [sequences, 1, tokens, 1]
            allowed = keys <= query
            if window is not None:
                allowed &= keys > query - window
            self.masks[window] = allowed
        return self.masks[window]


class PagedStep:
    """What all layers of one forward share: where tokens go in the cache and who attends to what.

    With native kernels all rows are one call a layer, which reads keys and values where they lie: a fourth of the time
    of torch's flash attention over gathered ones at 512 tokens. Without, `groups` go through torch.
    """

    def __init__(self, spans: Sequence[Span], cache: KVCache, kernels: Kernels | None) -> None:
        self.cache = cache
        self.kernels = kernels
        self._shapes: dict[tuple[int, tuple[int, ...]], np.ndarray] = {}
        device, block_size = cache.data.device, cache.block_size
        tokens = np.array([span.tokens for span in spans])
        starts = np.array([span.start for span in spans])
        counts = -((starts + tokens) // -block_size)
        self._tables = np.full((len(spans), counts.max()), NULL_BLOCK, np.int32)
        for table, span, count in zip(self._tables, spans, counts, strict=True):
            table[:count] = span.blocks[:count]
        owner = np.repeat(np.arange(len(spans)), tokens)  # [tokens], the span of each
        rows = np.concatenate([[0], tokens.cumsum()[:-1]])
        positions = np.arange(len(owner)) - rows[owner] + starts[owner]
        self.position_ids = torch.from_numpy(positions).to(device)  # [tokens]
        if kernels is not None:
            self.sequences = np.zeros(len(spans), SEQUENCE)
            self.sequences["row"], self.sequences["start"], self.sequences["tokens"] = rows, starts, tokens
            self.groups: list[Group] = []
        else:
            self.groups = [self._group(members) for members in _partition(spans, cache)]
            blocks = self._tables[owner, positions // block_size].astype(np.int64)
            self.slots = torch.from_numpy(blocks * block_size + positions % block_size).to(device)  # [tokens]

    def _group(self, spans: list[Span]) -> Group:
        device, block_size = self.cache.data.device, self.cache.block_size
        counts = [-(-(span.start + span.tokens) // block_size) for span in spans]
        table = np.full((len(spans), max(counts)), NULL_BLOCK)
        for line, span, count in zip(table, spans, counts, strict=True):
            line[:count] = span.blocks[:count]
        rows = np.concatenate([np.arange(span.row, span.row + span.tokens) for span in spans])
        first, last = int(rows[0]), int(rows[-1])
        contiguous = last - first + 1 == len(rows)
        index = slice(first, last + 1) if contiguous else torch.from_numpy(rows).to(device)
        starts = torch.tensor([span.start for span in spans], device=device)
        positions = starts[:, None] + torch.arange(spans[0].tokens, device=device)
        return Group(index, spans[0].tokens, torch.from_numpy(table).to(device), positions)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,  # [tokens, heads, head_dim]
        key: torch.Tensor,  # [tokens, kv_heads, head_dim]
        value: torch.Tensor,  # [tokens, kv_heads, head_dim]
        output: torch.Tensor,  # [tokens, heads, head_dim], dense
        *,
        scaling: float,
        window: int,  # 0 = none
        softcap: float,  # 0 = none
    ) -> None:
        """Store the keys and values of the step, and attend to them and those before: kernels/attention.cpp."""
        shape = self._shape(query, key, value, window)
        shape["scaling"], shape["softcap"] = scaling, softcap
        keys, values = self.cache.layer_addresses[layer]
        self.kernels.paged_attention(
            query.data_ptr(), key.data_ptr(), value.data_ptr(), keys, values, output.data_ptr(),
            shape.ctypes.data, self.sequences.ctypes.data, len(self.sequences), self._tables.ctypes.data,
            self.kernels.threads,
        )  # fmt: skip

    def _shape(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int) -> np.ndarray:
        """Sizes and strides for the kernel: the same in most layers of a step."""
        strides = (*query.stride()[:2], *key.stride()[:2], *value.stride()[:2])
        known = self._shapes.get((window, strides))
        if known is None:
            sizes = (query.shape[1], key.shape[1], query.shape[2], self.cache.block_size)
            known = np.array((*sizes, *strides, self._tables.shape[1], window, 0.0, 0.0), SHAPE)
            self._shapes[window, strides] = known
        return known


def _partition(spans: Sequence[Span], cache: KVCache) -> list[list[Span]]:
    """Decode rows in groups whose context lengths differ by at most a factor of two; each prefill chunk alone."""
    decodes: dict[int, list[Span]] = {}
    prefills: list[list[Span]] = []
    for span in spans:
        if span.tokens > 1:
            prefills.append([span])
        else:
            size = max(_SMALLEST_GROUP_BLOCKS, cache.blocks_for(span.start + 1))
            decodes.setdefault((size - 1).bit_length(), []).append(span)
    return [*decodes.values(), *prefills]


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, heads, tokens, head_dim]
    key: torch.Tensor,  # [1, kv_heads, tokens, head_dim]
    value: torch.Tensor,  # [1, kv_heads, tokens, head_dim]
    attention_mask: torch.Tensor | None,
    *,
    paged: PagedStep,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface over the paged cache; returns `[1, tokens, heads, head_dim]`.

    Window, soft cap and scaling are what the model passes. `attention_mask` is unused: masks come from `paged`.
    """
    cache, layer = paged.cache, int(module.layer_idx)
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))  # [tokens, heads, head_dim]
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if paged.kernels is None:
        cache.write(layer, paged.slots, key, value)
    else:
        window, cap = sliding_window or 0, softcap or 0.0
        paged.attend(layer, query, key, value, output, scaling=scaling, window=window, softcap=cap)
    for group in paged.groups:
        keys, values = cache.gather(layer, group.block_table)  # [sequences, keys, kv_heads, head_dim]
        attended = _attend(
            query[group.rows].unflatten(0, (-1, group.tokens)).transpose(1, 2),  # [sequences, heads, tokens, head_dim]
            keys.transpose(1, 2),
            values.transpose(1, 2),
            group.mask(cache.block_size, sliding_window),
            scaling,
            softcap,
        )
        output[group.rows] = attended.transpose(1, 2).flatten(0, 1)
    return output.unsqueeze(0), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """softmax(cap(q·kᵀ·scaling) + mask)·v, cap(x) = softcap·tanh(x/softcap); `[sequences, heads, tokens, head_dim]`."""
    if softcap is None:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True
        )
    query = query.unflatten(1, (key.shape[1], -1))  # [sequences, kv_heads, group, tokens, head_dim]
    scores = query @ key.unsqueeze(2).transpose(-1, -2) * scaling
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask.unsqueeze(1), float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value.unsqueeze(2)).flatten(1, 2)


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    """Models ask the registry for a mask; `PagedStep` has its own."""


def register() -> None:
    """Enter the attention and its (absent) mask in transformers' registries; harmless when repeated."""
    AttentionInterface.register(IMPLEMENTATION, paged_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
