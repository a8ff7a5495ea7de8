"""A recipe: one YAML file that says which model runs how on which GPU, and what of adapters it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from ..errors import InvalidArgument
from ..validation import first_fault
from .catalogue import KvCache, Weights
from .shape import ModelShape

DEFAULT_FOLDER = Path("engines")
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(_Section):
    """`parameters` is the published count: the shape must give it exactly."""

    id: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]  # of Hugging Face, and its directory below --models
    family: Literal["llama", "mistral", "qwen2", "qwen3"]
    parameters: PositiveInt
    max_positions: PositiveInt
    shape: ModelShape

    @model_validator(mode="after")
    def _count_is_right(self) -> Model:
        if self.shape.parameters != self.parameters:
            raise ValueError(f"the shape has {self.shape.parameters:,} parameters, {self.parameters:,} are stated")
        return self


class Precision(_Section):
    """`dtype` is that of adapters, activations, embeddings and of weights that are not quantized."""

    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    weights: Weights = "none"
    kv_cache: KvCache = "auto"  # auto = dtype


class Target(_Section):
    """Where it runs: `gpu` is a name of the catalogue."""

    tensorrt_llm: str  # version
    path: Literal["llm-api", "engine"] = "llm-api"  # engine: trtllm-build
    gpu: str
    gpus_per_node: PositiveInt = 8
    nodes: PositiveInt = 1


class Parallel(_Section):
    """How many GPUs share each layer's weights, and how many groups of them share the layers."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1

    @property
    def world(self) -> int:
        """GPUs in all."""
        return self.tensor * self.pipeline


class Lora(_Section):
    """Of adapters. An ensemble's ranks add up, so `max_rank` is that of the largest sum."""

    max_rank: PositiveInt = 64
    expected_rank: PositiveInt = 16  # most adapters': what the figures of distinct adapters are made with
    device_adapters: PositiveInt  # of max_rank, in GPU memory
    host_adapters: PositiveInt
    adapters_per_life: PositiveInt  # distinct ones, until the engine process is replaced
    target_modules: tuple[str, ...] = Field(min_length=1)


class Limits(_Section):
    """In tokens unless said; TensorRT-LLM's own names."""

    max_batch_size: PositiveInt  # requests in one step
    max_num_tokens: PositiveInt = 8192  # of one step
    max_seq_len: PositiveInt  # prompt and answer
    kv_cache_tokens: PositiveInt  # that must fit, all requests together
    free_gpu_memory_fraction: float = Field(default=0.9, gt=0.0, lt=1.0)
    chunked_prefill: bool = True
    cuda_graph: bool = False


class Calibration(_Section):
    """For FP8 and NVFP4. `dataset` is a name that the quantizing script knows, or a local directory."""

    dataset: str = "cnn_dailymail"
    samples: PositiveInt = 512
    batch: PositiveInt = 8


class Recipe(_Section):
    """One engine, whole. Whether its GPU and TensorRT-LLM can do it is `rules.check_recipe`'s to say."""

    name: Name  # of its file as well
    summary: str  # one line
    model: Model
    precision: Precision
    target: Target
    parallel: Parallel = Parallel()
    lora: Lora
    limits: Limits
    calibration: Calibration = Calibration()

    def retargeted(self, gpu: str | None, version: str | None) -> Recipe:
        """The same on another GPU or version; None = as it is."""
        changes = {"gpu": gpu, "tensorrt_llm": version}
        target = self.target.model_copy(update={name: value for name, value in changes.items() if value is not None})
        return self.model_copy(update={"target": target})

    @property
    def needs_checkpoint(self) -> bool:
        """Whether something is made before serving: the PyTorch path serves a 16-bit model as it is."""
        return self.precision.weights != "none" or self.target.path == "engine"


def load_recipe(file: Path) -> Recipe:
    """The recipe in `file`, which has its name.

    Raises:
        InvalidArgument: naming the field and what is wrong with it.
    """
    try:
        tree = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidArgument(f"{file}: {' '.join(str(error).split())}", field="recipe") from error
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        place, words = first_fault(error)
        raise InvalidArgument(f"{file}: {words}", field=place or "recipe") from error
    if recipe.name != file.stem:
        raise InvalidArgument(f"{file} names itself {recipe.name!r}, {file.stem!r} is right", field="name")
    return recipe


def load_recipes(folder: Path = DEFAULT_FOLDER) -> list[Recipe]:
    """All of a folder, by name.

    Raises:
        InvalidArgument: there is none, or one of them is not right.
    """
    files = sorted(folder.glob("*.yaml"), key=lambda file: file.stem)
    if not files:
        raise InvalidArgument(f"{folder} holds no recipe (*.yaml)", field="recipes")
    return [load_recipe(file) for file in files]


def find_recipe(name: str, folder: Path = DEFAULT_FOLDER) -> Recipe:
    """By name in `folder`, or by the path of its file.

    Raises:
        InvalidArgument: there is none.
    """
    if name.endswith((".yaml", ".yml")):
        return load_recipe(Path(name))
    file = folder / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml"))) or "none"
        raise InvalidArgument(f"no recipe {name!r} in {folder}: it holds {known}", field="recipe")
    return load_recipe(file)
