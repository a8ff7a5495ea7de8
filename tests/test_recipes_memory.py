"""The memory planner against numbers that were worked out by hand from the models' published sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_cases import RECIPES, ROOT, changed

from openlora.errors import InvalidArgument
from openlora.recipes.catalogue import GIB
from openlora.recipes.lora_cache import LoraCache
from openlora.recipes.planner import lora_cache, plan_memory, stages
from openlora.recipes.recipe import load_recipe

PUBLISHED = {
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
}

# Weights of one GPU, KV cache of one token on it, one adapter of rank 16, adapter cache in GPU memory. By hand:
# - 16 bit: published parameters · 2 / GPUs.
# - FP8: linears of the layers in one byte, embedding and output layer in two. Llama 8B: 32 · (2 · 4096² +
#   2 · 4096 · 1024 + 3 · 4096 · 14336) = 6,979,321,856, and 4 · 128256 · 4096 = 2,101,346,304. Others alike.
# - NVFP4: 9/16 of a byte. INT8: as FP8.
# - KV: 2 · layers · KV heads of the GPU · 128 · bytes.
# - Adapter: 2 · layers · 16 · Σ (in + out): Llama 8B 81,920; Qwen 2.5 7B 28 · (7168 · 2 + 4096 · 2 + 22528 · 3); …
# - Cache: rank · layers · modules · adapters · ⌈largest / smallest⌉ · smallest · 2, in + out of one GPU's part.
HAND = {
    "llama-3.1-8b-bf16-h100": (16_060_522_496, 131_072, 83_886_080, 64 * 32 * 7 * 8 * 4 * 5120 * 2),
    "llama-3.1-8b-fp8-h100": (9_080_668_160, 65_536, 83_886_080, 64 * 32 * 7 * 16 * 4 * 5120 * 2),
    "llama-3.1-8b-fp8-l40s": (9_080_668_160, 65_536, 83_886_080, 64 * 32 * 7 * 8 * 4 * 5120 * 2),
    "llama-3.1-8b-fp8-h100-engine": (9_080_668_160, 65_536, 83_886_080, 64 * 32 * 7 * 16 * 4 * 5120 * 2),
    "llama-3.1-8b-int8-a100-engine": (9_080_668_160, 131_072, 83_886_080, 64 * 32 * 7 * 8 * 4 * 5120 * 2),
    "llama-3.1-8b-nvfp4-b200": (6_027_214_848, 65_536, 83_886_080, 64 * 32 * 7 * 32 * 4 * 5120 * 2),
    "mistral-7b-v0.3-bf16-a100": (14_496_047_104, 131_072, 83_886_080, 64 * 32 * 7 * 8 * 4 * 5120 * 2),
    "mistral-7b-v0.3-fp8-h100": (7_516_192_768, 65_536, 83_886_080, 64 * 32 * 7 * 16 * 4 * 5120 * 2),
    "qwen2.5-7b-fp8-h100": (8_705_277_952, 28_672, 80_740_352, 64 * 28 * 7 * 16 * 6 * 4096 * 2),
    "qwen3-8b-fp8-h100": (9_435_086_848, 73_728, 30_670_848, 64 * 36 * 4 * 16 * 2 * 5120 * 2),
    "llama-3.3-70b-fp8-tp4-h100": (18_163_433_472, 40_960, 414_187_520, 64 * 80 * 7 * 8 * 2 * 8448 * 2),
    "llama-3.3-70b-bf16-tp8-h100": (17_638_426_624, 40_960, 414_187_520, 64 * 80 * 7 * 8 * 2 * 8320 * 2),
    "llama-3.3-70b-bf16-tp8-pp2-h100": (8_819_213_312, 20_480, 414_187_520, 64 * 80 * 7 * 8 * 2 * 8320 * 2),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_shape_gives_the_published_count(name: str) -> None:
    model = RECIPES[name].model
    assert model.shape.parameters == PUBLISHED[model.id] == model.parameters


def test_a_shape_that_gives_another_count_is_refused(tmp_path: Path) -> None:
    told = (ROOT / "engines" / "qwen3-8b-fp8-h100.yaml").read_text()
    file = tmp_path / "qwen3-8b-fp8-h100.yaml"
    file.write_text(told.replace("qk_norm: true", "qk_norm: false"))
    with pytest.raises(InvalidArgument, match="has 8,190,726,144 parameters, 8,190,735,360 are stated"):
        load_recipe(file)


def test_every_recipe_has_numbers_by_hand() -> None:
    assert HAND.keys() == RECIPES.keys()


@pytest.mark.parametrize("name", HAND)
def test_the_planner_agrees_with_the_hand_within_5_percent(name: str) -> None:
    plan = plan_memory(RECIPES[name])
    weights, kv, adapter, cache = HAND[name]
    assert plan.weights == pytest.approx(weights, rel=0.05)
    assert plan.kv_bytes_per_token == kv
    assert plan.adapter_bytes == adapter
    assert plan.lora_device == pytest.approx(cache, rel=0.05)


@pytest.mark.parametrize("name", RECIPES)
def test_parts_add_up_to_the_memory_that_there_is(name: str) -> None:
    recipe, plan = RECIPES[name], plan_memory(RECIPES[name])
    assert plan.used == plan.weights + plan.activations + plan.lora_device + plan.lora_copies + plan.reserve
    assert plan.kv_pool == pytest.approx((plan.capacity - plan.used) * recipe.limits.free_gpu_memory_fraction, abs=1)
    assert plan.kv_tokens * plan.kv_bytes_per_token <= plan.kv_pool
    assert plan.kv_tokens % 32 == 0
    assert plan.fits and plan.used + plan.kv_needed <= plan.capacity


@pytest.mark.parametrize("name", RECIPES)
def test_a_cache_holds_what_the_recipe_promises(name: str) -> None:
    recipe, plan = RECIPES[name], plan_memory(RECIPES[name])
    assert plan.adapters_by_rank[recipe.lora.max_rank] >= recipe.lora.device_adapters
    assert plan.host_adapters_by_rank[recipe.lora.max_rank] >= recipe.lora.host_adapters


def test_the_cache_formula_gives_what_tensorrt_llm_logged() -> None:
    """TensorRT-LLM issue #4696 (0.20.0rc3, Qwen 3 of 64 layers): `Using 9061466112 bytes for LoRA host
    cache`, the same for the device. That version took all 18 modules, and 2 adapters of rank 64; factors are ours."""
    cache = LoraCache((5121, 30_720), layers=64, counted_layers=64, counted_modules=18, max_rank=64, adapters=2)
    assert cache.logged_bytes == 9_061_466_112


def test_an_adapter_fills_whole_pages() -> None:
    cache = LoraCache((4, 8), layers=2, counted_layers=2, counted_modules=2, max_rank=32, adapters=3)
    assert cache.slot == 4
    assert cache.slots == 32 * 2 * 2 * 3 * 2
    assert cache.slots_per_page == 64  # the larger module of rank 32; an adapter of rank 8 would need 48
    assert cache.pages == 12
    assert [cache.pages_of(rank) for rank in (1, 8, 10, 11, 32)] == [1, 1, 1, 2, 4]
    assert [cache.fits(rank) for rank in (8, 11, 32)] == [12, 6, 3]
    assert cache.allocated_bytes == 12 * 64 * 4 * 2


def test_an_adapter_may_fill_a_page_to_its_last_slot() -> None:
    cache = LoraCache((4, 4), layers=2, counted_layers=2, counted_modules=2, max_rank=32, adapters=1)
    assert cache.slots_per_page == 32
    assert [cache.pages_of(rank) for rank in (8, 9, 16, 32)] == [1, 2, 2, 4]


def test_tensor_parallelism_splits_one_side_of_a_module() -> None:
    recipe = RECIPES["llama-3.3-70b-fp8-tp4-h100"]
    cache = lora_cache(recipe, stages(recipe)[0], recipe.lora.device_adapters)
    assert cache.sizes == (8192 + 2048, 8192 + 256, 8192 + 256, 2048 + 8192, 8192 + 7168, 8192 + 7168, 7168 + 8192)


def test_a_pipeline_splits_layers_and_not_the_cache() -> None:
    one, two = RECIPES["llama-3.3-70b-bf16-tp8-h100"], RECIPES["llama-3.3-70b-bf16-tp8-pp2-h100"]
    assert [stage.layers for stage in stages(two)] == [40, 40]
    assert [stage.embedding for stage in stages(two)] == [True, False]
    slots = [lora_cache(recipe, stages(recipe)[0], 8).slots for recipe in (one, two)]
    assert slots[0] == slots[1]


def test_uneven_pipelines_give_the_first_stages_more() -> None:
    recipe = changed("llama-3.1-8b-bf16-h100", parallel__pipeline=3)
    assert [stage.layers for stage in stages(recipe)] == [11, 11, 10]


def test_copied_kv_heads_are_counted() -> None:
    """Qwen 2.5 has 4 KV heads: on 8 GPUs each holds one whole."""
    recipe = changed("qwen2.5-7b-fp8-h100", parallel__tensor=8)
    assert plan_memory(recipe).kv_bytes_per_token == 2 * 28 * 1 * 128


def test_leaks_are_of_versions_that_have_them() -> None:
    recipe = RECIPES["llama-3.1-8b-fp8-h100"]
    assert plan_memory(recipe).lora_copies == 128 * 83_886_080
    assert plan_memory(recipe.retargeted(None, "1.3.0")).lora_copies == 0


def test_graphs_and_more_gpus_reserve_more() -> None:
    base = plan_memory(RECIPES["llama-3.1-8b-bf16-h100"]).reserve
    assert plan_memory(changed("llama-3.1-8b-bf16-h100", limits__cuda_graph=True)).reserve == base + GIB
    assert plan_memory(RECIPES["llama-3.3-70b-bf16-tp8-h100"]).reserve == base + GIB // 2
