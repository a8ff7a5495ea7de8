"""From logits to tokens, against transformers' processors and short references."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from tiny_models import Engine, make_adapter, make_model, make_prompt, use
from transformers import (
    MinLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from openlora.engine.api import Sampling
from openlora.engine.draws import Kept, filter_scores
from openlora.engine.noise import gumbel_noise, gumbel_noise_at, philox_words
from openlora.engine.sampling import SamplingState, sample
from openlora.errors import InvalidArgument, NotFinite

VOCAB = 97
OFF = {"min_p": [0.0], "top_k": [0], "top_p": [1.0]}


def logits_of(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def state_of(prompt=(), output=(), **settings) -> SamplingState:
    state = SamplingState(Sampling(**{"temperature": 0.0, **settings}), prompt)
    for token in output:
        state.append(token)
    return state


def kept(scores: torch.Tensor | Kept, row: int = 0) -> set[int]:
    if isinstance(scores, Kept):
        return set(scores.token_ids[row, np.isfinite(scores.scores[row])].tolist())
    return set(torch.isfinite(scores[row]).nonzero().flatten().tolist())


def filtered(logits: torch.Tensor, **settings) -> Kept:
    return filter_scores((logits - logits.amax(-1, keepdim=True)).numpy(), **settings)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("value", [1, 5, 40, VOCAB, VOCAB + 50])
def test_top_k_keeps_what_transformers_keeps(seed, value):
    logits = logits_of(seed)
    expected = TopKLogitsWarper(value)(None, logits)
    assert kept(filtered(logits, **{**OFF, "top_k": [value]})) == kept(expected)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("value", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_what_transformers_keeps(seed, value):
    logits = logits_of(seed)
    expected = TopPLogitsWarper(value)(None, logits)
    assert kept(filtered(logits, **{**OFF, "top_p": [value]})) == kept(expected)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("value", [0.01, 0.3, 1.0])
def test_min_p_keeps_what_transformers_keeps(seed, value):
    logits = logits_of(seed)
    expected = MinPLogitsWarper(value)(None, logits)
    assert kept(filtered(logits, **{**OFF, "min_p": [value]})) == kept(expected)


def test_filters_work_in_order_and_row_by_row():
    """min_p, then top_k, then top_p over what is left; each row has its own values, the whole row when off."""
    logits = logits_of(9, rows=4)
    settings = {"min_p": [0.0, 0.02, 0.0, 0.001], "top_k": [0, 10, 0, 20], "top_p": [1.0, 0.8, 0.3, 1.0]}
    found = filtered(logits, **settings)
    for row in range(4):
        expected = logits[row : row + 1]
        if settings["min_p"][row]:
            expected = MinPLogitsWarper(settings["min_p"][row])(None, expected)
        if settings["top_k"][row]:
            expected = TopKLogitsWarper(settings["top_k"][row])(None, expected)
        if settings["top_p"][row] < 1:
            expected = TopPLogitsWarper(settings["top_p"][row])(None, expected)
        assert kept(found, row) == kept(expected)
        alone = filtered(logits[row : row + 1], **{name: values[row : row + 1] for name, values in settings.items()})
        assert kept(alone) == kept(expected)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_repetition_penalty_is_that_of_transformers(penalty):
    prompt, output = (3, 5, 7, 7), (5, 11, 20)
    logits = logits_of(1)
    state = state_of(prompt, output, repetition_penalty=penalty, logprobs=0)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([[*prompt, *output]]), logits.clone())
    before = logits.clone()
    [found] = sample(logits, [state])
    assert found.token_id == expected.argmax().item()
    assert torch.equal(logits, before)
    raw = logits.log_softmax(-1)[0, found.token_id].item()
    assert found.logprob.logprob == pytest.approx(raw, abs=1e-6)  # of the model, not of what was penalised


def test_presence_and_frequency_count_the_output_only():
    """logit − frequency · count − presence · [count > 0], the OpenAI definition, and nothing for the prompt."""
    prompt, output = (1, 1, 2), (4, 4, 4, 9)
    logits = logits_of(2)
    for presence, frequency in [(0.7, 0.0), (0.0, 0.9), (1.5, -2.0), (-2.0, 2.0)]:
        expected = logits[0].clone()
        for token, count in Counter(output).items():
            expected[token] -= frequency * count + presence
        state = state_of(prompt, output, presence_penalty=presence, frequency_penalty=frequency)
        assert sample(logits, [state])[0].token_id == expected.argmax().item()


def test_penalties_differ_by_row():
    logits = logits_of(3).repeat(3, 1)
    best = logits[0].argmax().item()
    rows = [state_of(), state_of((best,), (), repetition_penalty=1e6), state_of((), (best,), presence_penalty=100.0)]
    first, second, third = (result.token_id for result in sample(logits, rows))
    assert first == best
    assert second != best and third != best


def test_bad_words_are_never_completed():
    """A word's last token is banned once the rest of it stands at the end of the output, as in transformers."""
    logits = logits_of(4)
    order = logits[0].argsort(descending=True).tolist()
    best, second, third = order[:3]
    words = ((best,), (8, 9, second), (9, 7, third))
    for output in [(), (8,), (8, 9), (3, 8, 9), (9, 7), (8, 9, 7)]:
        expected = NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=None)(
            torch.tensor([[50, 50, *output]]), logits.clone()
        )
        assert sample(logits, [state_of((), output, bad_words=words)])[0].token_id == expected.argmax().item()


def test_bad_words_do_not_look_into_the_prompt():
    logits = logits_of(4)
    best = logits[0].argmax().item()
    assert sample(logits, [state_of((8, 9), (), bad_words=((8, 9, best),))])[0].token_id == best


def test_min_tokens_bans_every_way_to_end():
    logits = logits_of(5)
    best, second, third = logits[0].argsort(descending=True).tolist()[:3]
    settings = {"eos_token_ids": (best,), "stop_token_ids": (second,), "min_tokens": 2}
    for output in [(), (6,), (6, 6), (6, 6, 6)]:
        processor = MinLengthLogitsProcessor(2, [best, second])
        expected = processor(torch.tensor([list(output)]), logits.clone()).argmax().item()
        assert sample(logits, [state_of((), output, **settings)])[0].token_id == expected
    assert sample(logits, [state_of((), (6,), **settings)])[0].token_id == third


def test_a_row_without_any_allowed_token_ends_alone():
    logits = logits_of(6, rows=2)
    everything = tuple((token,) for token in range(VOCAB))
    refused, fine = sample(logits, [state_of(bad_words=everything), state_of()])
    assert isinstance(refused, InvalidArgument) and refused.field == "bad_words"
    assert fine.token_id == logits[1].argmax().item()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_ends_alone(value, temperature):
    logits = logits_of(7, rows=3)
    expected = [result.token_id for result in sample(logits, [state_of(temperature=temperature)] * 3)]
    logits[1, 20] = value
    first, second, third = sample(logits, [state_of(temperature=temperature, logprobs=3)] * 3)
    assert isinstance(second, NotFinite)
    assert [first.token_id, third.token_id] == [expected[0], expected[2]]


def test_a_draw_depends_on_seed_and_position_alone():
    """Neither neighbours nor their order nor filters move it."""
    logits = logits_of(8)

    def draw(rows, index):
        states = [state_of((), range(position), seed=seed, temperature=1.0, **more) for seed, position, more in rows]
        return sample(logits.repeat(len(rows), 1), states)[index].token_id

    alone = {(seed, position): draw([(seed, position, {})], 0) for seed in range(6) for position in range(6)}
    rows = [(seed, position, {}) for seed, position in alone]
    for index, (seed, position, _) in enumerate(reversed(rows)):
        assert draw(list(reversed(rows)), index) == alone[seed, position]
    assert len(set(alone.values())) > 5
    for (seed, position), token in alone.items():  # a filter that keeps the token keeps the draw
        rank = (logits[0] > logits[0, token]).sum().item() + 1
        assert draw([(seed, position, {"top_k": rank})], 0) == token


def test_draws_follow_the_distribution():
    """Chi-square over 4000 draws at one position with different seeds, at temperature 0.7 after top_k 12."""
    logits = logits_of(10) / 3
    probabilities = TopKLogitsWarper(12)(None, logits / 0.7).softmax(-1)[0].double().numpy()
    count = 4000
    states = [state_of(seed=seed, temperature=0.7, top_k=12) for seed in range(count)]
    drawn = np.bincount([result.token_id for result in sample(logits.repeat(count, 1), states)], minlength=VOCAB)
    possible = probabilities > 0
    assert drawn[~possible].sum() == 0
    expected = probabilities[possible] * count
    assert ((drawn[possible] - expected) ** 2 / expected).sum() < 31.3  # 0.999 quantile, 11 degrees of freedom


def test_the_noise_is_gumbel_and_the_same_everywhere():
    """Recorded values: a receipt's seed must give the same draw on any machine and in any later version."""
    assert gumbel_noise(0, 0, 4).tolist() == pytest.approx(
        [-1.49545161157695, -0.35113711836148676, -0.7859067841514997, 0.5586754626449686], rel=1e-12
    )
    assert gumbel_noise(2**64 - 1, 12345, 4).tolist() == pytest.approx(
        [-1.5221329442507423, 2.4955895575767078, 2.598831490038493, 0.12389013606290404], rel=1e-12
    )
    assert gumbel_noise(5, 3, 8)[:4].tolist() == gumbel_noise(5, 3, 4).tolist()
    noise = gumbel_noise(1, 1, 200_000)
    assert np.isfinite(noise).all()
    assert noise.mean() == pytest.approx(0.5772, abs=0.01)
    assert noise.std() == pytest.approx(math.pi / math.sqrt(6), abs=0.01)


@pytest.mark.parametrize("rows", [1, 40])
def test_the_noise_of_chosen_tokens_is_the_same_noise(rows):
    """Computed for them alone, where they are few, or for the whole row."""
    generator = np.random.default_rng(rows)
    vocab = 30_000
    seeds = [0, 2**64 - 1, *generator.integers(2**64, size=rows, dtype=np.uint64).tolist()][:rows]
    positions = generator.integers(100_000, size=rows).tolist()
    for count in (1, 7, 3000):
        ids = [np.sort(generator.choice(vocab, count, replace=False)) for _ in seeds]
        row_of = np.repeat(np.arange(rows), count)
        found = gumbel_noise_at(seeds, positions, row_of, np.concatenate(ids), vocab)
        whole = [gumbel_noise(seed, at, vocab)[mine] for seed, at, mine in zip(seeds, positions, ids, strict=True)]
        assert np.array_equal(found, np.concatenate(whole))


def test_words_of_chosen_tokens_are_those_of_numpys_generator():
    ids = np.array([0, 1, 2, 3, 4, 5, 4095, 131_071, 262_143])
    for seed, position in [(0, 0), (2**64 - 1, 2**31), (12345, 1)]:
        generator = np.random.Philox(key=seed, counter=np.array([0, position, 0, 0], dtype=np.uint64))
        expected = generator.random_raw(262_144)[ids]
        same = np.full(len(ids), seed, np.uint64), np.full(len(ids), position, np.uint64)
        assert np.array_equal(philox_words(*same, ids), expected)


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 12.0])
def test_filters_over_a_large_vocabulary_keep_what_transformers_keeps(spread):
    """From all tokens alike to one above all; the thresholds that drop the hopeless ones lose nothing."""
    rows, vocab = 8, 20_000
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(3)) * spread
    for top_k in (0, 1, 40, 5000):
        found = filtered(logits, min_p=[0.0] * rows, top_k=[top_k] * rows, top_p=[1.0] * rows)
        expected = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
        assert all(kept(found, row) == kept(expected, row) for row in range(rows))
    for top_p in (0.05, 0.9, 0.999):
        sizes = [len(kept(filtered(logits, min_p=[0.0] * rows, top_k=[0] * rows, top_p=[top_p] * rows), row))
                 for row in range(rows)]  # fmt: skip
        ordered = logits.double().softmax(-1).sort(dim=-1, descending=True).values.cumsum(-1)
        expected_sizes = [(row < top_p).sum().item() + 1 for row in ordered]
        assert sizes == pytest.approx(expected_sizes, abs=1)  # float32 sums on their side of the last token


def test_ties_are_kept_by_token_id():
    logits = torch.zeros(1, VOCAB)
    assert kept(filtered(logits, **{**OFF, "top_p": [10.5 / VOCAB]})) == set(range(11))
    assert kept(filtered(logits, **{**OFF, "top_k": [3]})) == set(range(VOCAB))


def test_tiny_temperatures_approach_greedy_without_overflow():
    logits = logits_of(11, rows=50) * 1e4
    states = [state_of(temperature=1e-30, seed=seed, top_p=0.9, min_p=0.1) for seed in range(50)]
    assert [result.token_id for result in sample(logits, states)] == logits.argmax(-1).tolist()


def test_logprobs_are_given_as_asked():
    logits = logits_of(12, rows=3)
    none, zero, five = sample(logits, [state_of(), state_of(logprobs=0), state_of(logprobs=5)])
    assert none.logprob is None
    assert zero.logprob.top == ()
    raw = logits.log_softmax(-1)
    assert zero.logprob.logprob == pytest.approx(raw[1].max().item(), abs=1e-6)
    assert [token for token, _ in five.logprob.top] == raw[2].topk(5).indices.tolist()


def test_seeded_answers_depend_on_neither_batch_nor_order(tmp_path):
    """Through the engine: with adapters, neighbours, chunked prefill, in any order of arrival."""
    model_dir = make_model(tmp_path / "model")
    adapter = make_adapter(model_dir, tmp_path / "a", 1, r=3, target_modules=["q_proj", "down_proj"])
    requests = {
        f"{seed}": (make_prompt(seed, 5 + 9 * seed), [use(adapter, 0.5)] if seed % 2 else [], {"seed": seed})
        for seed in range(6)
    }
    settings = {"temperature": 0.9, "top_p": 0.95, "max_tokens": 15}
    with Engine(model_dir) as engine:
        alone = {
            name: engine.ask(prompt, uses, **more, **settings).ids for name, (prompt, uses, more) in requests.items()
        }
        engine_again = engine.ask(*requests["3"][:2], **requests["3"][2], **settings).ids
        other_seed = engine.ask(*requests["3"][:2], seed=99, **settings).ids
    assert engine_again == alone["3"] != other_seed
    for order in (list(requests), list(reversed(requests))):
        with Engine(model_dir, max_batch=4, max_step_tokens=16) as engine:
            for name in order:
                prompt, uses, more = requests[name]
                engine.submit(name, prompt, uses, **more, **settings)
            assert {name: engine.wait(name).ids for name in requests} == alone
