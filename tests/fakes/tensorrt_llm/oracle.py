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


class AdapterRefused(Exception):
    """As the C++ side says it."""


class AdapterMemory:
    """A base model, and every adapter that was ever used."""

    def __init__(self, model_dir: str, lora_config: Any) -> None:
        self.base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, local_files_only=True).eval()
        self.lora_config = lora_config
        self.peft: PeftModel | None = None
        self.paths: dict[int, str] = {}  # of the first use; a later path under the same id is not looked at

    @property
    def vocab_size(self) -> int:
        return self.base.config.vocab_size

    @torch.no_grad()
    def logits(self, token_ids: list[int], adapter: Any) -> torch.Tensor:
        ids = torch.tensor([token_ids])
        if adapter is None or self.lora_config is None:  # without a config the adapter is ignored, in silence
            if self.peft is None:
                return self.base(input_ids=ids, use_cache=False).logits[0, -1]
            with self.peft.disable_adapter():
                return self.peft(input_ids=ids, use_cache=False).logits[0, -1]
        self._load(adapter)
        self.peft.set_adapter(str(adapter.lora_int_id))
        return self.peft(input_ids=ids, use_cache=False).logits[0, -1]

    def _load(self, adapter: Any) -> None:
        if adapter.lora_int_id in self.paths:
            return
        path, name = adapter.lora_path, str(adapter.lora_int_id)
        config = json.loads((Path(path) / "adapter_config.json").read_text())
        self._check_rank(path)
        if self.peft is None:
            self.peft = PeftModel.from_pretrained(self.base, path, adapter_name=name)
        else:
            self.peft.load_adapter(path, adapter_name=name)
        self.peft.eval()
        known = set(self._hf_names())
        for module_name, module in self.peft.named_modules():
            if isinstance(module, LoraLayer) and name in module.lora_A:
                if module_name.rpartition(".")[2] not in known:
                    warnings.warn(f"{module_name} is not in lora_target_modules and is skipped", stacklevel=2)
                    module.lora_B[name].weight.data.zero_()
                rank = module.lora_A[name].weight.shape[0]
                root = rank**0.5 if config.get("use_rslora") else rank
                module.scaling[name] = config["lora_alpha"] / root  # no word of alpha_pattern
        self.paths[adapter.lora_int_id] = path

    def _hf_names(self) -> list[str]:
        mapping = {
            "attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_dense": "o_proj", "attn_qkv": "qkv_proj",
            "mlp_h_to_4h": "gate_proj", "mlp_gate": "up_proj", "mlp_4h_to_h": "down_proj",
            "mlp_gate_up": "gate_up_proj",
            **self.lora_config.trtllm_modules_to_hf_modules,
        }  # fmt: skip
        return [mapping[name] for name in self.lora_config.lora_target_modules]

    def _check_rank(self, path: str) -> None:
        with safe_open(Path(path) / "adapter_model.safetensors", "pt") as file:
            ranks = [file.get_slice(key).get_shape()[0] for key in file.keys() if ".lora_A." in key]  # noqa: SIM118
        limit = self.lora_config.max_lora_rank
        if max(ranks) > limit:
            raise AdapterRefused(
                f"Invalid low_rank ({max(ranks)}). low_rank must be smaller than mMaxLowRank ({limit})"
            )
