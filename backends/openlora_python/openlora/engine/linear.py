"""The base model's linears as the engine runs them: those that share an input as one, weights laid out for the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

from .kernels import kernels_for
from .kernels.pages import streamed

Pack = Callable[[Sequence[nn.Linear]], nn.Module]
"""Makes one module of linears that take the same input: `[tokens, in_features]` to all their outputs side by side."""

PANEL = 32  # outputs; see kernels/linear.h
NO_ADAPTERS = (None, 0, 0, 0, None)  # segments, their number, group, members of a group, scratch


class PackedLinear(nn.Module):
    """y = xWᵀ + b for several linears at once, by the native kernel where there is one, else by torch.

    At 16 rows, in bfloat16, the kernel takes 0.6 of the time of oneDNN with a blocked weight, and 0.4 of that with a
    plain one; at 512 rows they are equal.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        weights = [linear.weight for linear in linears]
        self.in_features = weights[0].shape[1]
        self.out_features = sum(len(weight) for weight in weights)
        kernels = kernels_for(weights[0].dtype, weights[0].device)
        usable = kernels is not None and self.in_features % 2 == 0
        self.native = usable
        self._kernels = kernels
        self.weight = nn.Parameter(pack_panels(weights) if usable else torch.cat(weights), requires_grad=False)
        self.bias = _bias(linears, usable)
        self._weight = self.weight.data_ptr()
        self._bias = None if self.bias is None else self.bias.data_ptr()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[…, in_features]` to `[…, out_features]`."""
        if not self.native:
            return functional.linear(inputs, self.weight, self.bias)
        return self.multiply(inputs, *NO_ADAPTERS)

    def multiply(self, inputs: torch.Tensor, *adapters: int | None) -> torch.Tensor:
        """The native form, `adapters` being the kernel's arguments from the segments to the scratch memory."""
        inputs = inputs.contiguous()
        outputs = torch.empty((*inputs.shape[:-1], self.out_features), dtype=inputs.dtype)
        self._kernels.adapted_linear(
            inputs.data_ptr(), self.in_features, self._weight, self._bias, outputs.data_ptr(), self.out_features,
            inputs.numel() // self.in_features, self.in_features, self.out_features, *adapters, self._kernels.threads,
        )  # fmt: skip
        return outputs


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


def _bias(linears: Sequence[nn.Linear], native: bool) -> nn.Parameter | None:
    """The biases side by side; the kernel wants whole panels of floats."""
    if all(linear.bias is None for linear in linears):
        return None
    parts = [linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias for linear in linears]
    bias = torch.cat(parts)
    if native:
        bias = functional.pad(bias.float(), (0, -len(bias) % PANEL))
    return nn.Parameter(bias, requires_grad=False)
