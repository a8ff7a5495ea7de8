"""Computed prefixes are used again by exactly those who may, and change no answer."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from engine_rig import Answer
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from live_server import LiveServer
from raw_calls import ask
from safetensors.torch import load_file, save_file
from scheduler_run import SchedulerRun
from tiny_models import VOCAB, Engine, make_adapter, make_model, make_prompt, use
from typer.testing import CliRunner

from openlora.adapters.commands import adapters_app
from openlora.engine.api import WEIGHT_ONE, AdapterUse, EngineRequest, Sampling
from openlora.engine.block_pool import BlockPool
from openlora.engine.prefix_cache import KeyChain, block_key, root_key

BLOCK = 16  # the engine's default
PROMPT = make_prompt(1, 40)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def adapters(model_dir, tmp_path_factory) -> list[str]:
    directory = tmp_path_factory.mktemp("adapters")
    return [make_adapter(model_dir, directory / str(seed), seed, target_modules=["v_proj"]) for seed in range(2)]


def assert_same(found: Answer, expected: Answer) -> None:
    assert found.ids == expected.ids
    for one, other in zip(found.logprobs, expected.logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


# Keys


def test_a_key_depends_on_all_that_its_content_depends_on():
    one, two = AdapterUse("a" * 64, "path", WEIGHT_ONE), AdapterUse("b" * 64, "path", 2)
    keys = [
        root_key(base, uses, salt)
        for base in ("0" * 64, "1" * 64)
        for uses in ((), (one,), (two,), (one, two), (AdapterUse("a" * 64, "path", 2), two), (one, one))
        for salt in ("", "alice", "bob")
    ]
    assert len(set(keys)) == len(keys) == 36
    assert root_key("0", (one, two), "") == root_key("0", (two, one), "")
    assert root_key("0", (AdapterUse("a" * 64, "elsewhere", WEIGHT_ONE),), "") == root_key("0", (one,), "")
    assert root_key("ab", (), "c") != root_key("a", (), "bc")


def test_a_block_depends_on_everything_before_it():
    chain = KeyChain(bytes(32), 4)
    tokens = list(range(12))
    assert chain.of(1, tokens) == block_key(block_key(bytes(32), [0, 1, 2, 3]), [4, 5, 6, 7])
    for changed in (0, 5):
        other = KeyChain(bytes(32), 4)
        edited = [99 if index == changed else token for index, token in enumerate(tokens)]
        same = [other.of(index, edited) == chain.of(index, tokens) for index in range(3)]
        assert same == [index < changed // 4 for index in range(3)]


# Blocks


class Pool(RuleBasedStateMachine):
    """Any order of calls against a model that says who holds what and what was written under which key."""

    TOTAL = 6

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(range(1, self.TOTAL + 1))
        self.owners: list[list[int]] = []
        self.content: dict[int, bytes] = {}  # what the last writer of a published block called it
        self.recent: list[int] = []  # idle blocks, least recently released first

    @precondition(lambda self: self.pool.available)
    @rule(data=st.data())
    def take(self, data):
        count = data.draw(st.integers(1, self.pool.available))
        free = self.TOTAL - self.pool.held - self.pool.idle
        taken = self.pool.take(count)
        evicted, self.recent = self.recent[: max(0, count - free)], self.recent[max(0, count - free) :]
        assert len(set(taken)) == count
        assert not set(taken) & {block for owner in self.owners for block in owner}
        assert not set(taken) & set(self.recent)
        assert set(evicted) <= set(taken)
        for block in taken:
            self.content.pop(block, None)
        self.owners.append(taken)

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), key=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def publish(self, data, key):
        block = data.draw(st.sampled_from(data.draw(st.sampled_from(self.owners))))
        self.pool.publish(block, key)
        if key not in self.content.values():
            self.content.setdefault(block, key)

    @rule(key=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def find_and_hold(self, key):
        block = self.pool.find(key)
        assert (block is not None) == (key in self.content.values())
        if block is not None:
            assert self.content[block] == key
            self.pool.hold(block)
            self.owners.append([block])
            if block in self.recent:
                self.recent.remove(block)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def release(self, data):
        owner = self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1)))
        self.pool.release(owner)
        held = {block for other in self.owners for block in other}
        self.recent += [block for block in reversed(owner) if block not in held and block in self.content]

    @rule(block=st.integers(1, TOTAL))
    def withdraw(self, block):
        self.pool.withdraw(block)
        self.content.pop(block, None)
        if block in self.recent:
            self.recent.remove(block)

    @invariant()
    def everything_is_accounted_for(self):
        held = [block for owner in self.owners for block in owner]
        assert {block: self.pool.holders(block) for block in held} == {block: held.count(block) for block in held}
        assert self.pool.held == len(set(held))
        assert list(self.pool._idle) == self.recent
        assert len(self.pool._free) + self.pool.held + self.pool.idle == self.TOTAL
        assert self.pool.available == self.TOTAL - self.pool.held
        for block in set(held):
            assert self.pool.writable(block) == (held.count(block) == 1 and block not in self.content)


Pool.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
test_pool = Pool.TestCase


def test_the_least_recently_used_prefix_goes_first_and_its_end_before_its_beginning():
    run = SchedulerRun(blocks=12, block_size=4)
    for token in (1, 2, 1, 3):  # each leaves two blocks of prompt and one of output
        run.add([token] * 8, max_tokens=5)
        run.finish()
    assert (run.cache.pool.idle, run.cache.pool.available) == (9, 12)
    run.add([4] * 24, max_tokens=1)  # needs three blocks more than are free
    run.finish()

    def kept(token: int) -> list[bool]:
        chain = run.scheduler.prefix.chain(EngineRequest("", (token,), (), Sampling()))
        return [run.cache.pool.find(chain.of(index, [token] * 12)) is not None for index in range(3)]

    # The second request for 1 did not ask for the output of the first.
    assert (kept(1), kept(2), kept(3)) == ([True, True, False], [True, False, False], [True, True, True])


# Answers


def test_a_prefix_is_computed_once_and_changes_no_answer(model_dir, adapters):
    with Engine(model_dir, prefix_cache=False) as engine:
        expected = [engine.ask(PROMPT, uses, logprobs=0) for uses in ([], [use(adapters[0])])]
        assert engine.ask(PROMPT).cached_tokens == 0
        assert engine.engine.stats().kv_blocks_cached == 0
    with Engine(model_dir) as engine:
        for uses, answer in zip(([], [use(adapters[0])]), expected, strict=True):
            first, second = engine.ask(PROMPT, uses, logprobs=0), engine.ask(PROMPT, uses, logprobs=0)
            assert (first.cached_tokens, second.cached_tokens) == (0, 2 * BLOCK)
            assert_same(first, answer)
            assert_same(second, answer)
        stats = engine.engine.stats()
        assert (stats.prefix_lookup_tokens, stats.prefix_hit_tokens) == (4 * 40, 2 * 2 * BLOCK)
        assert stats.kv_blocks_cached == 2 * (51 // BLOCK)  # of the output, too; the last token is never computed
        engine.assert_nothing_held()


def test_a_prompt_that_ends_with_a_shared_block_writes_into_a_copy(model_dir):
    prompt = PROMPT[: 2 * BLOCK]
    with Engine(model_dir, prefix_cache=False) as engine:
        expected = engine.ask(prompt, logprobs=0)
    with Engine(model_dir) as engine:
        assert engine.ask(prompt, logprobs=0).cached_tokens == 0
        cache = engine.engine._scheduler.cache
        before = {block: cache.data[:, :, block].clone() for block in cache.pool._idle}
        for name in ("one", "other"):  # side by side
            engine.submit(name, prompt, logprobs=0)
        for name in ("one", "other"):
            answer = engine.wait(name)
            assert answer.cached_tokens == 2 * BLOCK - 1
            assert_same(answer, expected)
        assert all(torch.equal(cache.data[:, :, block], content) for block, content in before.items())
        engine.assert_nothing_held()


def test_the_next_turn_of_a_conversation_finds_the_answer_of_the_last(model_dir):
    with Engine(model_dir) as engine:
        answer = engine.ask(PROMPT, max_tokens=20)
        longer = (*PROMPT, *answer.ids, *make_prompt(2, 5))
        found = engine.ask(longer, logprobs=0)
        assert found.cached_tokens == (40 + 20 - 1) // BLOCK * BLOCK == 48
    with Engine(model_dir, prefix_cache=False) as engine:
        assert_same(found, engine.ask(longer, logprobs=0))


def test_requests_side_by_side_share_what_the_first_of_them_computes(model_dir):
    prefix = make_prompt(3, 64)
    with Engine(model_dir, max_batch=4, max_step_tokens=16) as engine:
        for number in range(4):
            engine.submit(str(number), (*prefix, 3 + number), logprobs=0)
        found = [engine.wait(str(number)) for number in range(4)]
        assert [answer.cached_tokens for answer in found[1:]] == [64] * 3
    with Engine(model_dir, prefix_cache=False) as engine:
        for number, answer in enumerate(found):
            assert_same(answer, engine.ask((*prefix, 3 + number), logprobs=0))


def test_nothing_is_shared_across_adapters_weights_and_salts(model_dir, adapters):
    """`same name, new version` is just another digest here; the test over a live server is below."""
    ways = [
        ([], ""),
        ([], "alice"),
        ([use(adapters[0])], ""),
        ([use(adapters[0], 0.5)], ""),
        ([use(adapters[1])], ""),
        ([use(adapters[1])], "alice"),
        ([use(adapters[0]), use(adapters[1])], ""),
        ([use(adapters[0]), use(adapters[1], 0.25)], ""),
    ]
    with Engine(model_dir, prefix_cache=False) as engine:
        expected = [engine.ask(PROMPT, uses) for uses, _ in ways]
    assert len({tuple(answer.ids) for answer in expected}) == 6  # salts change nothing, all else does
    with Engine(model_dir) as engine:
        for again in (False, True):
            for number, (uses, salt) in enumerate(ways):
                name = f"{number} {again}"
                engine.submit(name, PROMPT, uses, salt=salt)
                answer = engine.wait(name)
                assert answer.cached_tokens == (2 * BLOCK if again else 0)
                assert answer.ids == expected[number].ids
        swapped = engine.ask(PROMPT, [use(adapters[1]), use(adapters[0])])
        assert swapped.cached_tokens == 2 * BLOCK  # the order of a sum is no difference
        assert swapped.ids == expected[6].ids


def test_a_prompt_that_was_left_halfway_leaves_what_it_computed(model_dir):
    chance = random.Random(1)
    with Engine(model_dir, max_batch=2, max_step_tokens=BLOCK, prefix_cache=False) as engine:
        expected = engine.ask(make_prompt(5, 90), max_tokens=2, logprobs=0)
    with Engine(model_dir, max_batch=2, max_step_tokens=BLOCK) as engine:
        for number in range(20):
            engine.submit(str(number), make_prompt(5, 90), max_tokens=2)
            engine.submit(f"other {number}", make_prompt(chance.randrange(VOCAB), 5), max_tokens=1)
            engine.wait(f"other {number}")
            engine.engine.cancel(str(number))
            engine.wait(str(number))
        assert_same(engine.ask(make_prompt(5, 90), max_tokens=2, logprobs=0), expected)
        engine.assert_nothing_held()


def test_what_an_overflow_left_is_not_found_again(model_dir, adapters, tmp_path):
    shutil.copytree(adapters[0], tmp_path / "huge")
    weights = load_file(tmp_path / "huge" / "adapter_model.safetensors")
    huge = {key: value * (1e38 if "lora_B" in key else 1) for key, value in weights.items()}
    save_file(huge, tmp_path / "huge" / "adapter_model.safetensors")
    with Engine(model_dir) as engine:
        for _ in range(2):
            assert engine.ask(PROMPT, [use(str(tmp_path / "huge"))]).error.startswith("[NOT_FINITE]")
            stats = engine.engine.stats()
            assert (stats.prefix_hit_tokens, stats.kv_blocks_cached) == (0, 0)
        engine.assert_nothing_held()


def test_an_adapter_that_is_swapped_under_its_name_on_a_live_server(server: LiveServer, demo, demo_adapters, prompts):
    """The same long prompt before and after; what the first version computed must not meet the second."""
    prompt, sampling = " ".join(prompts[:8]), {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True}

    def answer(adapter: str | list[dict[str, object]]) -> list[int]:
        asked = adapter if isinstance(adapter, str) else json.dumps(adapter)
        reply = ask(server, prompt, sampling, adapters=asked)
        assert reply.error == ""
        return reply.token_ids

    def swap(adapter: str) -> None:
        arguments = ["add", str(demo / "adapters" / adapter), "--name", "swapped"]
        done = CliRunner().invoke(adapters_app, [*arguments, "--state-dir", str(server.state_dir)])
        assert done.exit_code == 0, done.stderr

    expected = [answer(adapter) for adapter in demo_adapters[:2]]
    assert expected[0] != expected[1]
    try:
        for adapter, tokens in zip(demo_adapters, expected, strict=False):
            swap(adapter)
            assert answer("swapped") == tokens
            assert answer("swapped") == tokens  # now from the cache
        assert answer([{"name": "swapped", "version": "1"}]) == expected[0]
    finally:
        CliRunner().invoke(adapters_app, ["remove", "swapped", "--state-dir", str(server.state_dir)])
