"""Puts native kernels in the place of what a model computes between its matrix products.

Norms, gated MLPs and rotary embeddings are a dozen small operations each in the model's own code; at 16 rows their
dispatch takes longer than their arithmetic. What is not known here stays as the model has it, and the self-check at
start compares the whole with the unchanged model.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from .adaptable import AdaptableLinear, LinearGroup
from .kernels import Kernels

_NORMS = ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "MistralRMSNorm", "Phi3RMSNorm")
_OFFSET_NORMS = ("Gemma2RMSNorm", "Gemma3RMSNorm")  # the weight is stored less one
_SILU = ("SiLU", "SiLUActivation")
_ROTARY = "apply_rotary_pos_emb"


def fuse(model: nn.Module, kernels: Kernels) -> None:
    """Change `model` in place, after its linears were replaced."""
    rotations: dict[type, Callable[..., Any]] = {}
    for name, module in list(model.named_modules()):
        kind = type(module).__name__
        if kind in _NORMS:
            model.set_submodule(name, FusedNorm(module.weight, module.variance_epsilon, 0.0, kernels))
        elif kind in _OFFSET_NORMS:
            model.set_submodule(name, FusedNorm(module.weight, module.eps, 1.0, kernels))
        elif hasattr(module, "gate_proj") and type(module.act_fn).__name__ in _SILU:
            model.set_submodule(name, FusedMLP(module.gate_proj.group, module.down_proj, kernels))
        elif _ROTARY in getattr(type(module).forward, "__code__", fuse.__code__).co_names:
            forward = rotations.setdefault(type(module), _with_rotation(type(module).forward, kernels))
            module.forward = MethodType(forward, module)


class FusedNorm(nn.Module):
    """RMS norm over the last dimension, in one pass."""

    def __init__(self, weight: nn.Parameter, epsilon: float, offset: float, kernels: Kernels) -> None:
        super().__init__()
        self.weight = weight
        self.epsilon = epsilon
        self.offset = offset
        self._norm, self._threads = kernels.rms_norm, kernels.threads

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        features = inputs.shape[-1]
        rows = inputs.reshape(-1, features)
        outputs = torch.empty(inputs.shape, dtype=inputs.dtype)
        self._norm(
            rows.data_ptr(), rows.stride(0), self.weight.data_ptr(), outputs.data_ptr(), len(rows), features,
            self.epsilon, self.offset, self._threads,
        )  # fmt: skip
        return outputs


class FusedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)), gate and up being one product."""

    def __init__(self, gate_up: LinearGroup, down_proj: AdaptableLinear, kernels: Kernels) -> None:
        super().__init__()
        self.gate_up, self.down_proj = gate_up, down_proj
        self._multiply, self._threads = kernels.silu_multiply, kernels.threads

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        gate_up = self.gate_up.compute(inputs)  # [1, tokens, 2 · intermediate]
        tokens, width = gate_up.shape[-2:]
        outputs = torch.empty((1, tokens, width // 2), dtype=gate_up.dtype)
        gate = gate_up.data_ptr()
        up = gate + width // 2 * gate_up.element_size()
        self._multiply(gate, width, up, width, outputs.data_ptr(), tokens, width // 2, self._threads)
        return self.down_proj.forward(outputs)


def _with_rotation(forward: FunctionType, kernels: Kernels) -> FunctionType:
    """The same `forward` with the native rotation under the name that it calls."""
    original = forward.__globals__[_ROTARY]

    def rotate(tensor: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        _, heads, tokens, head_dim = tensor.shape
        rotated = torch.empty(1, tokens, heads, head_dim, dtype=tensor.dtype)
        kernels.rotate(
            tensor.data_ptr(), tensor.stride(2), tensor.stride(1), cos.data_ptr(), sin.data_ptr(), rotated.data_ptr(),
            tokens, heads, head_dim, kernels.threads,
        )  # fmt: skip
        return rotated.transpose(1, 2)

    def apply_rotary_pos_emb(
        query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if cos.shape[-1] != query.shape[-1] or not (cos.is_contiguous() and sin.is_contiguous()):
            return original(query, key, cos, sin)  # only a part of each head turns
        return rotate(query, cos, sin), rotate(key, cos, sin)

    names = {**forward.__globals__, _ROTARY: apply_rotary_pos_emb}
    rebound = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    rebound.__kwdefaults__ = forward.__kwdefaults__
    return rebound
