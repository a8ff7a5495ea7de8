"""A model's decoder layers as a list of operations for the native kernels: read from its modules, once at start."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from .adaptable import LinearGroup
from .kernels import ACTIVATIONS, ATTENTION, GATE, HEADS, NORM, OPERATION, Kernels, kernels_for
from .kv_cache import KVCache

_NORMS = ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "MistralRMSNorm", "Phi3RMSNorm")
_OFFSET_NORMS = ("Gemma2RMSNorm", "Gemma3RMSNorm")  # the weight is stored less one
_ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh"}
_HEAD_DIM_MULTIPLE = 16  # of kernels/attention.h
_FEATURES_MULTIPLE = 2  # of kernels/linear.h

# Buffers, a row for each token of a step. The first is the model's own: the sum that layers add to.
HIDDEN, NORMED, WIDE, ATTENDED, PROJECTED, GATED = range(6)


def native_kernels(model: PreTrainedModel) -> Kernels | None:
    """What computes the layers of this (unchanged) model natively; None where torch must."""
    kernels = kernels_for(model.dtype, model.device)
    if kernels is None:
        return None
    modules, layers = list(model.modules()), model.model.layers
    norms = [type(module).__name__ for module in modules if type(module).__name__.endswith("Norm")]
    known = (
        all(linear.in_features % _FEATURES_MULTIPLE == 0 for linear in modules if isinstance(linear, nn.Linear))
        and all(name in _NORMS + _OFFSET_NORMS for name in norms)
        and all(layer.self_attn.head_dim % _HEAD_DIM_MULTIPLE == 0 for layer in layers)
        and all(type(_activation(layer.mlp)).__name__ in _ACTIVATIONS for layer in layers)
    )
    return kernels if known else None


@dataclass(frozen=True)
class Plan:
    """`operations` is OPERATION `[count]`; the input of the first is the model's embedding in HIDDEN, and the output of
    the last, normed, is in NORMED."""

    operations: np.ndarray
    widths: list[int]  # of the buffers, in elements
    quantized_bytes: int  # of a row's integer activations, at most
    rotary_kinds: list[tuple[str, ...]]  # last arguments of the model's rotary embedding, for each table
    held: list[Any]  # what the addresses in the operations belong to


def make_plan(model: PreTrainedModel, cache: KVCache) -> Plan:
    """The plan of a model whose linears were replaced (`adaptable.py`) and whose kernels are `native_kernels`."""
    return _Planner(model, cache).plan()


@dataclass
class _Planner:
    model: PreTrainedModel
    cache: KVCache
    held: list[Any] = field(default_factory=list)
    quantized_bytes: int = 0

    def plan(self) -> Plan:
        layers = self.model.model.layers
        first = layers[0]
        operations = [self._norm(first.input_layernorm, HIDDEN)]
        for index, layer in enumerate(layers):
            following = layers[index + 1].input_layernorm if index + 1 < len(layers) else self.model.model.norm
            operations += self._layer(layer, index, following)
        qkv, o, gate_up, down = (group.base for group in _groups(first))
        wide = max(qkv.out_features, gate_up.out_features)
        widths = [qkv.in_features, qkv.in_features, wide, o.in_features, o.out_features, down.in_features]
        return Plan(np.array(operations, OPERATION), widths, self.quantized_bytes, self._rotary_kinds(), self.held)

    def _layer(self, layer: nn.Module, index: int, following: nn.Module) -> list[np.void]:
        """From the normed input of a layer to that of what follows it."""
        qkv, o, gate_up, down = _groups(layer)
        operations = [
            self._linear(qkv, NORMED, WIDE),
            self._heads(layer.self_attn, index),
            self._attention(layer.self_attn, index),
            self._linear(o, ATTENDED, PROJECTED),
        ]
        before_mlp = layer.post_attention_layernorm
        if hasattr(layer, "pre_feedforward_layernorm"):  # Gemma norms what is added, too
            operations.append(self._norm(layer.post_attention_layernorm, PROJECTED, PROJECTED))
            before_mlp = layer.pre_feedforward_layernorm
        operations += [
            self._norm(before_mlp, PROJECTED, residual=HIDDEN),
            self._linear(gate_up, NORMED, WIDE),
            self._gate(layer.mlp, down.base.in_features),
            self._linear(down, GATED, PROJECTED),
        ]
        if hasattr(layer, "post_feedforward_layernorm"):
            operations.append(self._norm(layer.post_feedforward_layernorm, PROJECTED, PROJECTED))
        operations.append(self._norm(following, PROJECTED, residual=HIDDEN))
        return operations

    def _norm(self, norm: nn.Module, source: int, output: int = NORMED, residual: int = -1) -> np.void:
        operation = _operation(NORM, source, output)
        operation["residual"] = residual
        operation["weight"], operation["features"] = self._address(norm.weight), norm.weight.numel()
        operation["epsilon"], operation["offset"] = _norm_settings(norm)
        return operation

    def _linear(self, group: LinearGroup, source: int, output: int) -> np.void:
        self.held.append(group.base)
        self.quantized_bytes = max(self.quantized_bytes, group.base.quantized_bytes)
        operation = group.base.operation.copy()
        operation["input"], operation["output"], operation["group"] = source, output, group.index
        return operation

    def _heads(self, attention: nn.Module, index: int) -> np.void:
        operation = self._of_heads(HEADS, WIDE, attention, index)
        operation["rotation"] = self._rotary_kinds().index(self._rotary_kind(attention))
        if hasattr(attention, "q_norm"):
            operation["weight"] = self._address(attention.q_norm.weight)
            operation["key_weight"] = self._address(attention.k_norm.weight)
            operation["epsilon"], operation["offset"] = _norm_settings(attention.q_norm)
        return operation

    def _attention(self, attention: nn.Module, index: int) -> np.void:
        operation = self._of_heads(ATTENTION, ATTENDED, attention, index)
        config = self.model.config
        window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
        softcap = config.attn_logit_softcapping if config.model_type == "gemma2" else None
        operation["window"], operation["softcap"] = window or 0, softcap or 0.0
        operation["scaling"] = attention.scaling
        return operation

    def _of_heads(self, kind: int, output: int, attention: nn.Module, index: int) -> np.void:
        operation = _operation(kind, WIDE, output)
        operation["keys"], operation["values"] = self.cache.layer_addresses[index]
        operation["heads"] = self.model.config.num_attention_heads
        operation["kv_heads"] = self.model.config.num_key_value_heads
        operation["head_dim"] = attention.head_dim
        return operation

    def _gate(self, mlp: nn.Module, features: int) -> np.void:
        operation = _operation(GATE, WIDE, GATED)
        operation["activation"] = ACTIVATIONS[_ACTIVATIONS[type(_activation(mlp)).__name__]]
        operation["features"] = features
        return operation

    def _address(self, weight: torch.Tensor) -> int:
        self.held.append(weight)
        return weight.data_ptr()

    def _rotary_kinds(self) -> list[tuple[str, ...]]:
        return list(dict.fromkeys(self._rotary_kind(layer.self_attn) for layer in self.model.model.layers))

    def _rotary_kind(self, attention: nn.Module) -> tuple[str, ...]:
        """Gemma 3 has a table for each type of layer; elsewhere one serves all."""
        return (attention.layer_type,) if hasattr(self.model.model.rotary_emb, "layer_types") else ()


def _operation(kind: int, source: int, output: int) -> np.void:
    operation = np.zeros((), OPERATION)
    operation["kind"], operation["input"], operation["output"] = kind, source, output
    return operation


def _groups(layer: nn.Module) -> list[LinearGroup]:
    """Of q, k and v, of o, of gate and up, of down."""
    attention, mlp = layer.self_attn, layer.mlp
    qkv = attention.qkv_proj if hasattr(attention, "qkv_proj") else attention.q_proj
    gate_up = mlp.gate_up_proj if hasattr(mlp, "gate_up_proj") else mlp.gate_proj
    return [linear.group for linear in (qkv, attention.o_proj, gate_up, mlp.down_proj)]


def _activation(mlp: nn.Module) -> nn.Module:
    return mlp.activation_fn if hasattr(mlp, "activation_fn") else mlp.act_fn


def _norm_settings(norm: nn.Module) -> tuple[float, float]:
    """Epsilon, and what is added to the weight."""
    return (norm.eps, 1.0) if type(norm).__name__ in _OFFSET_NORMS else (norm.variance_epsilon, 0.0)
