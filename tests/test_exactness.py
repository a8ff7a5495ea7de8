"""What the issue promises about exactness: fp32 answers equal PEFT's, and depend on nothing but their own request.

Where each part of the promise is tested:
- ranks 1 to 128 side by side, random subsets of projections with rsLoRA, `rank_pattern` and `alpha_pattern`, all
  families, other orders and other neighbours, draws, and adapters on `lm_head` and `embed_tokens`: here;
- each kind of scaling and pattern alone, and every other adapter that is refused: test_engine_adapters.py;
- all families with ensembles, chunked prefill and more requests than rows: test_engine_parity.py;
- logits of all tokens under any chunks, neighbours and order: test_engine_model.py;
- bits of the kernels: test_kernels.py, test_kernels_attention.py;
- draws as a function of seed and position: test_engine_sampling.py;
- preemption: test_preemption.py; prefix cache: test_prefix_cache.py; INT8: test_quantization.py;
- through a real Triton server: test_end_to_end_parity.py.
"""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
import torch
from engine_rig import TIMEOUT_SECONDS, Answer
from parity import Case, Oracle, assert_equal
from tiny_models import (
    FAMILIES,
    Engine,
    digest_of,
    make_adapter,
    make_model,
    make_prompt,
    projections,
    use,
)

from openlora.engine import kernels

RANKS = (1, 2, 8, 16, 64, 128)
TOKENS = 10
NEIGHBOURS = 1e-5  # of max|logit|
Mix = tuple[tuple[str, float], ...]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def adapters_of_all_ranks(model_dir, tmp_path_factory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("ranks")
    return {
        f"r{rank}": make_adapter(
            model_dir, directory / str(rank), rank, std=0.2, r=rank, lora_alpha=2, use_rslora=True,
            target_modules=projections("llama"),
        )
        for rank in RANKS
    }  # fmt: skip


def run_together(
    model_dir: str, adapters: dict[str, str], requests: dict[str, tuple[tuple[int, ...], Mix]], **sampling
) -> dict[str, Answer]:
    """The answers to requests that are all computed in the same steps."""
    widths: list[int] = []
    free = threading.Event()
    free.set()

    def gate(outputs) -> None:
        widths.append(len(outputs))
        assert free.wait(TIMEOUT_SECONDS)

    # Prompts must not wait for each other, however long a step takes.
    with Engine(model_dir, gate, prefill_stretch=1e9) as engine:
        for path in adapters.values():
            engine.ask(make_prompt(99, 5), [use(path)], max_tokens=1)  # resident from here on
        free.clear()
        engine.submit("first", make_prompt(98, 5), max_tokens=2)
        engine.until(lambda answers: "first" in answers)
        for name, (prompt, mix) in requests.items():
            more = {key: value[name] if isinstance(value, dict) else value for key, value in sampling.items()}
            engine.submit(name, prompt, [use(adapters[key], weight) for key, weight in mix], max_tokens=TOKENS, **more)
        free.set()
        answers = {name: engine.wait(name) for name in requests}
        assert [answer.error for answer in answers.values() if answer.finish_reason != "length"] == []
        engine.assert_nothing_held()
    assert max(widths) >= len(requests), "they were never in one batch"
    return answers


def cases_of(requests, answers) -> list[Case]:
    return [Case(prompt, mix, answers[name].ids, TOKENS) for name, (prompt, mix) in requests.items()]


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
def test_all_ranks_in_one_batch_equal_peft(model_dir, adapters_of_all_ranks, native, monkeypatch):
    if not native:
        monkeypatch.setattr(kernels, "_load", lambda: None)
    assert (kernels.kernels_for(torch.float32, torch.device("cpu")) is not None) == native
    adapters = adapters_of_all_ranks
    mixes: list[Mix] = [((name, 1.0),) for name in adapters]
    mixes += [(), (("r1", 0.5), ("r128", 0.5)), (("r64", -0.3), ("r2", 1.2), ("r8", 0.4))]
    requests = {f"{number} {mix}": (make_prompt(number, 9 + 7 * number), mix) for number in range(3) for mix in mixes}
    answers = run_together(model_dir, adapters, requests)
    assert_equal(Oracle(model_dir, adapters), cases_of(requests, answers))
    assert len({tuple(answers[f"0 {mix}"].ids) for mix in mixes}) == len(mixes), "adapters must make a difference"


def random_settings(generator: random.Random) -> dict:
    """An adapter on a random subset of all linears, one by one or by projection, with random ranks and scalings."""
    names = projections("llama")
    linears = [
        f"layers.{layer}.{'mlp' if name in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}.{name}"
        for layer in range(3)
        for name in names
    ]
    among = generator.choice([names, linears])
    patterns = [*names, *linears, r"layers\.[01]\.mlp\..*", r".*self_attn\.[qk]_proj"]

    def pattern(most: int) -> dict[str, int]:
        # The first that matches counts, and PEFT sorts them when it saves an adapter.
        chosen = sorted(generator.sample(patterns, generator.randint(0, 3)))
        return {key: generator.randint(1, most) for key in chosen}

    return {
        "target_modules": generator.sample(among, generator.randint(1, len(among))),
        "r": generator.randint(1, 24),
        "lora_alpha": generator.randint(1, 12),
        "use_rslora": generator.random() < 0.3,
        "rank_pattern": pattern(24),
        "alpha_pattern": pattern(12),
    }


def test_any_subset_of_projections_equals_peft(model_dir, tmp_path):
    generator = random.Random(3)
    adapters = {
        f"a{seed}": make_adapter(model_dir, tmp_path / str(seed), seed, std=0.2, **random_settings(generator))
        for seed in range(20)
    }
    requests = {name: (make_prompt(place, 12 + place), ((name, 1.0),)) for place, name in enumerate(adapters)}
    answers = run_together(model_dir, adapters, requests)
    assert_equal(Oracle(model_dir, adapters), cases_of(requests, answers))


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("tied", [True, False])
def test_adapters_on_the_vocabulary_are_refused_by_name(tmp_path, module, tied):
    """As PEFT writes them, with and without the base layer's own weights beside; nothing of them is applied."""
    model_dir = make_model(tmp_path / "model", tie_word_embeddings=tied)
    adapter = make_adapter(model_dir, tmp_path / "adapter", 1, r=4, target_modules=["q_proj", module])
    with Engine(model_dir) as engine:
        answer = engine.ask(make_prompt(1, 9), [use(adapter)])
    assert (answer.ids, answer.finish_reason) == ([], "error")
    assert answer.error.startswith(f"[ADAPTER_INVALID] adapter {digest_of(adapter)}: key base_model.model.")
    assert module in answer.error
    assert answer.error.endswith(" matches no adaptable linear of the base model")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> tuple[str, str, dict[str, str]]:
    directory: Path = tmp_path_factory.mktemp(request.param)
    # Well conditioned: 1e-5 is about our arithmetic, not about how a wild model amplifies rounding.
    model_dir = make_model(directory / "model", request.param, initializer_range=0.1)
    names = projections(request.param)
    settings = {
        "small": {"r": 1, "lora_alpha": 2, "target_modules": names},
        "large": {"r": 128, "lora_alpha": 1, "use_rslora": True, "target_modules": names},
        "part": {"r": 8, "target_modules": [names[0], names[-1]], "rank_pattern": {names[0]: 33}},
        "other": {"r": 16, "lora_alpha": 8, "alpha_pattern": {names[-1]: 2}, "target_modules": names[1:]},
    }
    adapters = {
        name: make_adapter(model_dir, directory / name, seed, std=0.15, **more)
        for seed, (name, more) in enumerate(settings.items())
    }
    return request.param, model_dir, adapters


def test_order_and_neighbours_adapters_change_no_answer(family):
    """Greedy and drawn requests: tokens stay, and log-probabilities to 1e-5 of the largest logit."""
    _, model_dir, adapters = family
    mixes: list[Mix] = [(), (("small", 1.0),), (("large", 1.0),), (("part", 0.5), ("other", 0.5)), (("other", 1.0),)]
    requests = {str(number): (make_prompt(number, 8 + 5 * number), mixes[number % 5]) for number in range(10)}
    sampling = {
        "temperature": {name: 0.9 * (int(name) > 4) for name in requests},
        "seed": {name: int(name) for name in requests},
        "logprobs": 20,
    }
    first = run_together(model_dir, adapters, requests, **sampling)
    oracle = Oracle(model_dir, adapters)
    greedy = {name: request for name, request in requests.items() if int(name) <= 4}
    assert_equal(oracle, cases_of(greedy, first))
    largest = oracle.logits(requests["0"][0]).abs().max().item()

    def assert_same(answers: dict[str, Answer], names) -> None:
        for name in names:
            assert answers[name].ids == first[name].ids
            for one, other in zip(answers[name].logprobs, first[name].logprobs, strict=True):
                found, expected = dict(one.top), dict(other.top)
                assert len(found.keys() & expected.keys()) >= 19  # ties at the end of the list may change places
                for token in found.keys() & expected.keys():
                    assert abs(found[token] - expected[token]) <= NEIGHBOURS * largest

    shuffled = random.Random(5).sample(list(requests), len(requests))
    assert_same(run_together(model_dir, adapters, {name: requests[name] for name in shuffled}, **sampling), requests)
    # Every second request with other adapters: the rest must not notice.
    changed = {
        name: (prompt, mixes[(int(name) + 2) % 5] if int(name) % 2 else mix) for name, (prompt, mix) in requests.items()
    }
    answers = run_together(model_dir, adapters, changed, **sampling)
    assert_same(answers, [name for name in requests if int(name) % 2 == 0])
    assert any(answers[name].ids != first[name].ids for name in requests if int(name) % 2)
    alone = {"8": requests["8"]}
    assert_same(run_together(model_dir, adapters, alone, **sampling), alone)
