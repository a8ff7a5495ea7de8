"""A model whose decoder layers, and its last norm, are computed by one native call.

The model's own layers are dozens of small operations each: at 16 rows their dispatch, and waking the threads for each,
takes a third as long as the arithmetic. Embedding, rotary tables and output layer are the model's modules, called
directly; the self-check at start compares the whole with the unchanged model. A model with something that is not known
here runs through torch, as transformers has it.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from .attention import PagedStep
from .decoder_plan import HIDDEN, NORMED, make_plan
from .kernels import BUFFER, STEP, Kernels
from .kv_cache import KVCache
from .lora import NativeLora


class NativeModel:
    """A model from token ids to logits, after its linears were replaced; its own layers are not used again."""

    def __init__(self, model: PreTrainedModel, kernels: Kernels, cache: KVCache, lora: NativeLora) -> None:
        self._plan = make_plan(model, cache)
        self._kernels, self._lora, self._dtype = kernels, lora, model.dtype
        self._embed, self._rotary = model.model.embed_tokens, model.model.rotary_emb
        self._output_layer = model.get_output_embeddings()
        self._softcap = getattr(model.config, "final_logit_softcapping", None)
        self._buffers = np.zeros(len(self._plan.widths), BUFFER)
        self._buffers["stride"] = self._plan.widths
        self._memory: list[torch.Tensor] = []  # of the buffers
        self._rows = 0
        self._step = np.zeros(1, STEP)
        self._step["buffers"] = self._buffers.ctypes.data

    def forward(self, token_ids: torch.Tensor, paged: PagedStep, wanted: torch.Tensor) -> torch.Tensor:
        """Logits `[len(wanted), vocab]` of the wanted rows of `token_ids` `[tokens]`."""
        hidden = self._embed(token_ids)  # [tokens, hidden]; the layers add to it in place
        positions = paged.position_ids[None]
        tables = [self._rotary(hidden, positions, *kind) for kind in self._plan.rotary_kinds]
        self._make_room(len(token_ids))
        self._buffers["rows"][HIDDEN] = hidden.data_ptr()
        self._step["rows"] = len(token_ids)
        self._step["cos"][0, : len(tables)] = [cos.data_ptr() for cos, _ in tables]
        self._step["sin"][0, : len(tables)] = [sin.data_ptr() for _, sin in tables]
        self._plan.operations["rotated"] = tables[0][0].shape[-1]
        paged.describe(self._step)
        self._lora.describe(self._step)
        self._kernels.compute(self._plan.operations, self._step)
        logits = self._output_layer(self._memory[NORMED][wanted])
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    def _make_room(self, tokens: int) -> None:
        if tokens <= self._rows:
            return
        self._rows = tokens
        self._memory = [torch.empty(tokens, width, dtype=self._dtype) for width in self._plan.widths]
        self._quantized = torch.empty(tokens * self._plan.quantized_bytes, dtype=torch.uint8)
        self._buffers["rows"] = [memory.data_ptr() for memory in self._memory]
        self._step["quantized"] = self._quantized.data_ptr()
