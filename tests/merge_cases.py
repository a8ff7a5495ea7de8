"""Small adapters to merge, and PEFT's word on what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from openlora.adapters.base_modules import BaseModules
from openlora.adapters.lora_config import AdapterConfig
from openlora.adapters.manifest import adapter_manifest
from openlora.adapters.merge_files import write_merged
from openlora.adapters.merge_layout import MergedModule, lay_out
from openlora.adapters.merge_plan import METHODS, MergeLimits, MergePlan, MergeSource
from openlora.adapters.weights import validate_adapter

SHAPES = {"q_proj": (24, 16), "v_proj": (8, 16), "down_proj": (16, 40)}  # (out, in)
WEIGHTS = (0.7, -0.4, 1.3)
BASE_DIGEST = "0" * 64
FACTOR_METHODS = [name for name, method in METHODS.items() if method.space == "factors"]


class Net(nn.Module):
    """Two layers of linears; only their names and shapes matter."""

    prepare_inputs_for_generation = None  # PEFT takes hold of it in a causal LM

    def __init__(self):
        super().__init__()
        layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(columns, rows, bias=False) for name, (rows, columns) in SHAPES.items()})
            for _ in range(2)
        )
        self.model = nn.ModuleDict({"layers": layers})


MODULES = BaseModules(
    {name: (module.out_features, module.in_features) for name, module in Net().named_modules() if "_proj" in name},
    (),
    None,
)


def make(directory: Path, seed: int, dtype: torch.dtype = torch.float32, **config) -> Path:
    torch.manual_seed(seed)
    model = get_peft_model(Net(), LoraConfig(init_lora_weights=False, **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_()
    model.to(dtype).save_pretrained(directory)
    return directory


def plan_of(paths: Sequence[Path], weights: Sequence[float] = WEIGHTS, method: str = "cat", **choices) -> MergePlan:
    sources = [
        MergeSource(adapter_manifest(path).digest, round(weight * 1_000_000))
        for path, weight in zip(paths, weights, strict=True)
    ]
    return MergePlan.of(sources, method, **choices)


def layout_of(
    plan: MergePlan, paths: Sequence[Path], max_rank: int = 128, limits: MergeLimits | None = None
) -> tuple[MergedModule, ...]:
    configs = [AdapterConfig.read(path) for path in paths]
    return lay_out(plan, [path.name for path in paths], configs, MODULES, max_rank, limits or MergeLimits())


def merged(directory: Path, paths, weights=WEIGHTS, method="cat", **choices) -> Path:
    plan = plan_of(paths, weights, method, **choices)
    directory.mkdir()
    write_merged(directory, plan, paths, layout_of(plan, paths), MODULES, lambda done, module: None)
    validate_adapter("merged", directory, None, MODULES, BASE_DIGEST, 128)
    return directory


def loaded(*paths) -> PeftModel:
    model = PeftModel.from_pretrained(Net(), paths[0], adapter_name="0")
    for number, path in enumerate(paths[1:], start=1):
        model.load_adapter(path, adapter_name=str(number))
    return model


def deltas(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    """ΔW by module, as PEFT computes it."""
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight(adapter).detach()
        for name, layer in model.named_modules()
        if adapter in getattr(layer, "lora_A", ())
    }


def sums(paths, weights) -> dict[str, torch.Tensor]:
    """Σ wᵢ·ΔWᵢ by module in float64."""
    model = loaded(*paths).double()
    total = {}
    for number, weight in enumerate(weights):
        for name, delta in deltas(model, str(number)).items():
            total[name] = total.get(name, 0) + delta * weight
    return total


def by_peft(paths, weights, method, seed=None, **choices) -> PeftModel:
    """PEFT's own merge as adapter `merged`; `seed` is set when the new adapter's initialisation has had its draws."""
    model = loaded(*paths)
    tuner = model.base_model
    inject = tuner.inject_adapter

    def inject_then_seed(*arguments, **settings):
        inject(*arguments, **settings)
        torch.manual_seed(seed)

    if seed is not None:
        tuner.inject_adapter = inject_then_seed
    names = [str(number) for number in range(len(paths))]
    tuner.add_weighted_adapter(names, list(weights), "merged", combination_type=method, **choices)
    return model


def make_even(folder: Path) -> list[Path]:
    """Equal ranks; scalings and targets differ."""
    return [
        make(folder / "even0", 1, r=6, lora_alpha=12, target_modules=["q_proj", "v_proj"]),
        make(folder / "even1", 2, r=6, lora_alpha=3, target_modules=["q_proj", "down_proj"]),
        make(folder / "even2", 3, r=6, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"]),
    ]


def make_uneven(folder: Path) -> list[Path]:
    """Everything differs: ranks, scalings, patterns, rsLoRA, layers, targets, dtype."""
    return [
        make(
            folder / "uneven0",
            4,
            r=3,
            lora_alpha=8,
            target_modules=["q_proj"],
            rank_pattern={"model.layers.1.q_proj": 5},
        ),
        make(folder / "uneven1", 5, r=4, lora_alpha=4, use_rslora=True, target_modules=["q_proj", "down_proj"]),
        make(
            folder / "uneven2",
            6,
            torch.bfloat16,
            r=2,
            lora_alpha=5,
            target_modules=["down_proj", "v_proj"],
            layers_to_transform=[1],
            alpha_pattern={"v_proj": 7},
        ),
    ]
