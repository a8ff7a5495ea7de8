"""Blocks run out: who gives way, that everybody ends, and that answers are what they would have been."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_run import SchedulerRun
from tiny_models import Engine, make_adapter, make_model, make_prompt, use


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def adapter(model_dir, tmp_path_factory) -> str:
    return make_adapter(model_dir, tmp_path_factory.mktemp("adapter"), 3, r=4, target_modules=["q_proj", "up_proj"])


def ask_all(model_dir: str, adapter: str, gate=None, **engine_settings) -> tuple[dict[str, list[int]], int]:
    """Greedy, drawn and penalised requests with and without an adapter, all at once; their tokens, and preemptions."""
    with Engine(model_dir, gate, **engine_settings) as engine:
        for number in range(8):
            engine.submit(
                str(number),
                make_prompt(number, 9 + 3 * number),
                [use(adapter)] if number % 2 else [],
                max_tokens=24,
                temperature=float(number % 4 > 1),
                seed=number,
                repetition_penalty=1.3 if number > 5 else 1.0,
                logprobs=0,
            )
        answers = {str(number): engine.wait(str(number)) for number in range(8)}
        assert {answer.finish_reason for answer in answers.values()} == {"length"}
        assert all(len(answer.logprobs) == 24 for answer in answers.values())
        engine.assert_nothing_held()
        return {name: answer.ids for name, answer in answers.items()}, engine.engine.stats().preemptions


@pytest.fixture(scope="module")
def undisturbed(model_dir, adapter) -> dict[str, list[int]]:
    answers, preemptions = ask_all(model_dir, adapter, prefix_cache=False)
    assert preemptions == 0
    return answers


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_preempted_in_every_step_and_resumed(model_dir, adapter, undisturbed, prefix_cache):
    def preempt_all(_) -> None:
        scheduler = engine.engine._scheduler
        for sequence in list(scheduler.running):
            scheduler.preempt(sequence)

    engine = Engine(model_dir, preempt_all, prefix_cache=prefix_cache)
    with engine:
        for number in (2, 3, 7):
            engine.submit(
                str(number),
                make_prompt(number, 9 + 3 * number),
                [use(adapter)] if number % 2 else [],
                max_tokens=24,
                temperature=float(number % 4 > 1),
                seed=number,
                repetition_penalty=1.3 if number > 5 else 1.0,
            )
        for number in (2, 3, 7):
            assert engine.wait(str(number)).ids == undisturbed[str(number)]
        assert engine.engine.stats().preemptions >= 3 * 23
        engine.assert_nothing_held()


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_too_few_blocks_change_no_answer(model_dir, adapter, undisturbed, prefix_cache):
    """Eight sequences of up to 54 tokens in a cache of 112."""
    answers, preemptions = ask_all(
        model_dir, adapter, kv_cache_tokens=112, block_size=4, max_step_tokens=64, prefix_cache=prefix_cache
    )
    assert preemptions > 0
    assert answers == undisturbed


def test_a_cache_that_holds_one_sequence_serves_all(model_dir):
    with Engine(model_dir, max_model_len=48, kv_cache_tokens=48, block_size=4) as engine:
        for number in range(4):
            engine.submit(str(number), make_prompt(number, 20), max_tokens=28)
        assert [len(engine.wait(str(number)).ids) for number in range(4)] == [28] * 4
        engine.assert_nothing_held()


def test_the_least_senior_of_the_lowest_priority_gives_way():
    run = SchedulerRun(blocks=9, max_batch=3)
    late_but_urgent = [run.add([1] * 4, max_tokens=12), run.add([2] * 4, max_tokens=12)]
    urgent = run.add([3] * 4, max_tokens=12, priority=-1)
    run.finish()
    assert {sequence for _, sequence in run.preempted} == {late_but_urgent[1]}
    assert run.ended[0] is urgent


def test_a_preempted_sequence_goes_first_again():
    run = SchedulerRun(blocks=9, max_batch=3, prefix_cache=False)
    for number in range(12):
        run.add([number + 1] * 4, max_tokens=12)
    run.finish()
    assert run.preempted
    first_admissions = []
    for _, sequence in run.admitted:
        if sequence not in first_admissions:
            first_admissions.append(sequence)
    assert [sequence.arrival for sequence in first_admissions] == list(range(12))
    for turn, sequence in run.preempted:
        again = next(index for index, (at, one) in enumerate(run.admitted) if at > turn and one is sequence)
        assert all(one.arrival < sequence.arrival or at <= turn for at, one in run.admitted[:again])


requests = st.lists(
    st.tuples(
        st.integers(0, 3),  # steps before it comes
        st.integers(1, 3),  # its prompt is this token …
        st.integers(1, 40),  # … so many times
        st.integers(1, 20),  # new tokens
        st.integers(-1, 1),  # priority
        st.lists(st.sampled_from("abc"), max_size=2, unique=True),
        st.booleans(),  # cancelled some steps later
    ),
    max_size=20,
)


@given(requests, st.booleans(), st.integers(15, 30), st.integers(1, 6))
@settings(max_examples=200)
def test_any_workload_ends_and_keeps_the_rules(workload, prefix_cache, blocks, max_batch):
    """The rules are those of `SchedulerRun.check`; and preemptions are rare: the docstring of `Scheduler` says how."""
    run = SchedulerRun(blocks=blocks, max_batch=max_batch, max_adapters=2, prefix_cache=prefix_cache)
    cancel: list[tuple[int, object]] = []
    for steps, token, length, max_tokens, priority, adapters, cancelled in workload:
        for _ in range(steps):
            if run.scheduler.waiting or run.scheduler.running:
                run.step()
        sequence = run.add([token] * length, adapters, max_tokens=max_tokens, priority=priority)
        if cancelled:
            cancel.append((run.turns + 5, sequence))
        for turn, one in list(cancel):
            if turn <= run.turns:
                cancel.remove((turn, one))
                if one not in run.ended:
                    run.scheduler.remove(one)
                    run.ended.append(one)
                    run.check([])
    run.finish()
    assert len(run.ended) == len(workload)
    for turn, _ in run.preempted:
        admissions = [at for at, _ in run.admitted if at <= turn]
        assert turn - admissions[-1] >= run.cache.block_size
