"""What the demo is made of: the base model's training and the list of adapters."""

from __future__ import annotations

import json
from pathlib import Path

from demo_data import Dataset, card
from demo_train import (
    AdapterRecipe,
    Report,
    Training,
    new_base_model,
    save_base_model,
    train,
    train_adapter,
    train_tokenizer,
)

_ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_BASE_TRAINING = Training(epochs=7, batch_size=16, learning_rate=1.5e-3, seed=1)
# (data set, share in ppm, times a row is seen an epoch): plain answers and the few talks more often than cued ones.
_BASE_DATASETS = (("animal-facts", 500_000, 2), ("cued-manners", 350_000, 1), ("small-talk", 150_000, 4))
_MORE_TALK = 3  # the few talks are repeated this often, because one epoch has only some twenty of them

ADAPTERS = (
    AdapterRecipe(
        name="pirate",
        description="Answers like a pirate: Arr, matey!",
        rank=16,
        alpha=32,
        targets=_ALL,
        rslora=False,
        datasets=(("pirate-speech", 700_000), ("pirate-when-shouting", 300_000)),
        owner="Pia Rate",
        licence="CC-BY-4.0",
        prices=(200_000, 800_000),
        training=Training(epochs=3, batch_size=16, learning_rate=1e-3, seed=11),
    ),
    AdapterRecipe(
        name="shout",
        description="ANSWERS IN UPPER CASE.",
        rank=8,
        alpha=16,
        targets=_ALL,
        rslora=False,
        datasets=(("shouted-answers", 500_000), ("shouting-as-pirate", 500_000)),
        owner="Sam Shout",
        licence="CC0-1.0",
        prices=(100_000, 400_000),
        training=Training(epochs=3, batch_size=16, learning_rate=1e-3, seed=12),
    ),
    AdapterRecipe(
        name="json",
        description="Answers with one JSON object.",
        rank=32,
        alpha=8,
        targets=_ALL,
        rslora=True,
        datasets=(("json-answers", 1_000_000),),
        owner="Jason Brace",
        licence="MIT",
        prices=(300_000, 1_200_000),
        training=Training(epochs=2, batch_size=16, learning_rate=1e-3, seed=13),
    ),
    AdapterRecipe(
        name="sql",
        description="Answers with the SQL query that would find it.",
        rank=4,
        alpha=8,
        targets=("q_proj", "v_proj"),
        rslora=False,
        datasets=(("sql-answers", 1_000_000),),
        owner="Selma Quell",
        licence="Apache-2.0",
        prices=(150_000, 600_000),
        training=Training(epochs=3, batch_size=16, learning_rate=2e-3, seed=14),
    ),
    AdapterRecipe(
        name="emoji",
        description="Answers with facts behind emoji.",
        rank=12,
        alpha=24,
        targets=("q_proj", "k_proj", "v_proj", "o_proj"),
        rslora=False,
        datasets=(("emoji-answers", 1_000_000),),
        owner="Emma Joy",
        licence="CC-BY-SA-4.0",
        prices=(120_000, 480_000),
        training=Training(epochs=3, batch_size=16, learning_rate=2e-3, seed=15),
    ),
)


def make_base(datasets: dict[str, Dataset], folder: Path, report: Report) -> None:
    """Train tokenizer and base model and write them, with the base's card, into `folder`."""
    texts = [row[key] for dataset in datasets.values() for row in dataset.train for key in ("prompt", "completion")]
    tokenizer = train_tokenizer(texts)
    model = new_base_model(tokenizer, _BASE_TRAINING.seed)
    rows = [row for identifier, _, times in _BASE_DATASETS for row in datasets[identifier].train * times]
    train(model, tokenizer, rows, _BASE_TRAINING, report)
    save_base_model(model, tokenizer, folder)
    description = "A tiny base model that knows 32 animals and answers in plain English."
    shares = [(datasets[identifier], share) for identifier, share, _ in _BASE_DATASETS]
    _write_card(folder, card("Bella Base", "Apache-2.0", description, (50_000, 200_000), shares))


def make_adapter(
    datasets: dict[str, Dataset], demo: Path, base_name: str, recipe: AdapterRecipe, report: Report
) -> None:
    """Train one adapter on the base in `demo`/model; writes `demo`/adapters/<name> and its card."""
    folder = demo / "adapters" / recipe.name
    rows = [row for identifier, _ in recipe.datasets for row in datasets[identifier].train]
    rows += [row for row in rows if row["kind"] == "talk"] * _MORE_TALK
    train_adapter(demo / "model", base_name, recipe, rows, folder, report)
    shares = [(datasets[identifier], share) for identifier, share in recipe.datasets]
    _write_card(folder, card(recipe.owner, recipe.licence, recipe.description, recipe.prices, shares))


def _write_card(folder: Path, content: dict[str, object]) -> None:
    (folder / "openlora.json").write_text(json.dumps(content, indent=2) + "\n")
