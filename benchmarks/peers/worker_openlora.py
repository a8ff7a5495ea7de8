"""Our engine in process. Options: `quantization`, and `quantized_dir` where quantized weights are kept.

What was chosen: the engine's settings are those of a server with nothing set, but for the context (no longer than the
work needs, as for vLLM); OpenMP threads wait as their library likes, as transformers' and PEFT's do. All
adapters are resident before the first job.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from protocol import Answer, Job, Settings, serve

from openlora.bench.measure import BLOCK_SIZE, SHORTEST_CONTEXT
from openlora.bench.runner import Runner
from openlora.engine.torch_engine import TorchEngine


def start(settings: Settings, cleanup: ExitStack) -> tuple[Answer, dict[str, Any]]:
    torch.set_num_threads(settings.threads)
    began = time.perf_counter()
    engine = TorchEngine(
        settings.model,
        "0" * 64,  # names the base model in receipts; there are none here
        quantization=settings.options["quantization"],
        quantized_dir=settings.options.get("quantized_dir"),
        max_model_len=max(settings.tokens, SHORTEST_CONTEXT),
        block_size=BLOCK_SIZE,
        prefix_cache=False,  # as in the other systems; the prompts differ from run to run anyway
    )
    start_seconds = time.perf_counter() - began
    runner = Runner(engine, BLOCK_SIZE)
    cleanup.callback(runner.close)
    runner.load([Path(path) for path in settings.adapters])

    def answer(job: Job) -> list[list[int]]:
        adapters = [None if path is None else Path(path) for path in job.adapters]
        return [timing.token_ids for timing in runner.run(job.prompts, adapters, job.new_tokens).timings]

    return answer, {
        "version": engine.info.version,
        "threads": torch.get_num_threads(),
        "start_seconds": round(start_seconds, 2),
    }


if __name__ == "__main__":
    serve(start)
