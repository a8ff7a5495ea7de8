"""What people see of a recipe: its memory, its findings, its settings."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from .catalogue import GIB, MIB, version_named
from .planner import MemoryPlan, plan_memory
from .recipe import Recipe
from .rules import Finding, check_recipe


def describe(recipe: Recipe) -> dict[str, Any]:
    """Everything that follows from a recipe, for --json."""
    return {
        "recipe": recipe.model_dump(mode="json"),
        "containers": list(version_named(recipe.target.tensorrt_llm).containers),
        "memory": plan_memory(recipe).to_json(),
        "findings": [vars(finding) for finding in check_recipe(recipe)],
    }


def list_table(recipes: list[Recipe]) -> Table:
    table = Table("recipe", "GPUs", "weights / KV", "path", "adapters", "check")
    table.columns[0].no_wrap = True
    for recipe in recipes:
        findings = check_recipe(recipe)
        errors = sum(finding.severity == "error" for finding in findings)
        said = f"{errors} errors" if errors else f"{len(findings)} warnings" if findings else "ok"
        table.add_row(
            recipe.name,
            f"{recipe.parallel.world} × {recipe.target.gpu}",
            f"{recipe.precision.weights} / {recipe.precision.kv_cache}",
            f"{recipe.target.path} {recipe.target.tensorrt_llm}",
            f"{recipe.lora.device_adapters} of rank {recipe.lora.max_rank}",
            said,
        )
    return table


def memory_table(plan: MemoryPlan) -> Table:
    table = Table("of each GPU", "GiB", "", title=f"{plan.gpus} × {plan.gpu}", title_justify="left")
    for name, number, note in (
        ("weights", plan.weights, ""),
        ("adapter cache", plan.lora_device, _numbers(plan.adapters_by_rank)),
        ("adapters' leaked copies", plan.lora_copies, "at the end of the engine's life"),
        ("activations", plan.activations, "estimate"),
        ("reserve", plan.reserve, "estimate"),
        ("KV cache", plan.kv_pool, f"{plan.kv_tokens:,} tokens; {plan.kv_tokens_needed:,} wanted"),
        ("memory", plan.capacity, "fits" if plan.fits else "DOES NOT FIT"),
    ):
        table.add_row(name, f"{number / GIB:.2f}", note)
    table.add_section()
    table.add_row("host, adapter cache", f"{plan.lora_host_per_gpu / GIB:.2f}", _numbers(plan.host_adapters_by_rank))
    table.add_row("host, a node", f"{plan.host_per_node / GIB:.2f}", "with every adapter of an engine's life")
    table.add_row(
        "one adapter", f"{plan.adapter_bytes / GIB:.2f}", f"{plan.adapter_bytes / MIB:.0f} MiB, of the expected rank"
    )
    return table


def _numbers(by_rank: dict[int, int]) -> str:
    return "holds " + ", ".join(f"{number} of rank {rank}" for rank, number in by_rank.items())


def finding_lines(findings: list[Finding]) -> list[str]:
    return [f"{finding.severity}: {finding.message} ({finding.rule})" for finding in findings]
