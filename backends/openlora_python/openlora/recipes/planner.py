"""What a recipe needs of each GPU and of the host, in bytes, before anything is loaded.

Weights, KV cache and adapter caches are arithmetic of the model's shape. Activations and the reserve are estimates:
what TensorRT-LLM needs beside the others is only known when it measures it at start. Nothing here was compared with a
GPU.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .catalogue import GIB, KV_BYTES, QKV, WEIGHT_BYTES, adapter_module, gpu_named, version_named
from .lora_cache import LoraCache, counted_modules
from .recipe import Recipe

TOKENS_PER_BLOCK = 32  # KvCacheConfig.tokens_per_block, and the default of trtllm-build
RANKS = (8, 16, 32, 64, 128)

# Ours, to be replaced by what a machine shows: CUDA context, cuBLAS and attention workspaces; NCCL and all-reduce
# buffers; captured graphs.
CONTEXT_RESERVE = 3 * GIB // 2
PARALLEL_RESERVE = GIB // 2
GRAPH_RESERVE = GIB


@dataclass(frozen=True)
class Stage:
    """One stage of a pipeline: layers are dealt evenly, the first stages take what is left over."""

    layers: int
    embedding: bool
    output: bool


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes; of the GPU that needs most. `adapters_by_rank`: how many of one rank are in GPU memory at a time."""

    gpu: str
    gpus: int
    capacity: int
    weights: int
    activations: int
    lora_device: int
    lora_copies: int
    reserve: int
    kv_bytes_per_token: int
    kv_pool: int
    kv_tokens: int
    kv_needed: int
    kv_tokens_needed: int
    adapter_bytes: int  # one of the expected rank, whole
    largest_adapter_bytes: int  # one of max_rank, whole
    adapters_by_rank: dict[int, int]
    host_adapters_by_rank: dict[int, int]
    lora_host_per_gpu: int
    host_per_node: int

    @property
    def used(self) -> int:
        """All but the KV cache."""
        return self.weights + self.activations + self.lora_device + self.lora_copies + self.reserve

    @property
    def needed(self) -> int:
        return self.used + self.kv_needed

    @property
    def fits(self) -> bool:
        return self.kv_tokens >= self.kv_tokens_needed

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "used": self.used, "needed": self.needed, "fits": self.fits}


def stages(recipe: Recipe) -> list[Stage]:
    whole, left_over = divmod(recipe.model.shape.layers, recipe.parallel.pipeline)
    last = recipe.parallel.pipeline - 1
    return [
        Stage(whole + (1 if number < left_over else 0), number == 0, number == last)
        for number in range(recipe.parallel.pipeline)
    ]


def stage_weights(recipe: Recipe, stage: Stage) -> int:
    """Bytes of weights on one GPU of a stage.

    layers · ((2·h·q + 2·h·k)/t + 3·h·m/t) · b + norms and biases in 16 bits, where q and k are query and KV features,
    m the MLP's and b the bytes of a weight. KV heads are copied where there are fewer than t (`_duplicate_kv`, weight
    mappers of the PyTorch backend; the engine path does the same). int8-weight-only keeps a scale per output channel;
    those of FP8 are two numbers a linear, and left out. Embedding and output layer stay in 16 bits (ModelOpt leaves
    lm_head alone) and are split by vocabulary (`use_parallel_embedding` in ModelOpt's export; `LMHead` and `Embedding`
    of the PyTorch backend).
    """
    shape, tensor = recipe.model.shape, recipe.parallel.tensor
    kv = max(shape.kv_heads // tensor, 1) * shape.head_dim
    query, mlp = shape.query_size // tensor, shape.mlp // tensor
    linear = 2 * shape.hidden * query + 2 * shape.hidden * kv + 3 * shape.hidden * mlp
    weights = recipe.precision.weights
    layer = linear * WEIGHT_BYTES[weights]
    if weights == "int8-weight-only":
        layer += 2 * (query + 2 * kv + shape.hidden + 2 * mlp + shape.hidden)
    norms = 2 * shape.hidden + (2 * shape.head_dim if shape.qk_norm else 0)
    bias = query + 2 * kv if shape.qkv_bias else 0
    layer += 2 * (norms + bias)
    table = 2 * -(-shape.vocabulary // tensor) * shape.hidden
    tables = int(stage.embedding) + int(stage.output)
    if shape.tied_embeddings and stage.embedding and stage.output:
        tables = 1
    return int(stage.layers * layer) + tables * table + (2 * shape.hidden if stage.output else 0)


def kv_bytes_per_token(recipe: Recipe, stage: Stage) -> int:
    """2 · layers · KV heads of this rank · head size · bytes of a value: keys and values of one token."""
    shape = recipe.model.shape
    heads = max(shape.kv_heads // recipe.parallel.tensor, 1)
    return int(2 * stage.layers * heads * shape.head_dim * KV_BYTES[recipe.precision.kv_cache])


def activation_bytes(recipe: Recipe) -> int:
    """An estimate of the peak inside one step: residual and normed rows, the widest pair of neighbours of a layer (q,
    k, v and the attention's output, or gate, up and their product), three low-rank rows of adapters; and the logits of
    a row a request, in 16 bits and as floats for sampling."""
    shape, tensor, limits = recipe.model.shape, recipe.parallel.tensor, recipe.limits
    attention = (2 * shape.query_size + 2 * shape.kv_size) // tensor
    widest = max(attention, 3 * shape.mlp // tensor)
    row = 2 * shape.hidden + widest + 3 * recipe.lora.max_rank
    return 2 * limits.max_num_tokens * row + 6 * limits.max_batch_size * shape.vocabulary


def lora_cache(recipe: Recipe, stage: Stage, adapters: int) -> LoraCache:
    shape, tensor = recipe.model.shape, recipe.parallel.tensor
    targets = recipe.lora.target_modules
    return LoraCache(
        sizes=tuple(adapter_module(name, shape).size_on_rank(tensor) for name in targets),
        layers=stage.layers,
        counted_layers=shape.layers,
        counted_modules=counted_modules(targets, QKV),
        max_rank=recipe.lora.max_rank,
        adapters=adapters,
    )


def adapter_bytes(recipe: Recipe, rank: int) -> int:
    """Of one whole adapter in 16 bits: Σ over modules of rank · (inputs + outputs), in every layer."""
    shape = recipe.model.shape
    modules = [adapter_module(name, shape) for name in recipe.lora.target_modules]
    return 2 * shape.layers * rank * sum(module.inputs + module.outputs for module in modules)


def plan_memory(recipe: Recipe) -> MemoryPlan:
    """Everything that the recipe needs, on the GPU and the version that it names.

    Raises:
        InvalidArgument: they are not in the catalogue.
    """
    gpu, version = gpu_named(recipe.target.gpu), version_named(recipe.target.tensorrt_llm)
    return max(
        (_plan_stage(recipe, stage, gpu.memory, version.leaks_adapters) for stage in stages(recipe)), key=_tightest
    )


def _tightest(plan: MemoryPlan) -> tuple[int, int]:
    return (-plan.kv_tokens, plan.used)


def _plan_stage(recipe: Recipe, stage: Stage, capacity: int, leaks: bool) -> MemoryPlan:
    limits, lora = recipe.limits, recipe.lora
    device, host = (lora_cache(recipe, stage, number) for number in (lora.device_adapters, lora.host_adapters))
    one_adapter = adapter_bytes(recipe, lora.expected_rank)
    per_token = kv_bytes_per_token(recipe, stage)
    reserve = CONTEXT_RESERVE + (PARALLEL_RESERVE if recipe.parallel.world > 1 else 0)
    reserve += GRAPH_RESERVE if limits.cuda_graph else 0
    used = {
        "weights": stage_weights(recipe, stage),
        "activations": activation_bytes(recipe),
        "lora_device": device.allocated_bytes,
        # Whole tensors on the GPU of the rank that read the adapter, for as long as the process lives.
        "lora_copies": lora.adapters_per_life * one_adapter if leaks else 0,
        "reserve": reserve,
    }
    pool = max(int((capacity - sum(used.values())) * limits.free_gpu_memory_fraction), 0)
    blocks_needed = -(-limits.kv_cache_tokens // TOKENS_PER_BLOCK)
    gpus_on_a_node = min(recipe.parallel.world, recipe.target.gpus_per_node)
    ranks = [rank for rank in RANKS if rank <= lora.max_rank]
    return MemoryPlan(
        gpu=recipe.target.gpu,
        gpus=recipe.parallel.world,
        capacity=capacity,
        **used,
        kv_bytes_per_token=per_token,
        kv_pool=pool,
        kv_tokens=pool // (per_token * TOKENS_PER_BLOCK) * TOKENS_PER_BLOCK,
        kv_needed=blocks_needed * TOKENS_PER_BLOCK * per_token,
        kv_tokens_needed=limits.kv_cache_tokens,
        adapter_bytes=one_adapter,
        largest_adapter_bytes=adapter_bytes(recipe, lora.max_rank),
        adapters_by_rank={rank: device.fits(rank) for rank in ranks},
        host_adapters_by_rank={rank: host.fits(rank) for rank in ranks},
        lora_host_per_gpu=host.allocated_bytes,
        # LoraManager keeps every adapter's tensors in host memory and never lets go of one.
        host_per_node=gpus_on_a_node * host.allocated_bytes + lora.adapters_per_life * one_adapter,
    )
