"""From a model directory to a model that runs over the paged cache, and gives what transformers gives."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..errors import InvalidArgument
from .cache_size import make_cache
from .linear import pack_linears
from .model import PagedModel, load
from .quantization import kept_file, pack_int8, quantize
from .selfcheck import check, probe_tokens, reference_logits


def load_checked(
    model_dir: str,
    base_digest: str,
    *,
    dtype: str,
    device: torch.device,
    quantization: str,
    quantized_dir: str | None,
    max_model_len: int | None,
    kv_cache_tokens: int | None,
    max_batch: int,
    block_size: int,
) -> tuple[PreTrainedModel, PagedModel]:
    """The model as transformers loaded it, changed in place, and what runs it. Settings are those of `TorchEngine`.

    Raises:
        InvalidArgument: the cache has no room for the settings.
        UnsupportedModel: the architecture is not supported, or the self-check found other logits.
    """
    model = load(model_dir, dtype, device)
    config = model.config
    probe = probe_tokens(config.vocab_size)
    if quantization != "none":
        kept = None if quantized_dir is None else kept_file(Path(quantized_dir), base_digest, model.dtype)
        quantize(model, quantization, kept)
    expected = reference_logits(model, probe)
    cache = make_cache(config, model.dtype, device, max_model_len, kv_cache_tokens, max_batch, block_size)
    paged = PagedModel(model, cache, pack_linears if quantization == "none" else pack_int8)
    check(paged, probe, expected, quantization)
    return model, paged


def device_of(name: str) -> torch.device:
    """The device of that name, if it is there; `auto` is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidArgument(f"{name!r} is not a device; auto, cpu or cuda is right", field="device") from error
    if device.type not in ("cpu", "cuda"):
        raise InvalidArgument(f"{name!r} is not supported; auto, cpu or cuda is right", field="device")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidArgument("this machine has no CUDA device that torch can use", field="device")
    return device
