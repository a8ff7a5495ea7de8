"""Next-token logits from transformers and PEFT, with adapters kept by id for ever."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from transformers import AutoModelForCausalLM

MODULES = {
    "attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_dense": "o_proj", "attn_qkv": "qkv_proj",
    "mlp_h_to_4h": "gate_proj", "mlp_gate": "up_proj", "mlp_4h_to_h": "down_proj", "mlp_gate_up": "gate_up_proj",
}  # fmt: skip
ATTENTION = ("attn_q", "attn_k", "attn_v")


class AdapterRefused(Exception):
    """As the C++ side says it."""


class AdapterMemory:
    """A base model, and every adapter that was ever used."""

    def __init__(self, model_dir: str, lora_config: Any) -> None:
        self.base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, local_files_only=True).eval()
        self.lora_config = lora_config
        self.peft: PeftModel | None = None
        self.paths: dict[int, str] = {}  # of the first use; a later path under the same id is not looked at
        self._whole: set[int] = set()  # of those, the ones whose weights are there

    @property
    def vocab_size(self) -> int:
        return self.base.config.vocab_size

    @torch.no_grad()
    def logits(self, token_ids: list[int], adapter: Any) -> torch.Tensor:
        ids = torch.tensor([token_ids])
        if adapter is not None and self.lora_config is not None:  # without a config it is ignored, in silence
            self._load(adapter)
        if self.peft is None:
            return self.base(input_ids=ids, use_cache=False).logits[0, -1]
        if adapter is None or adapter.lora_int_id not in self._whole:
            with self.peft.disable_adapter():
                return self.peft(input_ids=ids, use_cache=False).logits[0, -1]
        self.peft.set_adapter(str(adapter.lora_int_id))
        return self.peft(input_ids=ids, use_cache=False).logits[0, -1]

    def _load(self, adapter: Any) -> None:
        """Its id is known before its files are read: what fails there is loaded, and empty, for whoever asks again."""
        if adapter.lora_int_id in self.paths:
            return
        path, name = adapter.lora_path, str(adapter.lora_int_id)
        self.paths[adapter.lora_int_id] = path
        config = json.loads((Path(path) / "adapter_config.json").read_text())
        self._check_rank(path)
        leaves = self._leaves()
        targets = {leaves[target] for target in self.lora_config.lora_target_modules}
        for linear in _linears(path):
            assert linear in leaves.values(), f"{linear} is in no module map"
        if self.peft is None:
            self.peft = PeftModel.from_pretrained(self.base, path, adapter_name=name)
        else:
            self.peft.load_adapter(path, adapter_name=name)
        self.peft.eval()
        for module_name, module in self.peft.named_modules():
            if isinstance(module, LoraLayer) and name in module.lora_A:
                if module_name.rpartition(".")[2] not in targets:
                    warnings.warn(f"{module_name} is not in lora_target_modules and is skipped", stacklevel=2)
                    module.lora_B[name].weight.data.zero_()
                rank = module.lora_A[name].weight.shape[0]
                root = rank**0.5 if config.get("use_rslora") else rank
                module.scaling[name] = config["lora_alpha"] / root  # no word of alpha_pattern
        self._whole.add(adapter.lora_int_id)

    def _leaves(self) -> dict[str, str]:
        """Its names -> Hugging Face's. A map that is given is the whole map; all of q, k and v must be in it where one
        of them is a target, because the others are filled with zeros."""
        given = self.lora_config.trtllm_modules_to_hf_modules or MODULES
        targets = self.lora_config.lora_target_modules
        wanted = {*targets, *(ATTENTION if set(targets) & set(ATTENTION) else ())}
        for name in sorted(wanted):
            given[name]  # KeyError
        return given

    def _check_rank(self, path: str) -> None:
        with safe_open(Path(path) / "adapter_model.safetensors", "pt") as file:
            ranks = [file.get_slice(key).get_shape()[0] for key in file.keys() if ".lora_A." in key]  # noqa: SIM118
        limit = self.lora_config.max_lora_rank
        if max(ranks) > limit:
            raise AdapterRefused(
                f"Invalid low_rank ({max(ranks)}). low_rank must be smaller than mMaxLowRank ({limit})"
            )


def _linears(path: str) -> set[str]:
    """Last parts of the names of the linears that the adapter changes."""
    with safe_open(Path(path) / "adapter_model.safetensors", "pt") as file:
        return {key.split(".lora_")[0].rpartition(".")[2] for key in file.keys()}  # noqa: SIM118
