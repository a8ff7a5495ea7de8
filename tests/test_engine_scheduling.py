"""Requests through the engine: every one ends once, cancel works in every phase, nothing leaks, nobody starves."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB, Engine, digest_of, make_adapter, make_model, make_prompt, use

from openlora.engine.api import EngineOutput
from openlora.engine.lora import LoraPair
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
        assert scheduler.slots.pinned == 0
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
        read = engine.engine._slots._read

        def slow_read(digest: str, path: str):
            reading.set()
            assert released.wait(60)
            return read(digest, path)

        engine.engine._slots._read = slow_read
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


def test_a_fault_in_a_step_ends_its_requests_and_nothing_else(model_dir, adapters):
    with Engine(model_dir) as engine:
        expected = engine.ask(PROMPT, [use(adapters[0])]).ids
        slots = engine.engine._slots
        slot = slots._slots[digest_of(adapters[0])]
        good = slot.loading.result().pairs
        name, pair = next(iter(good.items()))
        good[name] = LoraPair(torch.zeros(3, 5), pair.b, 1.0)  # a shape that no forward can take
        answer = engine.ask(PROMPT, [use(adapters[0])])
        assert answer.error.startswith("[INTERNAL] a step failed: RuntimeError: ")
        good[name] = pair
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
