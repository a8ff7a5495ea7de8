"""Where base models, what is made of them, adapters and the server's state lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .recipe import Recipe


@dataclass(frozen=True)
class Layout:
    """Paths are used as they are given, so that commands read the same here and in a container."""

    models: Path = Path("/models")  # <models>/<id of Hugging Face>
    artefacts: Path = Path("/models/engines")  # <artefacts>/<recipe>/<version>/
    adapters: Path = Path("/adapters")
    state: Path = Path("/var/lib/openlora")

    def base(self, recipe: Recipe) -> Path:
        return self.models / recipe.model.id

    def made(self, recipe: Recipe) -> Path:
        """Engines and checkpoints are of one version: another one makes its own."""
        return self.artefacts / recipe.name / recipe.target.tensorrt_llm

    def checkpoint(self, recipe: Recipe) -> Path:
        return self.made(recipe) / "checkpoint"

    def engine(self, recipe: Recipe) -> Path:
        return self.made(recipe) / "engine"

    @property
    def launching(self) -> Path:
        """What launching writes: the volume of models may be read-only then."""
        return self.state / "recipes"

    def settings(self, recipe: Recipe) -> Path:
        return self.launching / f"{recipe.name}-{recipe.target.tensorrt_llm}.yaml"

    def served(self, recipe: Recipe) -> Path:
        """The Hugging Face directory that `openlora serve --model` names: of the engine path the base model's."""
        made_here = recipe.needs_checkpoint and recipe.target.path == "llm-api"
        return self.checkpoint(recipe) if made_here else self.base(recipe)
