"""`openlora engines check`: what cannot work on the version and the GPU of a recipe, and what nobody has shown to.

Each rule is a function over a recipe; its comment names where the rule comes from. An error means: don't try. A warning
means: it may work, and here is what to look at. Paths are of NVIDIA/TensorRT-LLM, numbers its issues and pull requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from ..errors import InvalidArgument
from .catalogue import FUSED, GIB, MIXTURE, MLP, MODULES, QKV, gpu_named, version_named
from .planner import lora_cache, plan_memory, stages
from .recipe import Recipe


@dataclass(frozen=True)
class Finding:
    rule: str
    severity: Literal["error", "warning"]
    message: str


Rule = Callable[[Recipe], Iterator[Finding]]


def _error(rule: str, message: str) -> Finding:
    return Finding(rule, "error", message)


def _warning(rule: str, message: str) -> Finding:
    return Finding(rule, "warning", message)


def _gpu_has_the_numbers(recipe: Recipe) -> Iterator[Finding]:
    # docs/source/features/quantization.md, "Hardware Support Matrix": FP8 from Ada on, NVFP4 on Blackwell alone; the
    # FP8 KV cache everywhere from Ampere on. An NVFP4 KV cache is a Blackwell kernel too.
    gpu, precision = gpu_named(recipe.target.gpu), recipe.precision
    if precision.weights == "fp8" and gpu.compute < 89:
        yield _error(
            "fp8-needs-ada", f"{gpu.name} is {gpu.architecture}, which has no FP8: Ada, Hopper or Blackwell does"
        )
    if "nvfp4" in (precision.weights, precision.kv_cache) and gpu.architecture != "Blackwell":
        yield _error("nvfp4-needs-blackwell", f"{gpu.name} is {gpu.architecture}, which has no NVFP4: Blackwell does")


def _path_exists(recipe: Recipe) -> Iterator[Finding]:
    # #15763, #15767, #15907, #15918, #16369: removed on main in July 2026, released with 1.3.0; 1.2.x is not affected.
    version = version_named(recipe.target.tensorrt_llm)
    if recipe.target.path == "engine" and not version.engine_path:
        yield _error(
            "engine-path-removed",
            f"TensorRT-LLM {version.name} has no trtllm-build: path llm-api, or a version below 1.3",
        )
    if not version.containers:
        # triton-inference-server/server docs/introduction/compatibility.md, to 26.07
        yield _warning("no-container", f"no Triton container with TensorRT-LLM {version.name} is known: build one")


def _path_has_the_quantization(recipe: Recipe) -> Iterator[Finding]:
    # The PyTorch backend's list has no W8A16 (docs/source/features/quantization.md). FP4Linear of the engine path
    # asserts that there are no adapters (#12229, closed unmerged). examples/quantization/quantize.py writes int8 and
    # fp8 KV caches.
    precision, path = recipe.precision, recipe.target.path
    if precision.weights == "int8-weight-only" and path == "llm-api":
        yield _error("int8-needs-engine", "int8-weight-only is of the engine path alone: path engine, or fp8")
    if path == "engine" and precision.weights == "nvfp4":
        yield _error("nvfp4-adapters-on-engine", "the engine path refuses adapters beside NVFP4 weights: path llm-api")
    if path == "engine" and precision.kv_cache == "nvfp4":
        yield _error("nvfp4-kv-on-engine", "the engine path has no NVFP4 KV cache: fp8, or path llm-api")
    if path == "llm-api" and precision.kv_cache == "nvfp4" and precision.weights == "none":
        # docs/source/features/quantization.md, "NVFP4 KV Cache": offline quantization is required.
        yield _error(
            "nvfp4-kv-needs-checkpoint", "an NVFP4 KV cache needs a checkpoint of ModelOpt: weights fp8 or nvfp4"
        )
    if precision.weights == "nvfp4" and path == "llm-api":
        # The feature matrix has no row for it; #9808 skips quantized activations where there are adapters.
        yield _warning(
            "nvfp4-adapters", "adapters beside NVFP4 weights are in no support matrix: compare answers with bf16"
        )


def _parallelism_divides(recipe: Recipe) -> Iterator[Finding]:
    # tensorrt_llm/_torch/modules/attention.py: `assert self.num_heads % (tp_size * cp_size) == 0`; KV heads are
    # rounded up and copied (`_duplicate_kv`), which needs one number to divide the other. The MLP is split by features.
    shape, tensor = recipe.model.shape, recipe.parallel.tensor
    if shape.heads % tensor:
        yield _error("heads-divide", f"{shape.heads} heads can't be split over {tensor} GPUs")
    if shape.kv_heads % tensor and tensor % shape.kv_heads:
        yield _error(
            "kv-heads-divide", f"{shape.kv_heads} KV heads can be neither split over nor copied to {tensor} GPUs"
        )
    if shape.mlp % tensor:
        yield _error("mlp-divides", f"{shape.mlp} features of the MLP can't be split over {tensor} GPUs")
    elif recipe.precision.weights in ("fp8", "nvfp4") and shape.mlp // tensor % 16:
        # FP8 and FP4 GEMMs take multiples of 16 (native FP8 adapters name the same limit, #16810).
        yield _error("quantized-alignment", f"{shape.mlp // tensor} features a GPU are not a multiple of 16")
    if recipe.parallel.pipeline > shape.layers:
        yield _error("layers-divide", f"{shape.layers} layers are fewer than {recipe.parallel.pipeline} stages")


def _machines_are_enough(recipe: Recipe) -> Iterator[Finding]:
    target, world = recipe.target, recipe.parallel.world
    gpus = target.nodes * target.gpus_per_node
    if world > gpus:
        yield _error("gpus", f"{world} ranks on {target.nodes} × {target.gpus_per_node} GPUs: one GPU a rank is needed")
    elif target.nodes > 1 and world != gpus:
        # examples/llm-api/llm_mgmn_trtllm_serve.sh: as many MPI processes as ranks, the same number on each node.
        yield _error("whole-nodes", f"{world} ranks don't fill {target.nodes} nodes of {target.gpus_per_node} GPUs")
    if target.nodes > 1 and recipe.parallel.tensor > target.gpus_per_node:
        yield _warning(
            "tensor-across-nodes", "tensor parallelism crosses nodes: an all-reduce a layer over the network"
        )


def _modules_exist(recipe: Recipe) -> Iterator[Finding]:
    # tensorrt_llm/lora_helper.py (names) and LoraModule ids; no recipe's family has fused projections or experts.
    targets = recipe.lora.target_modules
    for name in targets:
        if name in FUSED:
            yield _error("fused-module", f"{name} is of models with fused projections, {recipe.model.family} has none")
        elif name in MIXTURE:
            yield _error("mixture-module", f"{name} is of mixtures of experts, {recipe.model.family} is dense")
        elif name not in MODULES:
            yield _error("unknown-module", f"{name!r} is no module, one of {', '.join(MODULES)} is right")
    if len(set(targets)) != len(targets):
        yield _error("repeated-module", f"a module is named twice in {', '.join(targets)}")
    attention = set(targets) & set(QKV)
    if attention and len(attention) < len(QKV):
        # get_missing_qkv_modules_from_lora_modules: all or none, the rest is filled with zeros
        missing = ", ".join(name for name in QKV if name not in targets)
        yield _warning(
            "qkv-together", f"{missing} will be added and filled with zeros: name it, its room is taken anyway"
        )


def _ranks_are_possible(recipe: Recipe) -> Iterator[Finding]:
    # A rank above the smallest dimension of a linear is no low rank. PeftCacheConfig.max_adapter_size is 64 and sizes
    # the cache's pages (peftCacheManager.cpp: min(maxAdapterSize, maxLoraRank)); a row of an adapter is never cut
    # (loraCache.cpp), so the largest one must fit a page.
    lora, shape = recipe.lora, recipe.model.shape
    smallest = min(shape.hidden, shape.kv_size)
    if lora.max_rank > smallest:
        yield _error("rank-too-high", f"rank {lora.max_rank} is above the smallest side of a linear, {smallest}")
    elif not all(lora_cache(recipe, stage, lora.device_adapters).largest_row_fits for stage in stages(recipe)):
        yield _error("rank-over-page", f"a module of rank {lora.max_rank} is larger than a page of the adapter cache")
    if lora.max_rank % 8:
        yield _warning("rank-alignment", f"rank {lora.max_rank} is not a multiple of 8: kernels lose their alignment")
    if lora.expected_rank > lora.max_rank:
        yield _error("expected-rank", f"the expected rank {lora.expected_rank} is above max_rank {lora.max_rank}")


def _adapter_numbers_fit(recipe: Recipe) -> Iterator[Finding]:
    # Adapters reach the device through the host cache (peftCacheManager.cpp), so it is never the smaller one.
    lora = recipe.lora
    if lora.host_adapters < lora.device_adapters:
        yield _error(
            "host-below-device",
            f"{lora.host_adapters} adapters in host memory are fewer than {lora.device_adapters} on the GPU",
        )
    if lora.adapters_per_life < lora.host_adapters:
        yield _error(
            "life-below-host",
            f"an engine's life of {lora.adapters_per_life} adapters never fills {lora.host_adapters} places",
        )
    version = version_named(recipe.target.tensorrt_llm)
    if version.leaks_adapters:
        # #12815, fixed in 1.3.0rc12
        copies = plan_memory(recipe).lora_copies / GIB
        yield _warning(
            "adapters-leak",
            f"{version.name} keeps a GPU copy of every distinct adapter: {lora.adapters_per_life} of rank"
            f" {lora.expected_rank} take {copies:.1f} GiB before the engine is replaced",
        )


def _adapters_with_parallelism(recipe: Recipe) -> Iterator[Finding]:
    shape, parallel = recipe.model.shape, recipe.parallel
    if parallel.tensor > shape.kv_heads and set(recipe.lora.target_modules) & {"attn_k", "attn_v"}:
        # Inferred, not run: the cache splits B by ranks (loraUtils.cpp), but a rank holds a copied head, not a part of
        # one; #2687 is that check failing on attn_k.
        yield _error(
            "adapters-on-copied-heads",
            f"{shape.kv_heads} KV heads are copied to {parallel.tensor} GPUs: adapters of them can't be split",
        )
    if parallel.pipeline > 1:
        # docs/source/features/feature-combination-matrix.md says yes for LoRA with pipeline parallelism; `_util.py`
        # counts all layers on every stage, and chunked prefill with a pipeline is untested there.
        yield _warning(
            "adapters-in-a-pipeline",
            f"each of {parallel.pipeline} stages reserves room for the adapters of all layers, not of its own",
        )
        if recipe.limits.chunked_prefill:
            yield _warning("chunked-prefill-in-a-pipeline", "chunked prefill with a pipeline is untested in the matrix")
    version = version_named(recipe.target.tensorrt_llm)
    fp8_llama = recipe.precision.weights == "fp8" and recipe.model.family == "llama"
    if fp8_llama and parallel.tensor > 1 and recipe.target.path == "llm-api":
        # #9808: fused all-reduce quantized the activations that adapters read
        if version.fp8_llama_tensor_parallel == "wrong":
            yield _error(
                "fp8-llama-tensor-parallel", f"{version.name} fails on adapters beside FP8 Llama at TP > 1 (#9808)"
            )
        elif version.fp8_llama_tensor_parallel == "unverified":
            yield _warning(
                "fp8-llama-tensor-parallel",
                f"whether {version.name} has the fix of adapters beside FP8 Llama at TP > 1 (#9808) is not known:"
                " compare answers with bf16",
            )


def _family_takes_adapters(recipe: Recipe) -> Iterator[Finding]:
    # #12785, 1.3.0rc12: GatedMLP of dense Qwen 3 was built without its layer index, which its adapters need.
    version = version_named(recipe.target.tensorrt_llm)
    hit = [name for name in recipe.lora.target_modules if name in MLP]
    if recipe.model.family == "qwen3" and recipe.target.path == "llm-api" and hit and not version.qwen3_mlp_adapters:
        yield _error(
            "qwen3-mlp-adapters", f"{version.name} can't apply {', '.join(hit)} to Qwen 3: attention alone, or 1.3"
        )


def _graphs_are_right(recipe: Recipe) -> Iterator[Finding]:
    # #5480: other answers with CUDA graphs; #8279 made them work. The engine path has no such option.
    version = version_named(recipe.target.tensorrt_llm)
    if not recipe.limits.cuda_graph:
        return
    if recipe.target.path == "engine":
        yield _error("graphs-on-engine", "cuda_graph is of the PyTorch path: leave it out")
    elif version.adapters_in_graphs == "wrong":
        yield _error(
            "graphs-with-adapters", f"{version.name} answers wrongly with adapters in CUDA graphs: cuda_graph false"
        )
    elif version.adapters_in_graphs == "unverified":
        yield _warning(
            "graphs-with-adapters",
            f"whether {version.name} has adapters in CUDA graphs (#8279) is not known: compare answers",
        )


def _lengths_are_possible(recipe: Recipe) -> Iterator[Finding]:
    # llm.py: a prompt above max_num_tokens is refused without chunked prefill.
    limits, model = recipe.limits, recipe.model
    if limits.max_seq_len > model.max_positions:
        yield _error(
            "positions", f"{limits.max_seq_len} tokens are more than the model's {model.max_positions} positions"
        )
    if not limits.chunked_prefill and limits.max_seq_len > limits.max_num_tokens:
        yield _error(
            "prompt-in-a-step",
            f"prompts to {limits.max_seq_len} tokens don't fit steps of {limits.max_num_tokens}: chunked_prefill",
        )
    if limits.kv_cache_tokens < limits.max_seq_len:
        yield _error("kv-below-request", f"{limits.kv_cache_tokens} tokens of KV cache can't hold one request whole")


def _memory_is_enough(recipe: Recipe) -> Iterator[Finding]:
    plan = plan_memory(recipe)
    if not plan.fits:
        yield _error(
            "memory",
            f"{plan.gpu} has {plan.capacity / GIB:.1f} GiB; {plan.used / GIB:.1f} without KV cache, which leaves"
            f" room for {plan.kv_tokens:,} tokens of the {plan.kv_tokens_needed:,} wanted",
        )


SHAPE_RULES: tuple[Rule, ...] = (_modules_exist, _parallelism_divides)
RULES: tuple[Rule, ...] = (
    _gpu_has_the_numbers,
    _path_exists,
    _path_has_the_quantization,
    _machines_are_enough,
    _adapters_with_parallelism,
    _family_takes_adapters,
    _graphs_are_right,
    _lengths_are_possible,
)
PLANNED_RULES: tuple[Rule, ...] = (_ranks_are_possible, _adapter_numbers_fit, _memory_is_enough)


def check_recipe(recipe: Recipe) -> list[Finding]:
    """What the rules say, errors first.

    Raises:
        InvalidArgument: GPU or version are not in the catalogue.
    """
    gpu_named(recipe.target.gpu)
    version_named(recipe.target.tensorrt_llm)
    findings = [finding for rule in SHAPE_RULES for finding in rule(recipe)]
    can_be_planned = all(finding.severity != "error" for finding in findings)
    for rule in (*RULES, *(PLANNED_RULES if can_be_planned else ())):
        findings += rule(recipe)
    return sorted(findings, key=lambda finding: finding.severity)


def refuse_broken(recipe: Recipe) -> list[Finding]:
    """The warnings.

    Raises:
        InvalidArgument: with the first error of `check_recipe`.
    """
    findings = check_recipe(recipe)
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        raise InvalidArgument(f"{recipe.name}: {errors[0].message} ({errors[0].rule})", field="recipe")
    return findings
