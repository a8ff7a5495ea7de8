"""PEFT over transformers' `generate`: each row of the batch names its adapter (`adapter_names`), as PEFT mixes them.

What was chosen, and why:
- Adapters stay in their 16 bit (`autocast_adapter_dtype=False`; PEFT would make them fp32, and slower).
- A batch of one adapter goes through `set_adapter`, and a batch without any through `disable_adapter`: cheaper than
  naming the same adapter, or the base, for each row.
- Otherwise as in `worker_transformers.py`.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from typing import Any

import peft
import torch
from peft import PeftModel
from protocol import Answer, Job, Settings, serve
from transformers import AutoModelForCausalLM
from worker_transformers import greedy


def start(settings: Settings, cleanup: ExitStack) -> tuple[Answer, dict[str, Any]]:
    torch.set_num_threads(settings.threads)
    base = AutoModelForCausalLM.from_pretrained(settings.model, dtype="auto", attn_implementation="sdpa")
    names = {path: f"adapter{number}" for number, path in enumerate(settings.adapters)}
    first, *others = settings.adapters
    model = PeftModel.from_pretrained(base, first, adapter_name=names[first], autocast_adapter_dtype=False)
    for path in others:
        model.load_adapter(path, adapter_name=names[path], autocast_adapter_dtype=False)
    model.eval()

    def answer(job: Job) -> list[list[int]]:
        prompts = torch.tensor(job.prompts)
        distinct = set(job.adapters)
        rows: dict[str, Any] = {}
        if len(distinct) > 1:
            rows["adapter_names"] = ["__base__" if path is None else names[path] for path in job.adapters]
        elif distinct != {None}:
            model.set_adapter(names[job.adapters[0]])
        with torch.inference_mode(), model.disable_adapter() if distinct == {None} else nullcontext():
            output = model.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts), generation_config=greedy(job), **rows
            )
        return output[:, prompts.shape[1] :].tolist()

    return answer, {"peft": peft.__version__, "torch": torch.__version__}


if __name__ == "__main__":
    serve(start)
