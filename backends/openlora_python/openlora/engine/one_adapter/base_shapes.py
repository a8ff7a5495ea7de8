"""The linears of a base model, from the headers of its weight files: no library has to build the model for it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ...errors import UnsupportedModel

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100 << 20
_PACKED = ("U8", "I32")  # several values in one
NVFP4_BLOCK = 16


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
        self._tensors: dict[str, tuple[str, tuple[int, ...]]] = {}  # dtype and shape
        for file in files:
            for name, entry in _header(file).items():
                self._tensors[name] = entry["dtype"], tuple(entry["shape"])
        self.linears = frozenset(module for module in map(_module, self._tensors) if _is_linear(module))
        self.layers = len({found[0] for module in self.linears if (found := re.search(r"\.layers\.\d+\.", module))})

    def restrict(self, leaves: frozenset[str]) -> None:
        """Adapters may change only linears whose names end with one of `leaves`: the engine skips the others."""
        self.linears = frozenset(module for module in self.linears if module.rpartition(".")[2] in leaves)

    def shape(self, module: str) -> tuple[int, int] | None:
        """`(out features, in features)`; None where the weight is packed in a way that its shape does not tell."""
        dtype, shape = self._tensors.get(f"{module}.weight", ("", ()))
        if len(shape) != 2:
            return None
        rows, columns = shape
        if dtype not in _PACKED:
            return rows, columns
        # NVFP4 as ModelOpt writes it: two values a byte along a row, an FP8 scale for each 16 of them.
        nvfp4 = self._tensors.get(f"{module}.weight_scale") == ("F8_E4M3", (rows, 2 * columns // NVFP4_BLOCK))
        return (rows, 2 * columns) if nvfp4 else None


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
