"""Puts packed linears, and the adapters of the running step beside them, in the place of a model's own linears.

q, k and v of an attention take the same input, as do gate and up of an MLP: each such group is one base product and one
LoRA call. The model still calls its linears one by one; the first call computes for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .adapter_block import Member
from .kernels import Kernels
from .linear import Pack
from .lora import NativeLora, TorchLora, make_lora

_SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # linears of one module with the same input


class LinearGroup:
    """Linears that share their input, computed together with their adapters.

    Where native kernels compute whole layers, this only says where the base's weights and the adapters' places are.
    """

    def __init__(self, index: int, base: nn.Module, members: Sequence[Member], lora: TorchLora | NativeLora) -> None:
        self.index = index
        self.base = base
        self.members = members
        self.lora = lora
        self._inputs: torch.Tensor | None = None
        self._outputs: torch.Tensor | None = None
        self._left = 0

    def compute(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[1, tokens, in_features]` to the outputs of all members, `[1, tokens, Σ out_features]`."""
        inputs = inputs.contiguous()
        outputs = self.base.forward(inputs)
        self.lora.add(self.index, inputs, outputs)
        return outputs

    def output(self, member: Member, inputs: torch.Tensor) -> torch.Tensor:
        """One member's output; those of the others are kept until they have been asked for with the same tensor."""
        if len(self.members) == 1:
            return self.compute(inputs)
        if self._inputs is not inputs:
            self._inputs, self._outputs, self._left = inputs, self.compute(inputs), len(self.members)
        outputs = self._outputs[..., member.column : member.column + member.columns]
        self._left -= 1
        if self._left == 0:
            self._inputs = self._outputs = None
        return outputs


class AdaptableLinear(nn.Module):
    """What the model finds in the place of one of its linears."""

    def __init__(self, linear: nn.Linear, member: Member, group: LinearGroup) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.member = member
        self.group = group

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[1, tokens, in_features]` to `[1, tokens, out_features]`."""
        return self.group.output(self.member, inputs)


def make_adaptable(
    model: nn.Module, pack: Pack, kernels: Kernels | None
) -> tuple[Mapping[str, AdaptableLinear], TorchLora | NativeLora]:
    """Replace every linear of `model`; its output layer is packed too, but takes no adapters.

    Returns the adaptable linears by their name in the model, and what computes their adapters.
    """
    output_layer = model.get_output_embeddings()
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not output_layer
    }
    groups = []
    for names in _groups(linears):
        starts = [sum(linears[name].out_features for name in names[:place]) for place in range(len(names))]
        groups.append(
            [Member(name, start, linears[name].out_features) for name, start in zip(names, starts, strict=True)]
        )
    lora = make_lora(groups, kernels)
    adaptable: dict[str, AdaptableLinear] = {}
    for index, members in enumerate(groups):
        # One group after the other, so that only one has its weights twice.
        group = LinearGroup(index, pack([linears[member.name] for member in members], kernels), members, lora)
        for member in members:
            adaptable[member.name] = AdaptableLinear(linears.pop(member.name), member, group)
            model.set_submodule(member.name, adaptable[member.name])
    model.set_output_embeddings(pack([output_layer], kernels))
    return adaptable, lora


def _groups(linears: Mapping[str, nn.Linear]) -> list[list[str]]:
    """The names of `linears`, those that share an input together."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for name in linears:
        parent, _, leaf = name.rpartition(".")
        first = next((names[0] for names in _SHARING if leaf in names), leaf)
        grouped.setdefault((parent, first), []).append(name)
    return list(grouped.values())
