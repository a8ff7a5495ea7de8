"""Requests through the engine: every one ends once, cancel works in every phase, nothing leaks, nobody starves."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter

import pytest
import torch
from adapter_store import AdapterStore
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scheduler_run import SchedulerRun
from tiny_models import VOCAB, Engine, make_adapter, make_model, make_prompt, use

from openlora.engine import torch_engine
from openlora.engine.api import EngineOutput
from openlora.engine.fair_turns import flow_of
from openlora.engine.scheduler import Sequence
from openlora.engine.step_budget import StepBudget, StepLoad, StepTimes
from openlora.errors import InvalidArgument

PROMPT = make_prompt(1, 20)


class Gate:
    """Holds the engine after steps: `step()` lets it make one more, `open()` lets it run."""

    def __init__(self) -> None:
        self._permits = threading.Semaphore(0)
        self._arrived = threading.Semaphore(0)
        self._open = threading.Event()
        self.outputs: list[list[EngineOutput]] = []

    def __call__(self, outputs: list[EngineOutput]) -> None:
        self.outputs.append(outputs)
        self._arrived.release()
        if not self._open.is_set():
            assert self._permits.acquire(timeout=60)

    def arrive(self) -> list[EngineOutput]:
        """Wait for the engine to stand at the gate after a step, and see what that step made."""
        assert self._arrived.acquire(timeout=60)
        return self.outputs[-1]

    def step(self) -> list[EngineOutput]:
        self._permits.release()
        return self.arrive()

    def open(self) -> None:
        self._open.set()
        self._permits.release()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def adapters(model_dir, tmp_path_factory) -> list[str]:
    directory = tmp_path_factory.mktemp("adapters")
    return [
        make_adapter(model_dir, directory / str(seed), seed, r=2 + seed, target_modules=["q_proj", "down_proj"])
        for seed in range(5)
    ]


def cancelled(outputs: list[EngineOutput]) -> list[str]:
    return [output.request_id for output in outputs if output.finish_reason == "cancelled"]


def test_cancel_while_decoding_takes_one_step(model_dir, adapters):
    gate = Gate()
    with Engine(model_dir, gate) as engine:
        engine.submit("a", PROMPT, [use(adapters[0])], max_tokens=50)
        gate.arrive()
        engine.submit("b", PROMPT, max_tokens=50)
        while not any(output.request_id == "b" for output in gate.step()):
            pass
        made = len(engine.answers["a"].ids)
        engine.engine.cancel("a")
        outputs = gate.step()
        assert cancelled(outputs) == ["a"]
        assert engine.answers["a"].ids == engine.answers["a"].ids[:made] and made > 0
        assert [output.request_id for output in outputs if output.token_ids] == ["b"]
        gate.open()
        engine.wait("b")
        engine.assert_nothing_held()


def test_cancel_during_prefill_takes_one_step(model_dir, adapters):
    gate = Gate()
    with Engine(model_dir, gate, max_batch=4, max_step_tokens=8) as engine:
        engine.submit("decoding", PROMPT, max_tokens=60)
        gate.arrive()
        engine.submit("long", make_prompt(2, 60), [use(adapters[1])])
        scheduler = engine.engine._scheduler
        while not any(0 < sequence.computed < 60 for sequence in scheduler.running if len(sequence.token_ids) == 60):
            gate.step()
        engine.engine.cancel("long")
        assert cancelled(gate.step()) == ["long"]
        assert engine.answers["long"].ids == []
        assert scheduler.residency.held == 0
        gate.open()
        assert engine.wait("decoding").finish_reason == "length"
        engine.assert_nothing_held()


def test_cancel_while_waiting_for_a_row_takes_one_step(model_dir, adapters):
    gate = Gate()
    with Engine(model_dir, gate, max_batch=1) as engine:
        engine.submit("running", PROMPT, max_tokens=30)
        gate.arrive()
        engine.submit("waiting", PROMPT, [use(adapters[0])])
        gate.step()
        assert engine.engine.stats().waiting == 1
        engine.engine.cancel("waiting")
        assert cancelled(gate.step()) == ["waiting"]
        gate.open()
        engine.wait("running")
        engine.assert_nothing_held()


def test_cancel_while_its_adapter_loads(model_dir, adapters):
    with Engine(model_dir, max_adapters=1) as engine:
        reading, released = threading.Event(), threading.Event()
        opened = engine.engine._residency._open

        def slow_open(digest: str, path: str):
            reading.set()
            assert released.wait(60)
            return opened(digest, path)

        engine.engine._residency._open = slow_open
        engine.submit("loading", PROMPT, [use(adapters[0])])
        assert reading.wait(60)
        engine.engine.cancel("loading")
        assert engine.wait("loading").finish_reason == "cancelled"
        engine.assert_nothing_held()
        engine.submit("next", PROMPT, [use(adapters[1])])  # takes the only slot from the load nobody wants
        released.set()
        assert engine.wait("next").finish_reason == "length"


def test_cancel_at_once_and_of_unknown_requests(model_dir):
    with Engine(model_dir) as engine:
        engine.engine.cancel("never heard of")
        engine.submit("a", PROMPT)
        engine.engine.cancel("a")
        assert engine.wait("a").finish_reason in ("cancelled", "length")
        engine.engine.cancel("a")
        assert engine.ask(PROMPT).finish_reason == "length"


def test_a_request_that_can_never_fit_is_refused_at_once(model_dir):
    with Engine(model_dir, max_model_len=40) as engine:
        assert engine.ask(make_prompt(0, 40)).error == (
            "[INVALID_ARGUMENT] prompt: 40 tokens leave no room for an answer, max_model_len is 40"
        )
        last = engine.ask(make_prompt(0, 39), max_tokens=5)
        assert (len(last.ids), last.finish_reason) == (1, "length")
        cut = engine.ask(make_prompt(0, 30), max_tokens=1000)
        assert (len(cut.ids), cut.finish_reason) == (10, "length")


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ((), {}, "prompt: is empty, at least one token is right"),
        ((5, VOCAB), {}, f"prompt: token id {VOCAB} is outside the vocabulary of {VOCAB}"),
        ((5, -1), {}, f"prompt: token id -1 is outside the vocabulary of {VOCAB}"),
        ((5,), {"max_tokens": 0}, "max_tokens: 0 is too small, at least 1 is right"),
        ((5,), {"eos_token_ids": (999,)}, f"eos_token_ids: token id 999 is outside the vocabulary of {VOCAB}"),
        ((5,), {"bad_words": ((3, 999),)}, f"bad_words: token id 999 is outside the vocabulary of {VOCAB}"),
        ((5,), {"bad_words": ((3,), ())}, "bad_words: a word has no tokens"),
    ],
)
def test_requests_that_make_no_sense_are_refused(model_dir, prompt, sampling, message):
    with Engine(model_dir) as engine:
        answer = engine.ask(prompt, **sampling)
        assert (answer.finish_reason, answer.error) == ("error", f"[INVALID_ARGUMENT] {message}")


def test_a_full_queue_says_when_to_come_back(model_dir):
    gate = Gate()
    with Engine(model_dir, gate, max_batch=1, max_waiting=3) as engine:
        engine.submit("running", PROMPT)
        gate.arrive()
        for number in range(5):
            engine.submit(str(number), PROMPT)
        gate.open()
        for number in (3, 4):
            answer = engine.wait(str(number))
            assert answer.finish_reason == "error"
            assert answer.error.startswith("[OVERLOADED] 3 requests are waiting retry_after_ms=")
            assert 100 <= int(answer.error.rpartition("=")[2]) <= 30_000
        for number in (0, 1, 2):
            assert engine.wait(str(number)).finish_reason == "length"


def test_a_running_id_cannot_be_used_twice(model_dir):
    gate = Gate()
    with Engine(model_dir, gate) as engine:
        engine.submit("a", PROMPT)
        gate.arrive()
        with pytest.raises(InvalidArgument, match="request_id: 'a' is still running"):
            engine.submit("a", PROMPT)
        gate.open()
        first = engine.wait("a").ids
        del engine.answers["a"]
        engine.submit("a", PROMPT)
        assert engine.wait("a").ids == first


def test_lower_priority_numbers_run_first(model_dir):
    gate = Gate()
    with Engine(model_dir, gate, max_batch=1) as engine:
        engine.submit("running", PROMPT, max_tokens=3)
        gate.arrive()
        for name, priority in [("late", 5), ("normal", 0), ("normal too", 0), ("urgent", -3)]:
            engine.submit(name, PROMPT, priority=priority, max_tokens=2)
        gate.open()
        for name in ("late", "normal", "normal too", "urgent"):
            engine.wait(name)
    finished = [output.request_id for outputs in gate.outputs for output in outputs if output.finish_reason]
    assert finished == ["running", "urgent", "normal", "normal too", "late"]


def test_decoding_goes_on_while_a_long_prompt_is_computed(model_dir):
    """One token a step for whoever decodes; the prompt gets the rest of the budget."""
    gate = Gate()
    with Engine(model_dir, gate, max_batch=4, max_step_tokens=10) as engine:
        engine.submit("decoding", PROMPT, max_tokens=30)
        gate.arrive()
        engine.submit("long", make_prompt(2, 60), max_tokens=2)
        steps = 0
        while not any(output.request_id == "long" for output in gate.step()):
            assert [output.request_id for output in gate.outputs[-1]] == ["decoding"]
            steps += 1
        assert steps == 6  # 60 tokens, 9 a step: the seventh step makes the first token
        gate.open()
        engine.wait("decoding")


def test_what_lacks_room_is_overtaken_only_so_often(model_dir, adapters):
    """A request for cold adapters gets its turn although hot ones keep coming."""
    with Engine(model_dir, max_batch=4, max_adapters=1) as engine:
        # 40 requests of the hot adapter come first and after; the cold one stands in the middle of the queue.
        for number in range(20):
            engine.submit(f"before {number}", PROMPT, [use(adapters[0])], max_tokens=1 + number % 7)
        engine.submit("cold", PROMPT, [use(adapters[1])], max_tokens=2)
        for number in range(60):
            engine.submit(f"after {number}", PROMPT, [use(adapters[0])], max_tokens=1 + number % 7)
        order: list[str] = []
        engine.until(lambda answers: sum(bool(answer.finish_reason) for answer in answers.values()) == 81)
        order = list(engine.answers)  # by first output
        assert sum(name.startswith("after") for name in order[: order.index("cold")]) <= 2 * 4
        assert all(answer.finish_reason == "length" for answer in engine.answers.values())
        engine.assert_nothing_held()


def test_a_large_request_gets_its_blocks_although_small_ones_keep_coming(model_dir):
    with Engine(model_dir, max_batch=4, max_model_len=96, kv_cache_tokens=112) as engine:
        for number in range(12):
            engine.submit(f"before {number}", make_prompt(number, 10), max_tokens=6)
        engine.submit("large", make_prompt(99, 60), max_tokens=36)
        for number in range(40):
            engine.submit(f"after {number}", make_prompt(number, 10), max_tokens=6)
        engine.until(lambda answers: sum(bool(answer.finish_reason) for answer in answers.values()) == 53)
        order = list(engine.answers)
        assert sum(name.startswith("after") for name in order[: order.index("large")]) <= 2 * 4
        assert len(engine.answers["large"].ids) == 36
        engine.assert_nothing_held()


def test_one_hot_adapter_does_not_hold_up_the_others():
    """A hundred requests of one adapter wait; the first of any other adapter is next all the same."""
    run = SchedulerRun(max_batch=2, max_adapters=4)
    hot = [run.add([1, 2, 3], ["hot"]) for _ in range(100)]
    run.step()
    cold = [run.add([1, 2, 3], uses) for uses in (["a"], ["b"], [], ["a", "hot"])]
    again = run.add([1, 2, 3], ["a"])
    run.finish()
    order = [sequence for _, sequence in run.admitted]
    assert order[:2] == hot[:2]
    assert set(cold) < set(order[2:8])
    assert again in order[8:12]


def test_more_adapters_than_slots():
    """Two slots, six adapters, forty requests of each: none of them waits longer than the bound."""
    run = SchedulerRun(max_batch=4, max_adapters=2)
    for number in range(40):
        for adapter in "abcdef":
            run.add([1] * (1 + number % 5), [adapter], max_tokens=1 + number % 3)
    run.finish()
    assert len(run.ended) == 240
    assert all(passed <= bound for passed, bound in passed_and_bound(run))


def test_forty_adapters_in_eight_slots():
    """With memory for twelve: the bound holds, and nobody waits for the whole queue of another."""
    run = SchedulerRun(max_batch=16, max_adapters=8, host_bytes=12 * AdapterStore().size("any"), blocks=256)
    for number in range(5):
        for adapter in range(40):
            run.add([1] * (1 + (adapter + number) % 5), [f"adapter {adapter}"], max_tokens=1 + adapter % 3)
    run.finish()
    assert len(run.ended) == 200
    assert all(passed <= bound for passed, bound in passed_and_bound(run))
    stats = run.scheduler.residency.stats()
    assert (stats.slots_filled, stats.host_adapters) == (8, 12)
    assert stats.loads > 40  # some were read again


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.lists(st.sampled_from("abcd"), max_size=2, unique=True), st.integers(1, 12)),
        max_size=60,
    ),
    st.integers(1, 3),
    st.integers(8, 40),
)
@settings(max_examples=150)
def test_nobody_is_passed_more_often_than_the_bound(arrivals, max_batch, blocks):
    """The bound that the docstring of `Scheduler` states."""
    run = SchedulerRun(max_batch=max_batch, max_adapters=2, blocks=blocks)
    for steps, adapters, length in arrivals:
        for _ in range(steps):
            if run.scheduler.waiting or run.scheduler.running:
                run.step()
        run.add([1] * length, adapters, max_tokens=length)
    run.finish()
    assert all(passed <= bound for passed, bound in passed_and_bound(run))


def test_slots_held_in_advance_never_block_everybody():
    """The third in line holds both slots, and the two before it, the only ones looked at, wait for one of them."""
    run = SchedulerRun(max_batch=1, max_adapters=2, blocks=8)
    for adapters, length in (([], 6), ("da", 1), ("da", 9)):
        run.add([1] * length, list(adapters), max_tokens=length)
    run.step()
    run.step()
    for adapters, length in (("a", 4), ("ab", 4), ("ab", 7), ("", 1), ("", 1), ("", 1), ("a", 1), ("ac", 1)):
        run.add([1] * length, list(adapters), max_tokens=length)
    run.finish(300)
    assert len(run.ended) == 11


def passed_and_bound(run: SchedulerRun) -> list[tuple[int, int]]:
    """For each request: how many that arrived later were admitted first, and how many may be at most."""
    first: dict[Sequence, int] = {}
    for position, (_, sequence) in enumerate(run.admitted):
        first.setdefault(sequence, position)
    ordered = sorted(first, key=lambda sequence: sequence.arrival)
    found = []
    for sequence in ordered:
        flow = flow_of(sequence.request)
        earlier = ordered[: sequence.arrival]
        ahead = [one for one in earlier if flow_of(one.request) == flow and first[one] >= run.admitted_before[sequence]]
        later = [one for one in ordered[sequence.arrival + 1 :] if first[one] < first[sequence]]
        flows = Counter(flow_of(one.request) for one in later)
        bound = sum(min(count, len(ahead) + 1) for count in flows.values()) + run.scheduler.max_batch
        found.append((len(later), bound))
    return found


class Clock:
    """The engine's clock, which a test can put forward."""

    perf_counter = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self.ahead = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


def test_a_deadline_ends_a_request_in_any_phase(model_dir, adapters, monkeypatch):
    """Late from the start, running, waiting for a row; the others don't notice."""
    clock, gate = Clock(), Gate()
    monkeypatch.setattr(torch_engine, "time", clock)
    with Engine(model_dir, max_batch=2) as engine:
        expected = engine.ask(PROMPT, max_tokens=60).ids
    with Engine(model_dir, gate, max_batch=2) as engine:
        engine.submit("patient", PROMPT, max_tokens=60, timeout=5000)
        gate.arrive()
        engine.submit("late", PROMPT, timeout=0.0)
        engine.submit("running", PROMPT, [use(adapters[0])], max_tokens=60, timeout=2000)
        while "running" not in engine.answers:
            gate.step()
        engine.submit("waiting", PROMPT, timeout=1000)
        assert engine.answers["late"].error == "[DEADLINE_EXCEEDED] not finished in 0 ms"
        clock.ahead = 1500
        assert [output.request_id for output in gate.step() if output.error] == ["waiting"]
        assert engine.answers["waiting"].error == "[DEADLINE_EXCEEDED] not finished in 1000000 ms"
        engine.submit("next in line", PROMPT, max_tokens=2)
        clock.ahead = 2500
        assert [output.request_id for output in gate.step() if output.error] == ["running"]
        assert (engine.answers["waiting"].ids, len(engine.answers["running"].ids) > 0) == ([], True)
        gate.open()
        assert engine.wait("patient").ids == expected
        assert engine.wait("next in line").finish_reason == "length"
        engine.assert_nothing_held()


def test_a_deadline_wakes_an_engine_that_has_nothing_to_compute(model_dir, adapters):
    with Engine(model_dir) as engine:
        released = threading.Event()
        engine.engine._residency._open = lambda digest, path: released.wait(60)
        engine.submit("loading", PROMPT, [use(adapters[0])], timeout=0.05)
        assert engine.wait("loading").error == "[DEADLINE_EXCEEDED] not finished in 50 ms"
        released.set()
        engine.assert_nothing_held()


def steps(*loads: tuple[int, int, int], cost: tuple[float, float, float]) -> list[tuple[StepLoad, float]]:
    return [(StepLoad(*load), cost[0] + cost[1] * load[1] + cost[2] * load[2]) for load in loads]


def test_step_times_are_learned():
    times = StepTimes()
    cost = (0.02, 0.0006, 2e-8)
    for load, seconds in steps(*[(8, 8 + 31 * n, 900 * n * n) for n in range(40)], cost=cost):
        times.observe(load, seconds)
    assert times.coefficients() == pytest.approx(cost, rel=0.01)
    slower = tuple(2 * part for part in cost)
    for load, seconds in steps(*[(8, 8 + 31 * (n % 40), 900 * (n % 40) ** 2) for n in range(40)], cost=slower):
        times.observe(load, seconds)
    assert times.coefficients() == pytest.approx(slower, rel=0.05)
    before = times.coefficients()
    times.observe(StepLoad(8, 500, 100_000), 60.0)  # something held the machine
    assert times.coefficients() == pytest.approx(before, rel=0.15)


def test_steps_of_one_size_do_not_make_the_model_forget_the_others():
    times, cost = StepTimes(), (0.014, 0.0005, 5e-7)
    for load, seconds in steps(*[(0, 64 * n, 2048 * n * n) for n in range(1, 9)], cost=cost):
        times.observe(load, seconds)
    for n in range(500):
        ((load, seconds),) = steps((8, 32, 10_000 + 50 * n), cost=cost)
        times.observe(load, seconds * (0.8 if n % 2 else 1.2))
    ((load, seconds),) = steps((0, 512, 131_328), cost=cost)
    assert times.estimate(load) == pytest.approx(seconds, rel=0.35)


def test_a_step_with_a_prompt_in_it_stays_within_the_stretch():
    """The work of a step is what fits into the time; its cost here is what the model can express."""
    budget = StepBudget(512, 2.0)
    decode, mixed = (0.02, 0.001, 1e-8), (0.01, 0.0006, 2e-8)
    for n in range(30):
        for load, seconds in steps((8, 8, 1000 + n), cost=decode):
            budget.observe(load, seconds)
        for load, seconds in steps((0, 16 * n + 16, 9000 * n), cost=mixed):
            budget.observe(load, seconds)
    usual = steps((8, 8, 1000), cost=decode)[0][1]
    start = 0
    while start < 1500:
        allowance = budget.allow(8, 1000, 1)
        tokens = allowance.take(start, 1500 - start)
        assert tokens % 8 == 0 or start + tokens == 1500
        load = allowance.load
        seconds = steps((load.decoding, load.tokens, load.pairs), cost=mixed)[0][1]
        assert seconds <= 2.05 * usual
        assert seconds >= 1.6 * usual or start + tokens == 1500
        start += tokens
    alone = budget.allow(0, 0, 1)
    assert (alone.take(0, 1500), alone.take(512, 1500)) == (512, 0)
    crowd = budget.allow(1, 100, 15)  # fifteen wait for their first token, one for its next
    assert sum(crowd.take(0, 32) for _ in range(15)) > 400


def test_a_prompt_moves_on_in_every_step_however_tight_the_budget():
    budget = StepBudget(512, 1.01)
    assert 0 < budget.allow(8, 1000, 1).take(0, 1500) <= 64  # nothing measured yet
    for load, seconds in steps((8, 8, 1000), (8, 500, 90_000), cost=(0.02, 0.01, 0.0)):
        budget.observe(load, seconds)
    allowance = budget.allow(8, 1000, 2)
    assert (allowance.take(0, 1500), allowance.take(0, 1500)) == (16, 0)


def test_an_adapter_that_overflows_ends_its_own_request_only(model_dir, adapters, tmp_path):
    huge = make_adapter(model_dir, tmp_path / "huge", 7, r=2, target_modules=["down_proj"])
    weights = load_file(tmp_path / "huge" / "adapter_model.safetensors")
    save_file(
        {key: value * (1e38 if "lora_B" in key else 1) for key, value in weights.items()},
        tmp_path / "huge" / "adapter_model.safetensors",
    )
    with Engine(model_dir) as engine:
        expected = [engine.ask(PROMPT, uses).ids for uses in ([], [use(adapters[0])])]
        engine.submit("base", PROMPT)
        engine.submit("bad", PROMPT, [use(huge)])
        engine.submit("adapter", PROMPT, [use(adapters[0])])
        bad = engine.wait("bad")
        assert (bad.finish_reason, bad.ids) == ("error", [])
        assert bad.error.startswith("[NOT_FINITE] ")
        assert [engine.wait("base").ids, engine.wait("adapter").ids] == expected
        # whoever gets its blocks next reads nothing of what it left there
        assert [engine.ask(PROMPT, uses).ids for uses in ([], [use(adapters[0])])] == expected
        engine.assert_nothing_held()


def test_a_fault_in_a_step_ends_its_requests_and_nothing_else(model_dir, adapters, monkeypatch):
    def fails(chunks):
        torch.zeros(2, 3) @ torch.zeros(2, 3)

    with Engine(model_dir) as engine:
        expected = engine.ask(PROMPT, [use(adapters[0])]).ids
        with monkeypatch.context() as patch:
            patch.setattr(engine.engine._model, "forward", fails)
            answer = engine.ask(PROMPT, [use(adapters[0])])
        assert answer.error.startswith("[INTERNAL] a step failed: RuntimeError: ")
        assert engine.ask(PROMPT, [use(adapters[0])]).ids == expected
        engine.assert_nothing_held()
        assert engine.engine.failed is None


def test_a_loop_that_cannot_go_on_says_so(model_dir):
    """`emit` belongs to the host; when it breaks, nothing can be delivered any more."""

    def broken(_):
        raise ValueError("nobody listens")

    engine = Engine(model_dir)
    engine.engine.start(broken)
    engine.submit("a", PROMPT)
    engine.engine._thread.join(60)
    assert isinstance(engine.engine.failed, ValueError)
    engine.engine.shutdown()


def test_stats_count_what_runs(model_dir, adapters):
    gate = Gate()
    with Engine(model_dir, gate, max_batch=2, kv_cache_tokens=1024, block_size=16) as engine:
        before = engine.engine.stats()
        assert (before.steps, before.running, before.waiting) == (0, 0, 0)
        assert (before.kv_blocks_used, before.kv_blocks_total) == (0, 64)
        engine.submit("a", make_prompt(0, 33), [use(adapters[0])])
        gate.arrive()
        engine.submit("b", PROMPT)
        engine.submit("c", PROMPT)
        gate.step()
        stats = engine.engine.stats()
        assert (stats.running, stats.waiting, stats.kv_blocks_used, stats.adapters_loaded) == (2, 1, 3 + 2, 1)
        gate.open()
        engine.wait("c")


def test_a_random_workload_leaks_nothing(model_dir, adapters):
    """Submissions, cancels, bad requests and few of everything; then all is given back and answers are still right."""
    chance = random.Random(4)
    with Engine(
        model_dir, max_batch=5, max_step_tokens=12, kv_cache_tokens=256, block_size=4, max_adapters=2, max_waiting=25
    ) as engine:
        expected = engine.ask(PROMPT, [use(adapters[0], 0.5), use(adapters[1])]).ids
        names = []
        for number in range(200):
            names.append(f"r{number}")
            uses = [use(path, chance.uniform(-1, 1)) for path in chance.sample(adapters, chance.randrange(3))]
            engine.submit(
                names[-1],
                make_prompt(number, chance.randrange(1, 97)),
                uses,
                priority=chance.randrange(3),
                max_tokens=chance.randrange(1, 30),
                temperature=chance.choice([0.0, 1.0]),
                repetition_penalty=chance.choice([1.0, 1.2]),
                eos_token_ids=(chance.randrange(VOCAB),),
            )
            if chance.random() < 0.4:
                engine.engine.cancel(chance.choice(names))
            if chance.random() < 0.5:
                name = chance.choice(names)
                engine.until(lambda answers, name=name: name in answers or len(answers) > 20)
        for name in names:
            engine.wait(name)
        engine.assert_nothing_held()
        reasons = {engine.answers[name].finish_reason for name in names}
        assert reasons == {"stop", "length", "cancelled", "error"}
        again = engine.ask(PROMPT, [use(adapters[0], 0.5), use(adapters[1])]).ids
        assert again == expected
        engine.assert_nothing_held()
