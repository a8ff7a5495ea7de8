"""TensorRT-LLM's adapter caches, in host and in GPU memory: how large they get, and how many adapters they hold.

The caches are cut into pages of slots. Their size follows from counts that are given at construction, with the largest
module's size for every module, so they are larger than the adapters in them; what they hold follows from the pages
that an adapter's rows fill. Both are exact copies of the arithmetic in
cpp/tensorrt_llm/batch_manager/peftCacheManager.cpp and cpp/tensorrt_llm/runtime/loraCache.cpp (main, 2026).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

OPTIMAL_RANK = 8  # PeftCacheConfig.optimal_adapter_size
PAGE_RANK = 64  # PeftCacheConfig.max_adapter_size: it sizes pages, and refuses no rank


def _ceil_div(number: int, by: int) -> int:
    return -(-number // by)


@dataclass(frozen=True)
class LoraCache:
    """`sizes`: of each module on one rank, input plus output features. `layers`: those that the rank holds.

    `counted_layers` and `counted_modules`: what num_{device,host}_module_layer is made of. The PyTorch path counts all
    layers of the model on every stage of a pipeline, and q, k and v when one of them is a target (`_util.py`).
    """

    sizes: tuple[int, ...]
    layers: int
    counted_layers: int
    counted_modules: int
    max_rank: int
    adapters: int  # max_loras, or max_cpu_loras
    bytes_per_value: int = 2  # adapters stay in the model's 16-bit dtype

    @property
    def slot(self) -> int:
        """`pageWidth`, in values: the smallest module at rank 1."""
        return min(self.sizes)

    @property
    def slots(self) -> int:
        """`max_rank × layers × modules × adapters` times the slots of the largest module at rank 1."""
        module_layers = self.max_rank * self.counted_layers * self.counted_modules * self.adapters
        return module_layers * _ceil_div(max(self.sizes), self.slot)

    @property
    def logged_bytes(self) -> int:
        """What TensorRT-LLM logs as `Using N bytes for LoRA … cache`, before it rounds up to pages."""
        return self.slots * self.slot * self.bytes_per_value

    @property
    def slots_per_page(self) -> int:
        """Room for one adapter of the optimal rank, or for one module of the largest, whichever is more."""
        optimal = min(OPTIMAL_RANK, self.max_rank)
        one_layer = sum(optimal * _ceil_div(size, self.slot) for size in self.sizes)
        largest = _ceil_div(min(PAGE_RANK, self.max_rank) * max(self.sizes), self.slot)
        return max(one_layer * self.layers, largest)

    @property
    def pages(self) -> int:
        return _ceil_div(self.slots, self.slots_per_page)

    @property
    def allocated_bytes(self) -> int:
        return self.pages * self.slots_per_page * self.slot * self.bytes_per_value

    @property
    def largest_row_fits(self) -> bool:
        """Whether the largest module of the largest rank fits one page: a row is never cut."""
        return _ceil_div(self.max_rank * max(self.sizes), self.slot) <= self.slots_per_page

    def pages_of(self, rank: int) -> int:
        """Pages that an adapter of this rank takes: its rows one after the other, none across two pages
        (`LoraCache::determineNumPages`)."""
        page = used = 0
        for _ in range(self.layers):
            for size in self.sizes:
                needed = _ceil_div(rank * size, self.slot)
                if used + needed > self.slots_per_page:
                    page, used = page + 1, 0
                used += needed
        return page + 1

    def fits(self, rank: int) -> int:
        """Adapters of this rank, on all modules, that are in the cache at a time."""
        return self.pages // self.pages_of(rank)


def counted_modules(target_modules: Sequence[str], qkv: Sequence[str]) -> int:
    """Target modules, and those of q, k and v that are added because one of them is there
    (`get_missing_qkv_modules_from_lora_modules`)."""
    targets = set(target_modules)
    return len(targets | set(qkv)) if targets & set(qkv) else len(targets)
