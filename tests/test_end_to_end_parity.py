"""Greedy answers through Triton equal transformers and PEFT, with everything running at once in mixed batches."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from live_server import LiveServer
from parity import Adapters, Case, Oracle, assert_equal
from tiny_models import make_adapter, make_model, projections, save_word_tokenizer
from transformers import AutoTokenizer

from openlora_client import AsyncOpenLoRAClient

PROMPTS = 20
MAX_TOKENS = 40
CONCURRENCY = 32


async def ask_all(
    server: LiveServer, questions: Sequence[tuple[str, Adapters]], max_tokens: int, **options: object
) -> list[list[int]]:
    """Token ids of every answer, all asked at once over one channel, half of them streamed."""
    limit = asyncio.Semaphore(CONCURRENCY)
    async with AsyncOpenLoRAClient(server.grpc_url) as client:

        async def ask(number: int, prompt: str, adapters: Adapters) -> list[int]:
            call = {"adapters": list(adapters) or None, "max_tokens": max_tokens, "temperature": 0, **options}
            async with limit:
                if number % 2:
                    return list((await client.generate(prompt, **call)).token_ids)
                return [token async for chunk in client.stream(prompt, **call) for token in chunk.token_ids]

        return await asyncio.gather(*(ask(number, *question) for number, question in enumerate(questions)))


def shuffled(questions: Sequence[tuple[str, Adapters]]) -> list[tuple[str, Adapters]]:
    """Neighbours in a batch should differ: take every seventh, round and round."""
    return [question for start in range(7) for question in questions[start::7]]


async def test_demo_answers_equal_peft(
    server: LiveServer, demo: Path, demo_adapters: list[str], prompts: list[str]
) -> None:
    pairs = list(itertools.combinations(demo_adapters, 2))[:3]
    ensembles: list[Adapters] = [((one, 0.7), (other, 0.6)) for one, other in pairs]
    ensembles.append(tuple((name, weight) for name, weight in zip(demo_adapters, (0.5, -0.3, 0.8), strict=False)))
    choices: list[Adapters] = [(), *(((name, 1.0),) for name in demo_adapters), *ensembles]
    questions = shuffled([(prompt, choice) for choice in choices for prompt in prompts[:PROMPTS]])

    answers = await ask_all(server, questions, MAX_TOKENS)

    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    oracle = Oracle(str(demo / "model"), {name: str(demo / "adapters" / name) for name in demo_adapters})
    eos = json.loads((demo / "model" / "config.json").read_text())["eos_token_id"]
    assert len(set(prompts[:PROMPTS])) == PROMPTS
    assert_equal(
        oracle,
        [
            Case(tokenizer(prompt).input_ids, choice, ids, MAX_TOKENS, [eos])
            for (prompt, choice), ids in zip(questions, answers, strict=True)
        ],
    )


def _words(ids: Sequence[int]) -> str:
    return " ".join(f"t{token}" for token in ids)


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma2", "phi3"])
async def test_families_equal_peft(family: str, tmp_path: Path) -> None:
    model, adapters = tmp_path / "model", tmp_path / "adapters"
    make_model(model, family)
    save_word_tokenizer(model)
    targets = projections(family)
    make_adapter(str(model), adapters / "wide", 1, r=16, lora_alpha=8, target_modules=targets)
    make_adapter(str(model), adapters / "root", 2, r=4, lora_alpha=2, use_rslora=True, target_modules=targets[:1])
    oracle = Oracle(str(model), {name: str(adapters / name) for name in ("wide", "root")})
    choices: list[Adapters] = [(), (("wide", 1.0),), (("root", 1.0),), (("wide", 0.4), ("root", -0.9))]
    lists = [[3 + (7 * seed + 11 * place * (seed + 2)) % 120 for place in range(4 + seed)] for seed in range(PROMPTS)]
    by_words = {_words(ids): ids for ids in lists}
    questions = shuffled([(prompt, choice) for choice in choices for prompt in by_words])

    settings = {"engine": {"dtype": "float32", "threads": 1, "kv_cache_tokens": 8192}}
    server = LiveServer(model, adapters, tmp_path / "state", ["root", "wide"], settings).start()
    try:
        answers = await ask_all(server, questions, 16, ignore_eos=True)

        def looked_up(choice: Adapters):
            def next_logprobs(ids: list[int]) -> Mapping[int, float]:
                return asyncio.run_coroutine_threadsafe(_next_logprobs(server, ids, choice), loop).result()

            return next_logprobs

        loop = asyncio.get_running_loop()
        cases = [
            Case(by_words[prompt], choice, ids, 16, (), looked_up(choice))
            for (prompt, choice), ids in zip(questions, answers, strict=True)
        ]
        await asyncio.to_thread(assert_equal, oracle, cases)
    finally:
        server.stop()


async def _next_logprobs(server: LiveServer, ids: Sequence[int], adapters: Adapters) -> Mapping[int, float]:
    async with AsyncOpenLoRAClient(server.grpc_url) as client:
        answer = await client.generate(
            _words(ids), adapters=list(adapters) or None, max_tokens=1, temperature=0, logprobs=20, ignore_eos=True
        )
    return {top["token_id"]: top["logprob"] for top in answer.logprobs[0]["top"]}
