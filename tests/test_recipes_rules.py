"""Each rule of `openlora engines check`, on a recipe that breaks it and on the same recipe unbroken."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
from recipe_cases import RECIPES, changed

from openlora.errors import InvalidArgument
from openlora.recipes import rules
from openlora.recipes.rules import check_recipe, refuse_broken

BF16, FP8, ENGINE = "llama-3.1-8b-bf16-h100", "llama-3.1-8b-fp8-h100", "llama-3.1-8b-fp8-h100-engine"
BIG, PIPELINE = "llama-3.3-70b-bf16-tp8-h100", "llama-3.3-70b-bf16-tp8-pp2-h100"
QWEN2, QWEN3 = "qwen2.5-7b-fp8-h100", "qwen3-8b-fp8-h100"
ATTENTION = ["attn_q", "attn_k", "attn_v", "attn_dense"]

# rule, severity, recipe, what is changed in it
BROKEN: list[tuple[str, str, str, dict[str, Any]]] = [
    ("fp8-needs-ada", "error", FP8, {"target__gpu": "A100-80GB"}),
    ("nvfp4-needs-blackwell", "error", "llama-3.1-8b-nvfp4-b200", {"target__gpu": "H100-80GB"}),
    ("nvfp4-needs-blackwell", "error", FP8, {"precision__kv_cache": "nvfp4"}),
    ("engine-path-removed", "error", ENGINE, {"target__tensorrt_llm": "1.3.0"}),
    ("no-container", "warning", FP8, {"target__tensorrt_llm": "1.3.0"}),
    ("int8-needs-engine", "error", "llama-3.1-8b-int8-a100-engine", {"target__path": "llm-api"}),
    ("nvfp4-adapters-on-engine", "error", "llama-3.1-8b-nvfp4-b200", {"target__path": "engine"}),
    ("nvfp4-kv-on-engine", "error", ENGINE, {"precision__kv_cache": "nvfp4"}),
    ("nvfp4-kv-needs-checkpoint", "error", BF16, {"precision__kv_cache": "nvfp4", "target__gpu": "B200-180GB"}),
    ("nvfp4-adapters", "warning", BF16, {"precision__weights": "nvfp4", "target__gpu": "B200-180GB"}),
    ("heads-divide", "error", QWEN2, {"parallel__tensor": 8}),
    ("kv-heads-divide", "error", QWEN2, {"parallel__tensor": 7, "precision__weights": "none"}),
    ("mlp-divides", "error", QWEN2, {"parallel__tensor": 7, "model__shape__mlp": 18_945,
                                     "model__parameters": 7_615_616_512 + 28 * 3 * 3584}),
    ("quantized-alignment", "error", "qwen3-8b-fp8-h100", {"parallel__tensor": 32, "target__nodes": 4,
                                                           "model__shape__mlp": 12_288 - 32,
                                                           "model__parameters": 8_190_735_360 - 36 * 3 * 4096 * 32}),
    ("layers-divide", "error", BF16, {"parallel__pipeline": 40, "target__nodes": 5}),
    ("gpus", "error", BIG, {"target__gpus_per_node": 4}),
    ("whole-nodes", "error", BIG, {"target__nodes": 2}),
    ("tensor-across-nodes", "warning", BIG, {"target__nodes": 2, "target__gpus_per_node": 4}),
    ("fused-module", "error", BF16, {"lora__target_modules": ["attn_qkv"]}),
    ("mixture-module", "error", BF16, {"lora__target_modules": ["moe_gate"]}),
    ("unknown-module", "error", BF16, {"lora__target_modules": ["q_proj"]}),
    ("repeated-module", "error", BF16, {"lora__target_modules": ["attn_dense", "attn_dense"]}),
    ("qkv-together", "warning", BF16, {"lora__target_modules": ["attn_q", "attn_v"]}),
    ("rank-too-high", "error", BF16, {"lora__max_rank": 2048}),
    ("rank-over-page", "error", BF16, {"lora__max_rank": 1024, "lora__target_modules": ["mlp_gate"]}),
    ("rank-alignment", "warning", BF16, {"lora__max_rank": 20}),
    ("expected-rank", "error", BF16, {"lora__max_rank": 8}),
    ("host-below-device", "error", BF16, {"lora__host_adapters": 4}),
    ("life-below-host", "error", BF16, {"lora__adapters_per_life": 32}),
    ("adapters-leak", "warning", BF16, {"target__tensorrt_llm": "1.1.0"}),
    ("adapters-on-copied-heads", "error", BIG, {"parallel__tensor": 16, "target__nodes": 2}),
    ("adapters-in-a-pipeline", "warning", BIG, {"parallel__tensor": 4, "parallel__pipeline": 2}),
    ("chunked-prefill-in-a-pipeline", "warning", BIG, {"parallel__tensor": 4, "parallel__pipeline": 2}),
    ("fp8-llama-tensor-parallel", "error", "llama-3.3-70b-fp8-tp4-h100", {"target__tensorrt_llm": "1.1.0"}),
    ("fp8-llama-tensor-parallel", "warning", "llama-3.3-70b-fp8-tp4-h100", {"target__tensorrt_llm": "1.2.0"}),
    ("qwen3-mlp-adapters", "error", QWEN3, {"lora__target_modules": [*ATTENTION, "mlp_gate"]}),
    ("graphs-on-engine", "error", ENGINE, {"limits__cuda_graph": True}),
    ("graphs-with-adapters", "error", BF16, {"limits__cuda_graph": True, "target__tensorrt_llm": "1.1.0"}),
    ("graphs-with-adapters", "warning", BF16, {"limits__cuda_graph": True}),
    ("positions", "error", QWEN3, {"limits__max_seq_len": 65_536}),
    ("prompt-in-a-step", "error", BF16, {"limits__chunked_prefill": False, "limits__max_seq_len": 16_384}),
    ("kv-below-request", "error", BF16, {"limits__kv_cache_tokens": 4096}),
    ("memory", "error", BF16, {"target__gpu": "L4"}),
    ("memory", "error", BIG, {"parallel__tensor": 1}),
]  # fmt: skip
# Warnings that the recipes, which are of 1.2.1, have as they are.
OF_ALL_BELOW_1_3 = {("adapters-leak", "warning"), ("fp8-llama-tensor-parallel", "warning")}


def said(recipe: Any) -> set[tuple[str, str]]:
    return {(finding.rule, finding.severity) for finding in check_recipe(recipe)}


@pytest.mark.parametrize(("rule", "severity", "name", "changes"), BROKEN, ids=lambda value: str(value)[:40])
def test_a_rule_finds_what_breaks_it(rule: str, severity: str, name: str, changes: dict[str, Any]) -> None:
    assert (rule, severity) in said(changed(name, **changes))
    if (rule, severity) not in OF_ALL_BELOW_1_3:
        assert (rule, severity) not in said(RECIPES[name])


def test_every_rule_is_tried() -> None:
    written = set(re.findall(r'_(?:error|warning)\(\s*"([a-z0-9-]+)"', inspect.getsource(rules)))
    assert written == {rule for rule, *_ in BROKEN}


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_have_no_errors(name: str) -> None:
    assert not [finding for finding in check_recipe(RECIPES[name]) if finding.severity == "error"]


def test_what_the_newest_version_mends() -> None:
    """1.3 applies adapters to Qwen 3's MLP and leaks none; what is left is that no container has it."""
    recipe = changed(QWEN3, target__tensorrt_llm="1.3.0", lora__target_modules=[*ATTENTION, "mlp_gate"])
    assert said(recipe) == {("no-container", "warning")}
    assert said(changed(BF16, target__tensorrt_llm="1.3.0", limits__cuda_graph=True)) == {("no-container", "warning")}


def test_a_message_says_what_would_be_right() -> None:
    with pytest.raises(InvalidArgument) as caught:
        refuse_broken(changed(FP8, target__gpu="A100-80GB"))
    assert str(caught.value) == (
        "[INVALID_ARGUMENT] recipe: llama-3.1-8b-fp8-h100: A100-80GB is Ampere, which has no FP8: Ada, Hopper or"
        " Blackwell does (fp8-needs-ada)"
    )


def test_fp8_in_the_kv_cache_is_of_all_gpus() -> None:
    """The hardware matrix has it for Ampere too."""
    recipe = changed("mistral-7b-v0.3-bf16-a100", precision__kv_cache="fp8")
    assert said(recipe) == {("adapters-leak", "warning")}


@pytest.mark.parametrize(("field", "value"), [("target__gpu", "H100"), ("target__tensorrt_llm", "1.2")])
def test_what_is_not_in_the_catalogue_is_named(field: str, value: str) -> None:
    with pytest.raises(InvalidArgument, match=f"'{value}' is not in the catalogue, one of .* is right"):
        check_recipe(changed(BF16, **{field: value}))
