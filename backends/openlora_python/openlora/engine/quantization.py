"""INT8 weights for the base model's linears, one scale an output channel; adapters beside them keep their 16 bits.

torchao makes the integers. On the CPU its own linear is slower than bfloat16 in eager mode, and compiled it would be
compiled anew at every start, so kernels/int8_linear.h multiplies there; torchao's linear is what the check at start
compares it with, and what runs on a GPU and where there is no kernel.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from ..errors import UnsupportedModel
from .kernels import Kernels, kernels_for
from .kernels.pages import streamed
from .linear import PANEL, NativeLinear, joint_bias, whole_panels

MODES = ("none", "int8", "int8-weight-only")
"""`int8` makes activations int8 too, one scale a token (dynamic); `int8-weight-only` leaves them 16 bits."""

_GROUP = 4  # inputs; see kernels/int8_linear.h
_MOST_FEATURES = (1 << 17) - 1  # 128 · 128 · features must fit a 32-bit sum

_LOG = logging.getLogger(__name__)


def quantize(model: nn.Module, mode: str, kept: Path | None = None) -> None:
    """Give every linear of `model`, the output layer included, a torchao `Int8Tensor` for its weight.

    `mode` is `int8` or `int8-weight-only`. `kept` is a file of these integers, which both share: read where it exists,
    else written for the next start.

    Raises:
        UnsupportedModel: a linear has too many inputs.
    """
    began = time.perf_counter()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, linear in linears.items():
        if linear.in_features > _MOST_FEATURES:
            raise UnsupportedModel(f"{name} has {linear.in_features} inputs, int8 takes at most {_MOST_FEATURES}")
    _warn_where_slow(linears)
    read = kept is not None and kept.is_file() and _read(linears, mode, kept)
    if not read:
        _quantize_with_torchao(linears, mode)
        if kept is not None:
            _write(linears, kept)
    source = f"read from {kept}" if read else "made by torchao"
    _LOG.info("%d linears in %s: %s in %.1f s", len(linears), mode, source, time.perf_counter() - began)


def kept_file(directory: Path, base_digest: str, dtype: torch.dtype) -> Path:
    """Where `directory` keeps the int8 weights of a base model."""
    made_by = f"torchao-{version('torchao')}"
    return directory / f"{base_digest}-{str(dtype).removeprefix('torch.')}-{made_by}.safetensors"


def pack_int8(linears: Sequence[nn.Linear], kernels: Kernels | None) -> nn.Module:
    """`linear.Pack` for linears that `quantize` has seen."""
    return TorchaoLinear(linears) if kernels is None else Int8Linear(linears, kernels)


class Int8Linear(NativeLinear):
    """Integer weights, and activations that become integers; the formula is in kernels/int8_linear.h."""

    def __init__(self, linears: Sequence[nn.Linear], kernels: Kernels) -> None:
        super().__init__(linears, kernels, pack_bytes(torch.cat([linear.weight.qdata for linear in linears])))
        parts = 2 if linears[0].weight.act_quant_kwargs is None else 1
        if self.bias is None:
            self.bias = whole_panels(torch.zeros(self.out_features))
        self.register_buffer("scales", whole_panels(torch.cat([linear.weight.scale for linear in linears]).flatten()))
        self.operation["parts"] = parts
        self.operation["bias"], self.operation["scales"] = self.bias.data_ptr(), self.scales.data_ptr()
        # Rows of bytes, where the sum of each starts, and a scale for all of them.
        self.quantized_bytes = parts * (self.in_features + -self.in_features % _GROUP + 4) + 4


class TorchaoLinear(nn.Module):
    """y = xWᵀ + b for several linears at once, as torchao computes it on this device."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        weights = [linear.weight for linear in linears]
        joint = _int8_tensor(
            torch.cat([weight.qdata for weight in weights]),
            torch.cat([weight.scale for weight in weights]),
            weights[0].dtype,
            "int8-weight-only" if weights[0].act_quant_kwargs is None else "int8",
        )
        self.out_features, self.in_features = joint.shape
        self.weight = nn.Parameter(joint, requires_grad=False)
        bias = joint_bias(linears)
        self.register_buffer("bias", None if bias is None else bias.to(weights[0].dtype))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return functional.linear(inputs, self.weight, self.bias)


def pack_bytes(weight: torch.Tensor) -> torch.Tensor:
    """int8 `[channels, features]` as kernels/int8_linear.h reads it, plus 128.

    uint8 `[channels / 32, features / 4, 32, 4]`, both filled up with zeros.
    """
    channels, features = weight.shape
    whole = functional.pad(weight, (0, -features % _GROUP, 0, -channels % PANEL))
    panels = whole.view(len(whole) // PANEL, PANEL, -1, _GROUP).transpose(1, 2)
    packed = streamed(*panels.shape, dtype=torch.uint8)
    packed.view(torch.int8).copy_(panels)
    return packed.bitwise_xor_(128)


def _warn_where_slow(linears: Mapping[str, nn.Linear]) -> None:
    weight = next(iter(linears.values())).weight
    if weight.device.type != "cpu":
        return
    if kernels_for(weight.dtype, weight.device) is None:
        _LOG.warning("int8 has no native kernel here (%s): it runs through torchao, slower than none", weight.dtype)
    elif not torch.cpu.get_capabilities().get("avx512_vnni"):
        _LOG.warning("int8 has no instructions on this CPU (AVX-512 VNNI): it saves memory, but is slower than none")


def _quantize_with_torchao(linears: Mapping[str, nn.Linear], mode: str) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    config = {"int8": Int8DynamicActivationInt8WeightConfig, "int8-weight-only": Int8WeightOnlyConfig}[mode]
    for linear in linears.values():
        quantize_(linear, config(set_inductor_config=False))


def _int8_tensor(qdata: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, mode: str) -> torch.Tensor:
    """What torchao makes of a weight, from its parts: `[out_features, in_features]` and `[out_features, 1]`."""
    from torchao.quantization.granularity import PerRow
    from torchao.quantization.quantize_.workflows import Int8Tensor, QuantizeTensorToInt8Kwargs

    inputs = QuantizeTensorToInt8Kwargs(granularity=PerRow()) if mode == "int8" else None
    return Int8Tensor(qdata, scale, [1, qdata.shape[1]], dtype, act_quant_kwargs=inputs)


def _read(linears: Mapping[str, nn.Linear], mode: str, kept: Path) -> bool:
    """Whether the weights were all there; if not, nothing is changed."""
    weights = {}
    try:
        with safe_open(kept, "pt") as file:
            for name, linear in linears.items():
                weight = linear.weight
                # Copied: a mapped file that someone rewrites is a SIGBUS for every request.
                qdata = file.get_tensor(f"{name}.qdata").clone().to(weight.device)
                scale = file.get_tensor(f"{name}.scale").clone().to(weight.device)
                if qdata.shape != weight.shape:
                    raise SafetensorError(f"{name} has shape {tuple(qdata.shape)}, not {tuple(weight.shape)}")
                weights[name] = _int8_tensor(qdata, scale, weight.dtype, mode)
    except SafetensorError as error:
        _LOG.warning("%s can't be used, the weights are quantized anew: %s", kept, error)
        return False
    for name, linear in linears.items():
        linear.weight = nn.Parameter(weights[name], requires_grad=False)
    return True


def _write(linears: Mapping[str, nn.Linear], kept: Path) -> None:
    tensors = {}
    for name, linear in linears.items():
        tensors[f"{name}.qdata"], tensors[f"{name}.scale"] = linear.weight.qdata, linear.weight.scale
    kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = kept.with_name(f".{kept.name}.{os.getpid()}")
    try:
        save_file(tensors, fresh)
        fresh.replace(kept)
    finally:
        fresh.unlink(missing_ok=True)
