"""What a recipe gives to `openlora serve --config`, and to the Helm chart."""

from __future__ import annotations

from typing import Any

from .catalogue import GIB
from .layout import Layout
from .planner import plan_memory
from .recipe import Recipe

SYSTEM_PYTHON = "/usr/bin/python3"  # of the Triton container: the one that has TensorRT-LLM
# Host memory beside adapters: loading streams the checkpoint through pages that the kernel can drop.
HOST_BASE = 24 * GIB
HOST_PER_GPU = 8 * GIB
SHARED_MEMORY_PER_GPU_GIB = 2


def serve_settings(recipe: Recipe, layout: Layout) -> dict[str, Any]:
    """Settings of the server, for YAML."""
    precision, limits, lora = recipe.precision, recipe.limits, recipe.lora
    options: dict[str, Any] = {"backend": "tensorrt" if recipe.target.path == "engine" else "pytorch"}
    if recipe.target.path == "engine":
        options["engine_dir"] = str(layout.engine(recipe))
    options |= {
        "tensor_parallel_size": recipe.parallel.tensor,
        "pipeline_parallel_size": recipe.parallel.pipeline,
        "lora_target_modules": list(lora.target_modules),
        "host_adapters": lora.host_adapters,
        "max_adapter_ids": lora.adapters_per_life,
        "free_gpu_memory_fraction": limits.free_gpu_memory_fraction,
        # An engine's KV cache has the dtype that it was built with, and TensorRT-LLM takes no other word there.
        "kv_cache_dtype": "auto" if recipe.target.path == "engine" else precision.kv_cache,
        "enable_chunked_prefill": limits.chunked_prefill,
        "cuda_graph": limits.cuda_graph,
    }
    return {
        "model": str(layout.served(recipe)),
        "adapters": str(layout.adapters),
        "state_dir": str(layout.state),
        "host": "0.0.0.0",
        "engine": {
            "kind": "tensorrt_llm",
            "python": SYSTEM_PYTHON,
            "dtype": precision.dtype,
            "max_model_len": limits.max_seq_len,
            "max_batch": limits.max_batch_size,
            "max_step_tokens": limits.max_num_tokens,
            "max_adapters": lora.device_adapters,
            "max_rank": lora.max_rank,
            "tensorrt_llm": options,
        },
    }


def chart_values(recipe: Recipe) -> dict[str, Any]:
    """The recipe's entry of `engines` in the chart's values: what one pod, or each of a group, asks for."""
    gpus = min(recipe.parallel.world, recipe.target.gpus_per_node)
    host = HOST_BASE + gpus * HOST_PER_GPU + plan_memory(recipe).host_per_node
    return {
        "recipe": recipe.name,
        "version": recipe.target.tensorrt_llm,
        "gpus": gpus,
        "nodes": -(-recipe.parallel.world // recipe.target.gpus_per_node),
        "cpu": str(4 + 4 * gpus),
        "memory": f"{-(-host // GIB)}Gi",
        "sharedMemory": f"{SHARED_MEMORY_PER_GPU_GIB * gpus}Gi",
    }
