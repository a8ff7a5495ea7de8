"""The paged key and value cache: the memory of fixed-size blocks, and which of them a sequence has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .block_pool import BlockPool

NULL_BLOCK = 0
"""Pads block tables. It belongs to nobody and stays zero."""


@dataclass(eq=False)
class SequenceBlocks:
    """The blocks of one sequence, in token order; leading ones may be shared with others."""

    ids: list[int] = field(default_factory=list)


class KVCache:
    """Keys and values of all layers, `[layers, 2, blocks, block_size, kv_heads, head_dim]`, in one allocation.

    `pool` knows who holds which block. Memory that no sequence has reached yet is never touched.
    """

    def __init__(
        self,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        tokens: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        self.total_blocks = -(-tokens // block_size)
        shape = (layers, 2, self.total_blocks + 1, block_size, kv_heads, head_dim)
        self.data = torch.empty(shape, dtype=dtype, device=device)
        self.data[:, :, NULL_BLOCK] = 0
        self.layer_addresses = [(layer[0].data_ptr(), layer[1].data_ptr()) for layer in self.data]  # of keys, values
        self.pool = BlockPool(range(NULL_BLOCK + 1, self.total_blocks + 1))
        self._scratch = torch.empty(2, 0, dtype=dtype, device=device)

    @property
    def used_blocks(self) -> int:
        """Blocks that sequences hold now; idle ones of the prefix cache are not among them."""
        return self.pool.held

    @property
    def available_blocks(self) -> int:
        """Blocks that can be taken now."""
        return self.pool.available

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def reserve(self, tokens: int) -> SequenceBlocks | None:
        """Blocks for a sequence of `tokens` tokens, or None while others hold too much."""
        if self.blocks_for(tokens) > self.available_blocks:
            return None
        blocks = SequenceBlocks()
        self.grow([(blocks, tokens)])
        return blocks

    def grow(self, sequences: Sequence[tuple[SequenceBlocks, int]]) -> None:
        """Take blocks until each sequence has room for its number of tokens; the caller knows that there are enough.

        Taken blocks are zeroed: the tail of a last block is read under a mask, and a NaN left there by an earlier
        owner would pass through it (0 · NaN = NaN).
        """
        taken: list[int] = []
        for blocks, tokens in sequences:
            missing = self.blocks_for(tokens) - len(blocks.ids)
            if missing > 0:
                fresh = self.pool.take(missing)
                blocks.ids.extend(fresh)
                taken.extend(fresh)
        if taken:
            self.data[:, :, taken] = 0

    def make_writable(self, blocks: SequenceBlocks, index: int) -> None:
        """Copy on write: a sequence that must write into a shared or published block gets a copy of it for its own."""
        shared = blocks.ids[index]
        if not self.pool.writable(shared):
            (own,) = self.pool.take(1)
            self.data[:, :, own] = self.data[:, :, shared]
            blocks.ids[index] = own
            self.pool.release([shared])

    def release(self, blocks: SequenceBlocks) -> None:
        """Give everything back; what was published stays to be found until its memory is needed."""
        self.pool.release(blocks.ids)
        blocks.ids = []

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store `[tokens, kv_heads, head_dim]` at the flat positions `slots` (block · block_size + offset)."""
        self.data[layer, 0].flatten(0, 1).index_copy_(0, slots, keys)
        self.data[layer, 1].flatten(0, 1).index_copy_(0, slots, values)

    def gather(self, layer: int, block_table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of `block_table` `[sequences, blocks]`, each `[sequences, tokens, kv_heads, head_dim]`.

        The result lies in one scratch buffer that the next call overwrites: a fresh allocation of this size would
        be mapped and page-faulted anew in every layer of every step.
        """
        block_shape = self.data.shape[3:]
        size = block_table.numel() * block_shape.numel()
        if self._scratch.shape[1] < size:
            self._scratch = self._scratch.new_empty(2, size)
        index = block_table.flatten()
        shape = (block_table.shape[0], block_table.shape[1] * self.block_size, *block_shape[1:])
        gathered = []
        for part in range(2):
            out = self._scratch[part, :size].view(index.numel(), -1)
            torch.index_select(self.data[layer, part].flatten(1), 0, index, out=out)
            gathered.append(out.view(shape))
        return gathered[0], gathered[1]
