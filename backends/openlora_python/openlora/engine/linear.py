"""The base model's linears as the engine runs them: those that share an input as one, weights laid out for the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from .kernels import BUFFER, LINEAR, OPERATION, STEP, Kernels
from .kernels.pages import streamed

Pack = Callable[[Sequence[nn.Linear], Kernels | None], nn.Module]
"""Makes one module of linears that take the same input: `[…, in_features]` to all their outputs side by side."""

PANEL = 32  # outputs; see kernels/linear.h


def pack_linears(linears: Sequence[nn.Linear], kernels: Kernels | None) -> nn.Module:
    """`Pack` for 16- and 32-bit weights."""
    return TorchLinear(linears) if kernels is None else PackedLinear(linears, kernels)


class TorchLinear(nn.Module):
    """y = xWᵀ + b for several linears at once."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
        bias = joint_bias(linears)
        self.bias = None if bias is None else nn.Parameter(bias.to(self.weight), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return functional.linear(inputs, self.weight, self.bias)


class NativeLinear(nn.Module):
    """y = xWᵀ + b for several linears at once, as one operation of the native kernels.

    `operation` says all of it but where input and output lie; `quantized_bytes` is the memory that a row's integer
    activations take.
    """

    quantized_bytes = 0

    def __init__(self, linears: Sequence[nn.Linear], kernels: Kernels, weight: torch.Tensor) -> None:
        super().__init__()
        self.in_features = linears[0].in_features
        self.out_features = sum(linear.out_features for linear in linears)
        self._kernels = kernels
        self.register_buffer("weight", weight)
        bias = joint_bias(linears)
        self.register_buffer("bias", None if bias is None else whole_panels(bias))
        operation = np.zeros((), OPERATION)
        operation["kind"], operation["group"], operation["output"] = LINEAR, -1, 1
        operation["features"], operation["columns"] = self.in_features, self.out_features
        operation["weight"] = weight.data_ptr()
        operation["bias"] = 0 if bias is None else self.bias.data_ptr()
        self.operation = operation

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = inputs.reshape(-1, self.in_features)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        outputs = rows.new_empty(len(rows), self.out_features)
        quantized = torch.empty(len(rows) * self.quantized_bytes, dtype=torch.uint8)
        buffers = np.array([(rows.data_ptr(), rows.stride(0)), (outputs.data_ptr(), self.out_features)], BUFFER)
        step = np.zeros(1, STEP)
        step["buffers"], step["rows"], step["quantized"] = buffers.ctypes.data, len(rows), quantized.data_ptr()
        self._kernels.compute(self.operation[None], step)
        return outputs.view(*inputs.shape[:-1], self.out_features)


class PackedLinear(NativeLinear):
    """Weights in panels.

    At 16 rows, in bfloat16, this takes 0.6 of the time of oneDNN with a blocked weight, and 0.4 of that with a plain
    one; at 512 rows they are equal.
    """

    def __init__(self, linears: Sequence[nn.Linear], kernels: Kernels) -> None:
        super().__init__(linears, kernels, pack_panels([linear.weight for linear in linears]))


def pack_panels(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Weights `[out_features, in_features]`, one below the other, as kernels/linear.h reads them.

    Panels of 32 outputs, the last one filled up with zeros: float32 `[panels, in_features, 32]`, bfloat16
    `[panels, in_features / 2, 32, 2]`.
    """
    features, dtype = weights[0].shape[1], weights[0].dtype
    rows = sum(len(weight) for weight in weights)
    together = 2 if dtype == torch.bfloat16 else 1  # inputs in one lane
    packed = streamed(-(-rows // PANEL), features // together, PANEL, together, dtype=dtype)
    first = 0
    for weight in weights:
        # From one panel's border to the next: a weight may begin and end within a panel.
        start = 0
        while start < len(weight):
            panel, place = divmod(first + start, PANEL)
            whole = (len(weight) - start) // PANEL if place == 0 else 0
            if whole:
                part = weight[start : start + whole * PANEL].view(whole, PANEL, -1, together)
                packed[panel : panel + whole] = part.transpose(1, 2)
                start += whole * PANEL
            else:
                count = min(PANEL - place, len(weight) - start)
                part = weight[start : start + count].view(count, -1, together)
                packed[panel, :, place : place + count] = part.transpose(0, 1)
                start += count
        first += len(weight)
    return packed


def joint_bias(linears: Sequence[nn.Linear]) -> torch.Tensor | None:
    """The biases side by side in float32, zeros where there is none; None if no linear has one."""
    if all(linear.bias is None for linear in linears):
        return None
    parts = [torch.zeros(linear.out_features) if linear.bias is None else linear.bias.float() for linear in linears]
    return torch.cat([part.to(linears[0].weight.device) for part in parts])


def whole_panels(values: torch.Tensor) -> torch.Tensor:
    """float32, filled up with zeros to whole panels."""
    return functional.pad(values.float(), (0, -len(values) % PANEL))
