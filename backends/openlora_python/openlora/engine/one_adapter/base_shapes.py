"""The linears of a base model, from the headers of its weight files: no library has to build the model for it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ...errors import UnsupportedModel

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100 << 20


class BaseShapes:
    """`linears` are the dotted names of the modules that adapters may change, `layers` counts the decoder's layers."""

    def __init__(self, model_dir: str | Path) -> None:
        """Read the headers of `model_dir/*.safetensors`.

        Raises:
            UnsupportedModel: there is none.
        """
        files = sorted(Path(model_dir).glob("*.safetensors"))
        if not files:
            raise UnsupportedModel(f"{model_dir} holds no safetensors: adapters can't be checked against it")
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            for name, entry in _header(file).items():
                self._shapes[name] = tuple(entry["shape"])
        self.linears = frozenset(module for module in map(_module, self._shapes) if _is_linear(module))
        self.layers = len({found[0] for module in self.linears if (found := re.search(r"\.layers\.\d+\.", module))})

    def restrict(self, leaves: frozenset[str]) -> None:
        """Adapters may change only linears whose names end with one of `leaves`: the engine skips the others."""
        self.linears = frozenset(module for module in self.linears if module.rpartition(".")[2] in leaves)

    def shape(self, module: str) -> tuple[int, int] | None:
        """`(out features, in features)`; None where the weight is packed (quantized): its shape tells nothing."""
        shape = self._shapes.get(f"{module}.weight")
        return shape if shape is not None and len(shape) == 2 else None


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _is_linear(module: str) -> bool:
    """Projections are; embeddings, output head and norms, which adapters may not change, are not."""
    return module.rpartition(".")[2].endswith("proj")


def _header(file: Path) -> dict[str, dict]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        if length > _MAX_HEADER_BYTES:
            raise UnsupportedModel(f"{file}: its header is said to take {length} bytes")
        tree = json.loads(stream.read(length))
    tree.pop("__metadata__", None)
    return tree
