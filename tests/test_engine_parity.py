"""The torch engine answers as transformers and PEFT do, for every family, with everything mixed in one batch."""

from __future__ import annotations

import pytest
from parity import Case, Oracle, assert_equal
from tiny_models import (
    FAMILIES,
    MIXES,
    Engine,
    make_mixed_adapters,
    make_model,
    make_prompt,
    projections,
    use,
)

LENGTHS = (5, 17, 40, 61)
MAX_TOKENS = 14


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(family, model directory, adapter directories) with different ranks, rsLoRA, patterns and partial targets."""
    directory = tmp_path_factory.mktemp(request.param)
    model_dir = make_model(directory / "model", request.param)
    adapters = make_mixed_adapters(model_dir, directory, projections(request.param))
    return request.param, model_dir, adapters


def test_greedy_equals_transformers_and_peft_in_mixed_batches(family):
    """More requests than rows, prefill in chunks, blocks that sequences end in the middle of."""
    _, model_dir, adapters = family
    oracle = Oracle(model_dir, adapters)
    prompts = [make_prompt(seed, length) for seed, length in enumerate(LENGTHS)]
    with Engine(model_dir, max_batch=9, max_step_tokens=48, block_size=8) as engine:

        def uses(mix):
            return [use(adapters[name], weight) for name, weight in mix]

        for number, prompt in enumerate(prompts):
            for mix in MIXES:
                engine.submit(f"{number} {mix}", prompt, uses(mix), max_tokens=MAX_TOKENS)

        def next_logprobs(sequence, mix):
            answer = engine.ask(sequence, uses(mix), max_tokens=1, logprobs=20)
            return dict(answer.logprobs[0].top)

        cases = [
            Case(
                prompt,
                mix,
                engine.wait(f"{number} {mix}").ids,
                MAX_TOKENS,
                next_logprobs=lambda sequence, mix=mix: next_logprobs(sequence, mix),
            )
            for number, prompt in enumerate(prompts)
            for mix in MIXES
        ]
        assert_equal(oracle, cases)
        engine.assert_nothing_held()
    answers = {mix: [tuple(case.ids) for case in cases if case.adapters == mix] for mix in MIXES}
    assert len({tuple(ids) for ids in answers.values()}) == len(MIXES), "the adapters must make a difference"


def test_logprobs_equal_the_oracle_along_a_greedy_answer(family):
    name, model_dir, adapters = family
    oracle = Oracle(model_dir, adapters)
    mix = MIXES[5]
    prompt = make_prompt(11, 30)
    with Engine(model_dir) as engine:
        answer = engine.ask(prompt, [use(adapters[name], weight) for name, weight in mix], logprobs=5)
    logits = oracle.logits([*prompt, *answer.ids[:-1]], mix)[len(prompt) - 1 :]
    expected = logits.log_softmax(dim=-1)
    limit = 1e-4 * logits.abs().max()
    assert len(answer.logprobs) == len(answer.ids)
    for row, token_id, logprob in zip(expected, answer.ids, answer.logprobs, strict=True):
        assert logprob.token_id == token_id == logprob.top[0][0]
        assert abs(row[token_id] - logprob.logprob) <= limit
        assert [value for _, value in logprob.top] == sorted((value for _, value in logprob.top), reverse=True)
        for (_, value), best in zip(logprob.top, row.topk(5).values.tolist(), strict=True):
            assert abs(value - best) <= limit


def test_eos_and_stop_tokens_end_an_answer_and_belong_to_it(family):
    _, model_dir, _ = family
    prompt = make_prompt(12, 20)
    with Engine(model_dir) as engine:
        free = engine.ask(prompt).ids
        end = next(index for index in range(3, len(free)) if free[index] not in free[:index])
        by_eos = engine.ask(prompt, eos_token_ids=(free[end],))
        by_stop = engine.ask(prompt, stop_token_ids=(free[end],))
        expected = Oracle(model_dir, {}).greedy(prompt, eos_token_ids=(free[end],)).ids
    assert by_eos.ids == by_stop.ids == free[: end + 1] == expected
    assert by_eos.finish_reason == by_stop.finish_reason == "stop"


def test_the_comparison_notices_a_wrong_adapter_and_a_wrong_weight(family):
    _, model_dir, adapters = family
    oracle = Oracle(model_dir, adapters)
    prompt = make_prompt(13, 20)
    ids = oracle.greedy(prompt, (("all", 1.0),)).ids
    assert_equal(oracle, [Case(prompt, (("all", 1.0),), ids, 16)])
    for other in ((), (("some", 1.0),), (("all", 0.8),)):
        with pytest.raises(AssertionError, match="instead of"):
            assert_equal(oracle, [Case(prompt, other, ids, 16)])
