"""How large the cache is: what the settings say, or what the memory allows where they say nothing."""

from __future__ import annotations

import os

import torch
from transformers import PreTrainedConfig

from ..errors import InvalidArgument
from .kv_cache import KVCache
from .model import head_dim, longest_context
from .selfcheck import TOKENS

_CPU_CACHE_SHARE = 0.25  # of physical memory
_GPU_CACHE_SHARE = 0.8  # of what the weights leave free


def make_cache(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int | None,
    tokens: int | None,
    max_batch: int,
    block_size: int,
) -> KVCache:
    """The cache for the settings, or for the memory where they say nothing."""
    longest = longest_context(config)
    if max_model_len is not None and not TOKENS <= max_model_len <= longest:
        raise InvalidArgument(
            f"{max_model_len} is out of range, {TOKENS} to {longest} is right for this model", field="max_model_len"
        )
    smallest = 2 * -(-TOKENS // block_size) * block_size  # what the self-check takes
    if tokens is not None and tokens < max(max_model_len or 0, smallest):
        raise InvalidArgument(
            f"{tokens} is too small, at least {max(max_model_len or 0, smallest)} is right", field="kv_cache_tokens"
        )
    if tokens is None:
        size = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim(config) * dtype.itemsize
        wanted = max_batch * (max_model_len or longest)
        tokens = max(min(wanted, _memory_for_cache(device) // size), max_model_len or 0, smallest)
    return KVCache(
        layers=config.num_hidden_layers,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim(config),
        tokens=tokens,
        block_size=block_size,
        dtype=dtype,
        device=device,
    )


def _memory_for_cache(device: torch.device) -> int:
    """Bytes that the cache may take when nobody said."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * _GPU_CACHE_SHARE)
    return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _CPU_CACHE_SHARE)
