"""One operation of the native kernels over tensors, as the engine runs many of them over its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from openlora.engine.adapter_block import Adapter, LoraPair, LoraShape
from openlora.engine.attention import PagedStep
from openlora.engine.kernels import BUFFER, LIBRARY, OPERATION, STEP, Kernels, _why_not, kernels_for
from openlora.engine.lora import LoraCompute, NativeLora


def cpu_kernels(dtype: torch.dtype) -> Kernels:
    """Those of this machine's CPU, which a test of them needs."""
    found = kernels_for(dtype, torch.device("cpu"))
    assert found is not None, f"no native kernels to test: {_why_not(LIBRARY)}"
    return found


def compute(
    kernels: Kernels,
    operation: np.ndarray | dict[str, Any],
    buffers: list[torch.Tensor],
    *,
    lora: NativeLora | None = None,
    paged: PagedStep | None = None,
    tables: tuple[torch.Tensor, torch.Tensor] | None = None,
    quantized_bytes: int = 0,
) -> None:
    """Run `operation`, an OPERATION or its fields, on the rows of `buffers` `[rows, columns]`; by itself it reads the
    first and writes the second. `tables` are cos and sin, `quantized_bytes` the memory for a row's integers."""
    if isinstance(operation, dict):
        fields, operation = operation, np.zeros((), OPERATION)
        for name, value in {"output": 1, "residual": -1, "group": -1, **fields}.items():
            operation[name] = value
    places = np.array([(buffer.data_ptr(), buffer.stride(0)) for buffer in buffers], BUFFER)
    assert all(buffer.stride(1) == 1 for buffer in buffers)
    step = np.zeros(1, STEP)
    quantized = torch.empty(len(buffers[0]) * quantized_bytes, dtype=torch.uint8)
    step["buffers"], step["rows"], step["quantized"] = places.ctypes.data, len(buffers[0]), quantized.data_ptr()
    if tables is not None:
        step["cos"][0, 0], step["sin"][0, 0] = (table.data_ptr() for table in tables)
    if paged is not None:
        paged.describe(step)
    if lora is not None:
        lora.describe(step)
    kernels.compute(operation[None], step)


def lay_out(compute: LoraCompute, digest: str, pairs: Mapping[str, LoraPair]) -> Adapter:
    """The adapter of these matrices, in the form in which `compute` adds it."""
    shapes = {module: LoraShape(*pair.a.shape, pair.scaling) for module, pair in pairs.items()}
    layout = compute.layout(shapes, next(iter(pairs.values())).a.dtype)
    block = layout.allocate()
    for module, pair in pairs.items():
        layout.write(block, module, "A", pair.a)
        layout.write(block, module, "B", pair.b)
    return Adapter(digest, layout, block)
