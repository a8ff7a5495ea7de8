"""The linear modules of a base model: what an adapter may change, and in which shapes.

Built once per base digest from its `config.json` on torch's meta device (no weights are read) and kept as JSON, so
that later runs need neither torch nor transformers.
"""

from __future__ import annotations

import importlib.metadata
import os
import tempfile
from pathlib import Path

import msgspec

from ..errors import UnsupportedModel

BYTES_PER_VALUE = 4  # of the widest dtype that is accepted
FORMAT = 1


class BaseModules(msgspec.Struct, frozen=True):
    """Names as `named_modules()` of the causal-LM class gives them."""

    linear: dict[str, tuple[int, int]]  # name -> (out features, in features)
    embeddings: tuple[str, ...]
    output_head: str | None

    def largest_adapter_bytes(self, max_rank: int) -> int:
        """An upper bound of the tensor bytes of any adapter of this base: all modules at `max_rank` in 32 bit."""
        return sum((rows + columns) * max_rank * BYTES_PER_VALUE for rows, columns in self.linear.values())


def base_modules(model: Path, digest: str, cache: Path) -> BaseModules:
    """The modules of the base model in `model`.

    Args:
        model: Hugging Face model directory.
        digest: its manifest digest, which names the cached result together with the version of transformers.
        cache: directory for cached results.

    Raises:
        UnsupportedModel: when transformers knows no causal LM for its configuration.
    """
    version = importlib.metadata.version("transformers")
    cached = cache / f"{digest}-{version}-{FORMAT}.json"
    try:
        return msgspec.json.decode(cached.read_bytes(), type=BaseModules)
    except (FileNotFoundError, msgspec.DecodeError):  # not there yet, or damaged: both mean building it
        modules = _build(model)
    cache.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=cache)
    with os.fdopen(handle, "wb") as file:
        file.write(msgspec.json.encode(modules))
    os.replace(temporary, cached)
    return modules


def _build(model: Path) -> BaseModules:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        first_line = str(error).partition("\n")[0]
        raise UnsupportedModel(f"{model}: {first_line}", field="model") from error
    head = skeleton.get_output_embeddings()
    named = list(skeleton.named_modules())
    return BaseModules(
        linear={
            name: (module.out_features, module.in_features)
            for name, module in named
            if isinstance(module, torch.nn.Linear)
        },
        embeddings=tuple(name for name, module in named if isinstance(module, torch.nn.Embedding)),
        output_head=next((name for name, module in named if module is head), None),
    )
