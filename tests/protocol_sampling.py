"""What every engine must do with the parameters of a request; `protocol_checks.CHECKS` has these checks too."""

from __future__ import annotations

from collections.abc import Callable

import torch
from parity import Oracle
from protocol_world import MAX_MODEL_LEN, PROMPT, World
from tiny_models import MIXES, make_prompt


def answers_end_where_they_must(world: World) -> None:
    """At an end token, which is part of them; not before `min_tokens`; at the model's length."""
    rig = world.rig
    ids = rig.ask(PROMPT, world.uses(MIXES[1]), max_tokens=12).ids
    end = ids[4]
    at = ids.index(end)
    for sampling in ({"eos_token_ids": (end,)}, {"stop_token_ids": (end,)}):
        stopped = rig.ask(PROMPT, world.uses(MIXES[1]), **sampling)
        assert (stopped.ids, stopped.finish_reason) == (ids[: at + 1], "stop")
    if "min_tokens" not in world.refuses:
        later = rig.ask(PROMPT, world.uses(MIXES[1]), stop_token_ids=(end,), min_tokens=at + 2)
        assert len(later.ids) >= at + 2 and later.ids[: at + 1] != ids[: at + 1]
    last = rig.ask(make_prompt(0, MAX_MODEL_LEN - 1), max_tokens=5)
    assert (len(last.ids), last.finish_reason) == (1, "length")
    cut = rig.ask(make_prompt(0, MAX_MODEL_LEN - 10), max_tokens=1000)
    assert (len(cut.ids), cut.finish_reason) == (10, "length")


def log_probabilities_are_the_models(world: World) -> None:
    """Before temperature and penalties, the most likely first."""
    penalty = {} if "repetition_penalty" in world.refuses else {"repetition_penalty": 1.3}
    answer = world.rig.ask(PROMPT, world.uses(MIXES[5]), max_tokens=3, logprobs=5, temperature=1.7, seed=3, **penalty)
    oracle = Oracle(world.store.model_dir, world.store.adapters)
    for position, found in enumerate(answer.logprobs):
        expected = torch.log_softmax(oracle.logits([*PROMPT, *answer.ids[:position]], MIXES[5])[-1], -1)
        assert abs(found.logprob - expected[answer.ids[position]].item()) < 1e-3
        assert [token for token, _ in found.top] == expected.topk(5).indices.tolist()
    none, zero = (world.rig.ask(PROMPT, max_tokens=2, logprobs=count) for count in (None, 0))
    assert none.logprobs == []
    assert [one.top for one in zero.logprobs] == [(), ()]


def a_draw_is_a_draw(world: World) -> None:
    """Temperature alone makes it one, without any filter."""
    asked = [world.rig.ask(PROMPT, world.uses(MIXES[1]), temperature=1.0, seed=seed).ids for seed in range(5)]
    assert len({tuple(ids) for ids in asked}) > 3


def a_seed_gives_the_same_answer_again(world: World) -> None:
    """Or is refused where the client gave it, and did not come from us."""
    settings = {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "max_tokens": 12, "seed_given": True}
    first = world.rig.ask(PROMPT, world.uses(MIXES[1]), seed=7, **settings)
    if "seed" in world.refuses:
        assert first.ids == [] and first.error.startswith("[INVALID_ARGUMENT] seed: ")
        greedy = world.rig.ask(PROMPT, world.uses(MIXES[1]), seed=7, seed_given=True)
        assert greedy.ids == world.rig.ask(PROMPT, world.uses(MIXES[1])).ids
        return
    assert first.ids == world.rig.ask(PROMPT, world.uses(MIXES[1]), seed=7, **settings).ids
    others = {tuple(world.rig.ask(PROMPT, world.uses(MIXES[1]), seed=seed, **settings).ids) for seed in range(5)}
    assert len(others) > 3


def a_parameter_does_what_it_says_or_is_refused(world: World) -> None:
    """Never taken and ignored: whoever reads an answer would believe that it was made so."""
    rig, uses = world.rig, world.uses(MIXES[1])
    plain = rig.ask(PROMPT, uses, max_tokens=24).ids
    cases: dict[str, tuple[dict, Callable[[list[int]], bool]]] = {
        "repetition_penalty": ({"repetition_penalty": 9.0}, lambda ids: not set(ids) & set(PROMPT)),
        "presence_penalty": ({"presence_penalty": 2.0}, lambda ids: ids != plain),
        "frequency_penalty": ({"frequency_penalty": 2.0}, lambda ids: ids != plain),
        "min_p": ({"min_p": 1.0, "temperature": 1.0}, lambda ids: ids == plain),
        "bad_words": ({"bad_words": ((plain[0],),)}, lambda ids: plain[0] not in ids),
        "min_tokens": ({"min_tokens": 3, "stop_token_ids": (plain[0],)}, lambda ids: len(ids) >= 3),
    }
    for name, (sampling, as_it_says) in cases.items():
        answer = rig.ask(PROMPT, uses, **{"max_tokens": 24, **sampling})
        if name in world.refuses:
            assert answer.ids == [] and answer.error.startswith(f"[INVALID_ARGUMENT] {name}: "), answer.error
        else:
            assert not answer.error and as_it_says(answer.ids), (name, plain, answer)
    rig.submit("prior", PROMPT, uses, priority=1)
    assert rig.wait("prior").error.startswith("[INVALID_ARGUMENT] priority: " if "priority" in world.refuses else "")
