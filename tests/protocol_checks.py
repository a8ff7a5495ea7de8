"""What every engine must do. Each check gets a `World`: an engine, a small model and adapters for it.

The checks are functions, so that the same ones judge every engine, and engines that were broken on purpose.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_rig import InProcessRig
from parity import Case, Oracle, assert_equal
from protocol_sampling import (
    a_draw_is_a_draw,
    a_parameter_does_what_it_says_or_is_refused,
    a_seed_gives_the_same_answer_again,
    answers_end_where_they_must,
    log_probabilities_are_the_models,
)
from protocol_world import MAX_MODEL_LEN, MAX_RANK, PROMPT, SLOTS, World
from tiny_models import MIXES, VOCAB, digest_of, make_adapter, make_prompt, use

from openlora.engine.api import WEIGHT_ONE, AdapterUse
from openlora.errors import InvalidArgument


def greedy_answers_are_those_of_transformers_and_peft(world: World) -> None:
    """Base, adapters and weighted ensembles of different ranks, all in one batch."""
    rig = world.rig
    prompts = [make_prompt(seed, length) for seed, length in enumerate((5, 17, 61))]
    for number, prompt in enumerate(prompts):
        for mix in MIXES:
            rig.submit(f"{number} {mix}", prompt, world.uses(mix), max_tokens=10)

    def next_logprobs(sequence, mix):
        return dict(rig.ask(sequence, world.uses(mix), max_tokens=1, logprobs=20).logprobs[0].top)

    cases = [
        Case(prompt, mix, rig.wait(f"{number} {mix}").ids, 10, (), lambda ids, mix=mix: next_logprobs(ids, mix))
        for number, prompt in enumerate(prompts)
        for mix in MIXES
    ]
    assert_equal(Oracle(world.store.model_dir, world.store.adapters), cases)
    assert len({tuple(case.ids) for case in cases}) == len(cases), "the adapters must make a difference"


def forty_adapters_at_once_through_eight_slots(world: World) -> None:
    """All answer, each as it does alone."""
    adapters = [use(path) for path in world.store.more(40)]
    for number, one in enumerate(adapters):
        world.rig.submit(f"together {number}", PROMPT, [one], max_tokens=6)
    together = [world.rig.wait(f"together {number}") for number in range(40)]
    assert [answer.error for answer in together] == [""] * 40
    alone = [world.rig.ask(PROMPT, [one], max_tokens=6).ids for one in adapters]
    assert [answer.ids for answer in together] == alone
    assert len({tuple(ids) for ids in alone}) > 20


def versions_under_one_name_do_not_mix(world: World) -> None:
    """Two versions in turns, in the same directory name elsewhere; what was loaded first stays what it is."""
    first, second = world.scratch / "v1" / "name", world.scratch / "v2" / "name"
    for directory, seed in ((first, 71), (second, 72)):
        make_adapter(world.store.model_dir, directory, seed, r=3, target_modules=["q_proj", "o_proj"])
    expected = Oracle(world.store.model_dir, {"v1": str(first), "v2": str(second)})
    for _ in range(2):
        for name, directory in (("v1", first), ("v2", second)):
            answer = world.rig.ask(PROMPT, [use(str(directory))], max_tokens=8)
            assert answer.ids == expected.greedy(PROMPT, [(name, 1.0)], 8).ids


def tokens_come_as_they_are_made(world: World) -> None:
    """Several outputs, each with its own tokens and no others."""
    answer = world.rig.ask(PROMPT, world.uses(MIXES[1]), max_tokens=24, logprobs=0)
    assert answer.outputs > 4
    assert len(answer.ids) == len(answer.logprobs) == 24
    assert [one.token_id for one in answer.logprobs] == answer.ids
    assert answer.ids == world.rig.ask(PROMPT, world.uses(MIXES[1]), max_tokens=24).ids


def a_cancelled_request_ends_at_once_and_alone(world: World) -> None:
    rig = world.rig
    expected = rig.ask(PROMPT, world.uses(MIXES[1]), max_tokens=60).ids
    rig.submit("stays", PROMPT, world.uses(MIXES[1]), max_tokens=60)
    rig.submit("goes", PROMPT, world.uses(MIXES[2]), max_tokens=70)
    rig.until(lambda answers: "goes" in answers)
    rig.cancel("goes")
    gone = rig.wait("goes")
    assert gone.finish_reason == "cancelled"
    assert 0 < len(gone.ids) < 70
    assert rig.wait("stays").ids == expected
    rig.cancel("goes")
    rig.cancel("never heard of")
    rig.submit("at once", PROMPT, world.uses(MIXES[1]), max_tokens=60)
    rig.cancel("at once")
    assert rig.wait("at once").finish_reason == "cancelled"
    assert rig.ask(PROMPT).finish_reason == "length"


def a_cancelled_request_leaves_nothing_running(world: World) -> None:
    rig = world.rig
    for number in range(5):
        rig.submit(f"leaves {number}", PROMPT, world.uses(MIXES[number % 3]), max_tokens=70)
    rig.until(lambda answers: all(f"leaves {number}" in answers for number in range(5)))
    for number in range(5):
        rig.cancel(f"leaves {number}")
    for number in range(5):
        rig.wait(f"leaves {number}")
    rig.ask(PROMPT, max_tokens=30)
    stats = rig.stats()
    for _ in range(50):
        if (stats.running, stats.waiting) == (0, 0):
            return
        rig.ask(PROMPT, max_tokens=2)
        stats = rig.stats()
    raise AssertionError(f"something still runs: {stats}")


REFUSALS = [
    ((), {}, "prompt: is empty, at least one token is right"),
    ((5, VOCAB), {}, f"prompt: token id {VOCAB} is outside the vocabulary of {VOCAB}"),
    ((5, -1), {}, f"prompt: token id -1 is outside the vocabulary of {VOCAB}"),
    ((5,), {"max_tokens": 0}, "max_tokens: 0 is too small, at least 1 is right"),
    ((5,), {"eos_token_ids": (999,)}, f"eos_token_ids: token id 999 is outside the vocabulary of {VOCAB}"),
    ((5,), {"bad_words": ((3, 999),)}, f"bad_words: token id 999 is outside the vocabulary of {VOCAB}"),
    ((5,), {"bad_words": ((3,), ())}, "bad_words: a word has no tokens"),
    (
        make_prompt(0, MAX_MODEL_LEN),
        {},
        f"prompt: {MAX_MODEL_LEN} tokens leave no room for an answer, max_model_len is {MAX_MODEL_LEN}",
    ),
]


def what_makes_no_sense_is_refused(world: World) -> None:
    for prompt, sampling, message in REFUSALS:
        answer = world.rig.ask(prompt, **sampling)
        assert (answer.finish_reason, answer.ids, answer.error) == ("error", [], f"[INVALID_ARGUMENT] {message}")


def a_running_id_is_not_taken_twice(world: World) -> None:
    rig = world.rig
    rig.submit("twice", PROMPT, max_tokens=40)
    rig.until(lambda answers: "twice" in answers)
    if isinstance(rig, InProcessRig):  # a host says it by an output, which a rig can't tell from the running one's
        with pytest.raises(InvalidArgument, match="request_id: 'twice' is still running"):
            rig.submit("twice", PROMPT)
    assert len(rig.wait("twice").ids) == 40
    del rig.answers["twice"]
    rig.submit("twice", PROMPT, max_tokens=3)
    assert len(rig.wait("twice").ids) == 3


def a_late_request_is_told_so(world: World) -> None:
    rig = world.rig
    rig.submit("late", PROMPT, world.uses(MIXES[1]), timeout=0.0)
    assert rig.wait("late").error == "[DEADLINE_EXCEEDED] not finished in 0 ms"
    rig.submit("patient", PROMPT, world.uses(MIXES[1]), timeout=60.0)
    assert rig.wait("patient").finish_reason == "length"


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def bad_adapters_are_refused_and_nobody_else_suffers(world: World) -> None:
    def poison(value):
        return lambda tensors: tensors[Q0.format("B")].__setitem__((0, 0), value)

    lost = world.copy("all")
    (Path(lost) / "adapter_model.safetensors").unlink()
    cases = [
        (world.copy("all", poison(float("nan"))), "model.layers.0.self_attn.q_proj.lora_B holds NaN or Inf"),
        (world.copy("all", lambda tensors: tensors.pop(Q0.format("A"))), "model.layers.0.self_attn.q_proj.lora_A is m"),
        (world.copy("all", r=MAX_RANK + 1), f"rank {MAX_RANK + 1} is over the limit of {MAX_RANK}"),
        (world.copy("all", r=5), "model.layers.0.mlp.down_proj.lora_A has shape (4, 96), (5, 96) is right"),
        (world.copy("all", use_dora=True), "DoRA is not supported"),
        (world.copy("all", target_modules=["q_proj"]), "weights for 18 modules not in target_modules, the first is "),
        (
            world.copy("all", lambda tensors: tensors.update({Q0.format("B"): torch.zeros(60, 4)})),
            "model.layers.0.self_attn.q_proj.lora_B has shape (60, 4), (128, 4) is right",
        ),
        (
            world.copy(
                "all", lambda tensors: tensors.update({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 64)})
            ),
            "key base_model.model.lm_head.lora_A.weight matches no adaptable linear of the base model",
        ),
        (lost, "adapter_model.safetensors is missing"),
    ]
    expected = world.rig.ask(PROMPT, world.uses(MIXES[1])).ids
    for number, (path, reason) in enumerate(cases):
        world.rig.submit(f"neighbour {number}", PROMPT, world.uses(MIXES[1]))
        for uses in ([use(path)], [*world.uses(MIXES[2]), use(path, 0.5)]):
            answer = world.rig.ask(PROMPT, uses)
            assert (answer.ids, answer.finish_reason) == ([], "error")
            assert answer.error.startswith(f"[ADAPTER_INVALID] adapter {digest_of(path)}: {reason}"), answer.error
        assert world.rig.wait(f"neighbour {number}").ids == expected


def bytes_other_than_the_digests_are_refused(world: World) -> None:
    path = world.copy("all")
    checked = use(path)
    right = (Path(path) / "adapter_config.json").read_bytes()
    shutil.copy(Path(world.store.adapters["patterns"]) / "adapter_config.json", path)
    answer = world.rig.ask(PROMPT, [checked])
    assert answer.error.startswith(f"[ADAPTER_INVALID] adapter {checked.digest}: ")
    (Path(path) / "adapter_config.json").write_bytes(right)
    assert world.rig.ask(PROMPT, [checked]).finish_reason == "length"


def the_weight_that_counts_is_the_recorded_integer(world: World) -> None:
    """1e-6 units; weight 0 adds nothing."""
    path = world.store.adapters["all"]
    base, zero, unit, whole = (
        world.rig.ask(PROMPT, uses, logprobs=0, max_tokens=1).logprobs[0]
        for uses in ([], *([AdapterUse(digest_of(path), path, weight)] for weight in (0, 1, WEIGHT_ONE)))
    )
    assert zero.token_id == base.token_id
    assert abs(zero.logprob - base.logprob) < 1e-5
    assert abs(unit.logprob - base.logprob) < 1e-4
    assert abs(whole.logprob - base.logprob) > 1e-3


def prefixes_are_shared_under_one_salt_and_adapter_only(world: World) -> None:
    prompt = make_prompt(33, 80)
    rig, uses = world.rig, world.uses(MIXES[1])

    def cached(name: str, adapters, salt: str) -> int:
        rig.submit(name, prompt, adapters, salt=salt, max_tokens=4)
        answer = rig.wait(name)
        assert answer.finish_reason == "length", answer.error
        return answer.cached_tokens

    assert cached("first", uses, "alice") == 0
    assert cached("again", uses, "alice") >= 32
    assert cached("other caller", uses, "bob") == 0
    assert cached("base", [], "alice") == 0
    assert cached("other adapter", world.uses(MIXES[2]), "alice") == 0
    assert cached("other weight", world.uses((("all", 0.5),)), "alice") == 0


def an_ensemble_may_not_outgrow_the_engine(world: World) -> None:
    """Where ensembles become one adapter: the ranks of its members add up."""
    if not world.one_adapter:
        return
    large = [
        use(make_adapter(world.store.model_dir, world.scratch / str(seed), seed, r=33, target_modules=["q_proj"]))
        for seed in range(2)
    ]
    assert world.rig.ask(PROMPT, large[:1]).finish_reason == "length"
    assert world.rig.ask(PROMPT, large).error == (
        "[INVALID_ARGUMENT] adapters: ranks 33 + 33 make 66, at most 64 fit into one adapter of this engine"
    )


def an_idle_engine_says_so(world: World) -> None:
    """With no request to move it: whoever thinks that it has work, and sees no step, would end it."""
    world.rig.ask(PROMPT, world.uses(MIXES[1]), max_tokens=8)
    for _ in range(200):
        stats = world.rig.stats()
        if (stats.running, stats.waiting) == (0, 0):
            return
        threading.Event().wait(0.05)
    raise AssertionError(f"it is idle and says that it is not: {stats}")


def statistics_move(world: World) -> None:
    before = world.rig.stats()
    world.rig.ask(PROMPT, world.uses(MIXES[1]), max_tokens=8)
    after = world.rig.stats()
    assert after.steps > before.steps
    uses = [
        stats.adapters.hits_device + stats.adapters.hits_host + stats.adapters.hits_disk for stats in (before, after)
    ]
    assert uses[1] == uses[0] + 1
    assert after.adapters.slots == SLOTS


CHECKS: dict[str, Callable[[World], None]] = {
    check.__name__: check
    for check in (
        greedy_answers_are_those_of_transformers_and_peft,
        forty_adapters_at_once_through_eight_slots,
        versions_under_one_name_do_not_mix,
        tokens_come_as_they_are_made,
        a_cancelled_request_ends_at_once_and_alone,
        a_cancelled_request_leaves_nothing_running,
        what_makes_no_sense_is_refused,
        a_running_id_is_not_taken_twice,
        answers_end_where_they_must,
        log_probabilities_are_the_models,
        a_draw_is_a_draw,
        a_seed_gives_the_same_answer_again,
        a_parameter_does_what_it_says_or_is_refused,
        a_late_request_is_told_so,
        bad_adapters_are_refused_and_nobody_else_suffers,
        bytes_other_than_the_digests_are_refused,
        the_weight_that_counts_is_the_recorded_integer,
        prefixes_are_shared_under_one_salt_and_adapter_only,
        an_ensemble_may_not_outgrow_the_engine,
        an_idle_engine_says_so,
        statistics_move,
    )
}
