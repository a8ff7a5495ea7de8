"""transformers alone: `generate` on the padded batch, or its own continuous batching. Options: `continuous`.

What was chosen, and why:
- SDPA attention, the checkpoint's dtype, all cores; torch.compile is not used, since `generate` compiles for GPUs only.
- All prompts of a job have one length, so `generate` pads nothing.
- Continuous batching: one manager lives as long as the worker (no start-up is measured), the cache is sized for the
  work, the block sharing that would reuse prefixes is off. It can't mix adapters: its inputs name none.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
import transformers
from protocol import Answer, Job, Settings, serve
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

PAGE_TOKENS = 32


def start(settings: Settings, cleanup: ExitStack) -> tuple[Answer, dict[str, Any]]:
    torch.set_num_threads(settings.threads)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype="auto", attn_implementation="sdpa")
    answer = _continuous(model, settings, cleanup) if settings.options["continuous"] else _static(model)
    return answer, {"transformers": transformers.__version__, "torch": torch.__version__}


def _static(model: torch.nn.Module) -> Answer:
    def answer(job: Job) -> list[list[int]]:
        prompts = torch.tensor(job.prompts)
        with torch.inference_mode():
            output = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=greedy(job))
        return output[:, prompts.shape[1] :].tolist()

    return answer


def _continuous(model: torch.nn.Module, settings: Settings, cleanup: ExitStack) -> Answer:
    pages = settings.batch * (-(-settings.tokens // PAGE_TOKENS) + 1)
    config = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS,
        num_blocks=pages,
        max_batch_tokens=settings.batch * settings.tokens,
        max_requests_per_batch=settings.batch,
        allow_block_sharing=False,
    )
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1)
    manager = model.init_continuous_batching(generation, config)
    manager.start()
    cleanup.callback(manager.stop)

    def answer(job: Job) -> list[list[int]]:
        ids = manager.add_requests(job.prompts, max_new_tokens=job.new_tokens)
        done: dict[str, list[int]] = {}
        while len(done) < len(ids):
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("the generation thread has ended")
            elif result.error:
                raise RuntimeError(result.error)
            elif result.is_finished():
                done[result.request_id] = list(result.generated_tokens)
        return [done[request_id] for request_id in ids]

    return answer


def greedy(job: Job) -> GenerationConfig:
    """Exactly `new_tokens` greedy tokens for each request."""
    return GenerationConfig(
        do_sample=False, max_new_tokens=job.new_tokens, min_new_tokens=job.new_tokens, eos_token_id=None, pad_token_id=0
    )


if __name__ == "__main__":
    serve(start)
