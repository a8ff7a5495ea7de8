"""Adapters in the engine: applied whole or refused, read beside decoding, any number of them through few slots."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from parity import Case, Oracle, assert_equal
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB, Engine, digest_of, make_adapter, make_model, make_prompt, projections, use

from openlora.engine.api import WEIGHT_ONE, AdapterUse

PROMPT = make_prompt(1, 20)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def adapter_dir(model_dir, tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("good") / "adapter"
    return make_adapter(model_dir, directory, 1, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def engine(model_dir):
    with Engine(model_dir, max_rank=16) as running:
        yield running


def changed(adapter_dir: str, directory: Path, config=None, tensors=None) -> str:
    """A copy of an adapter with other configuration values, and tensors changed in place by `tensors`."""
    shutil.copytree(adapter_dir, directory)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(config or {})}))
    if tensors is not None:
        values = load_file(directory / "adapter_model.safetensors")
        tensors(values)
        save_file(values, directory / "adapter_model.safetensors")
    return str(directory)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def _drop(key):
    return lambda tensors: tensors.pop(key)


def _put(key, value):
    return lambda tensors: tensors.update({key: value})


def _poison(value):
    def change(tensors):
        tensors[Q0.format("B")][3, 1] = value

    return change


REFUSALS = [
    ({"peft_type": "IA3"}, None, "peft_type is 'IA3', only 'LORA' is supported"),
    ({"use_dora": True}, None, "DoRA is not supported"),
    ({"bias": "all"}, None, "bias is 'all', only 'none' is supported"),
    ({"lora_bias": True}, None, "biases of LoRA matrices (lora_bias) are not supported"),
    ({"modules_to_save": ["lm_head"]}, None, "it brings whole modules (modules_to_save)"),
    ({"trainable_token_indices": [1]}, None, "trained token embeddings are not supported"),
    ({"target_parameters": ["w"]}, None, "LoRA on bare parameters (target_parameters) is not supported"),
    ({"alora_invocation_tokens": [5]}, None, "activated LoRA (aLoRA) is not supported"),
    ({"layer_replication": [[0, 1]]}, None, "layer replication changes the base model and is not supported"),
    ({"fan_in_fan_out": True}, None, "the setting fan_in_fan_out = True is not supported"),
    ({"a_future_field": "x"}, None, "the setting a_future_field = 'x' is not supported"),
    (
        {"init_lora_weights": "pissa"},
        None,
        "init_lora_weights 'pissa' trains against changed base weights; convert it with ",
    ),
    ({"r": 17}, None, "rank 17 is over the limit of 16"),
    ({"rank_pattern": {"v_proj": 99}}, None, "rank 99 is over the limit of 16"),
    ({"r": 0}, None, "rank r is 0, a whole number of at least 1 is wanted"),
    ({"lora_alpha": float("nan")}, None, "adapter_config.json is not JSON: NaN is not a JSON number"),
    ({"r": 5}, None, "model.layers.0.self_attn.q_proj.lora_A has shape (4, 64), (5, 64) is right"),
    ({"target_modules": "q_proj("}, None, "target_modules: 'q_proj(' is not a pattern"),
    (
        {"target_modules": ["q_proj"]},
        None,
        "weights for 3 modules not in target_modules, the first is model.layers.0.self_attn.v_proj",
    ),
    (
        {"target_modules": ["q_proj", "v_proj", "o_proj"]},
        None,
        "no weights for 3 targeted modules, the first is model.layers.0.self_attn.o_proj",
    ),
    ({}, _drop(Q0.format("A")), "model.layers.0.self_attn.q_proj.lora_A is missing"),
    (
        {},
        _put("base_model.model.model.layers.9.mlp.up_proj.lora_A.weight", torch.zeros(4, 64)),
        "key base_model.model.model.layers.9.mlp.up_proj.lora_A.weight matches no adaptable linear of the base model",
    ),
    (
        {},
        _put("base_model.model.lm_head.lora_A.weight", torch.zeros(4, 64)),
        "key base_model.model.lm_head.lora_A.weight matches no adaptable linear of the base model",
    ),
    (
        {},
        _put("base_model.model.model.embed_tokens.lora_embedding_A", torch.zeros(4, VOCAB)),
        "key base_model.model.model.embed_tokens.lora_embedding_A matches no adaptable linear of the base model",
    ),
    (
        {},
        _put(Q0.format("B"), torch.zeros(60, 4)),
        "model.layers.0.self_attn.q_proj.lora_B has shape (60, 4), (64, 4) is right",
    ),
    (
        {},
        _put(Q0.format("B"), torch.zeros(64, 4, dtype=torch.int32)),
        "model.layers.0.self_attn.q_proj.lora_B has dtype torch.int32, a floating-point type is right",
    ),
    ({}, _poison(float("nan")), "model.layers.0.self_attn.q_proj.lora_B holds NaN or Inf (as torch.float32)"),
    ({}, _poison(float("inf")), "model.layers.0.self_attn.q_proj.lora_B holds NaN or Inf (as torch.float32)"),
]


@pytest.mark.parametrize(("config", "tensors", "reason"), REFUSALS, ids=[reason[:40] for *_, reason in REFUSALS])
def test_an_adapter_that_cannot_be_applied_whole_is_refused(
    engine, model_dir, adapter_dir, tmp_path, config, tensors, reason
):
    bad = changed(adapter_dir, tmp_path / "bad", config, tensors)
    engine.submit("neighbour" + bad, PROMPT, [use(adapter_dir)])
    answer = engine.ask(PROMPT, [use(adapter_dir), use(bad)])
    assert (answer.ids, answer.finish_reason) == ([], "error")
    assert answer.error.startswith(f"[ADAPTER_INVALID] adapter {digest_of(bad)}: {reason}")
    assert engine.wait("neighbour" + bad).finish_reason == "length"
    engine.assert_nothing_held()


def test_broken_and_missing_files_are_refused(engine, adapter_dir, tmp_path):
    def refusal(directory: Path) -> str:
        answer = engine.ask(PROMPT, [use(str(directory))])
        prefix = f"[ADAPTER_INVALID] adapter {digest_of(str(directory))}: "
        assert answer.error.startswith(prefix)
        return answer.error.removeprefix(prefix)

    assert refusal(tmp_path / "nowhere") == "adapter_config.json is missing"
    shutil.copytree(adapter_dir, tmp_path / "weightless")
    (tmp_path / "weightless" / "adapter_model.safetensors").unlink()
    assert refusal(tmp_path / "weightless") == "adapter_model.safetensors is missing"
    shutil.copytree(adapter_dir, tmp_path / "torn")
    weights = tmp_path / "torn" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert refusal(tmp_path / "torn").startswith("adapter_model.safetensors can't be read: ")
    shutil.copytree(adapter_dir, tmp_path / "prose")
    (tmp_path / "prose" / "adapter_config.json").write_text("rank eight, please")
    assert refusal(tmp_path / "prose").startswith("adapter_config.json is not JSON: ")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_bytes_other_than_those_that_the_digest_names_are_refused(model_dir, adapter_dir, tmp_path, name):
    """A file of the cache was rewritten after it was checked: with another adapter's that would be as good, too."""
    good = Path(adapter_dir)
    other = Path(make_adapter(model_dir, tmp_path / "other", 2, r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"]))
    assert (good / name).read_bytes() != (other / name).read_bytes()
    swapped = shutil.copytree(good, tmp_path / "swapped")
    checked = use(str(swapped))
    shutil.copy(other / name, swapped / name)
    with Engine(model_dir) as fresh:
        answer = fresh.ask(PROMPT, [checked])
        assert (answer.ids, answer.finish_reason) == ([], "error")
        assert answer.error == (
            f"[ADAPTER_INVALID] adapter {checked.digest}: its files in the cache are not the ones that were checked, "
            f"they are {digest_of(str(swapped))}: add it again"
        )
        shutil.copy(good / name, swapped / name)
        assert fresh.ask(PROMPT, [checked]).finish_reason == "length"


def test_what_is_put_in_a_files_place_neither_hangs_nor_fills_the_memory(engine, adapter_dir, tmp_path):
    copy = Path(changed(adapter_dir, tmp_path / "copy"))
    checked = use(str(copy))
    weights = copy / "adapter_model.safetensors"
    os.truncate(weights, 1 << 40)
    assert "it has 1099511627776 bytes, its header speaks of " in engine.ask(PROMPT, [checked]).error
    weights.unlink()
    os.mkfifo(weights)
    assert "adapter_model.safetensors can't be read: it is not a regular file" in engine.ask(PROMPT, [checked]).error


def test_a_number_that_is_infinite_in_the_models_dtype_is_refused(model_dir, adapter_dir, tmp_path):
    big = changed(adapter_dir, tmp_path / "big", tensors=_poison(1e30))
    with Engine(model_dir, dtype="float16") as half:
        answer = half.ask(PROMPT, [use(big)])
    assert "holds NaN or Inf (as torch.float16)" in answer.error


def test_a_failed_read_is_tried_again(engine, adapter_dir, tmp_path):
    """Nothing about a failure is remembered: the file may have been late."""
    copy = changed(adapter_dir, tmp_path / "copy")
    late = AdapterUse(digest_of(copy), str(tmp_path / "late"), WEIGHT_ONE)
    assert "is missing" in engine.ask(PROMPT, [late]).error
    shutil.copytree(copy, late.path)
    assert engine.ask(PROMPT, [late]).ids == engine.ask(PROMPT, [use(adapter_dir)]).ids


def test_a_loaded_adapter_does_not_change_with_its_file(engine, adapter_dir, tmp_path):
    copy = changed(adapter_dir, tmp_path / "copy")
    loaded = use(copy)
    before = engine.ask(PROMPT, [loaded]).ids
    (tmp_path / "copy" / "adapter_model.safetensors").write_bytes(b"")
    assert engine.ask(PROMPT, [loaded]).ids == before


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 3},
        {"r": 8, "lora_alpha": 3, "use_rslora": True},
        {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 1}},
        {"r": 4, "rank_pattern": {"layers.1.self_attn.q_proj": 3, "q_proj": 6}, "use_rslora": True},
        {"r": 4, "alpha_pattern": {r".*\.mlp\..*": 1, r"layers\.0\..*": 9}, "lora_alpha": 2},
        {"r": 4, "rank_pattern": {"proj": 9, "^model.layers.2.self_attn.k_proj": 2}},
        {"r": 2, "target_modules": "all-linear"},
        {"r": 2, "target_modules": r".*layers\.[02]\.mlp\.(up|down)_proj"},
        {"r": 2, "layers_to_transform": [1]},
        {"r": 2, "exclude_modules": ["o_proj", "model.layers.0.self_attn.v_proj"]},
    ],
    ids=str,
)
def test_ranks_scalings_and_targets_are_those_of_peft(engine, model_dir, tmp_path, settings):
    adapter = make_adapter(
        model_dir, tmp_path / "adapter", 5, std=0.2, **{"target_modules": projections("llama"), **settings}
    )
    answer = engine.ask(PROMPT, [use(adapter)], max_tokens=1, logprobs=VOCAB)
    peft = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
    with torch.no_grad():
        logits = peft(input_ids=torch.tensor([PROMPT])).logits[0, -1]
    found = torch.empty(VOCAB)
    for token, logprob in answer.logprobs[0].top:
        found[token] = logprob
    assert (found - logits.log_softmax(-1)).abs().max() <= 1e-4 * logits.abs().max()


def test_more_adapters_than_slots_take_turns(model_dir, tmp_path):
    """Nine adapters and ensembles of them through three slots; nobody fails and every answer is right."""
    adapters = {
        f"a{seed}": make_adapter(
            model_dir, tmp_path / str(seed), seed, r=2 + seed, lora_alpha=4, target_modules=["q_proj", "up_proj"]
        )
        for seed in range(9)
    }
    names = list(adapters)
    mixes = [((name, 1.0),) for name in names] + [
        ((names[i], 0.5), (names[(i + 4) % 9], 0.5), (names[(i + 7) % 9], -0.25)) for i in range(9)
    ]
    with Engine(model_dir, max_adapters=3) as small:
        for turn in range(2):
            for mix in mixes:
                small.submit(f"{turn} {mix}", PROMPT, [use(adapters[name], weight) for name, weight in mix])
        cases = [Case(PROMPT, mix, small.wait(f"{turn} {mix}").ids, 12) for turn in range(2) for mix in mixes]
        small.assert_nothing_held()
        assert small.engine.stats().adapters_loaded <= 3
        too_many = small.ask(PROMPT, [use(adapters[name]) for name in names[:4]])
        assert too_many.error == "[INVALID_ARGUMENT] adapters: 4 adapters, at most 3 fit"
    assert_equal(Oracle(model_dir, adapters), cases)


def test_forty_adapters_at_once_in_eight_slots(model_dir, tmp_path):
    """With host memory for twelve: all answer, each as it does alone."""
    adapters = [
        use(make_adapter(model_dir, tmp_path / str(seed), seed, r=1 + seed % 8, target_modules=["q_proj", "up_proj"]))
        for seed in range(40)
    ]
    with Engine(model_dir, max_adapters=8) as roomy:
        alone = [roomy.ask(PROMPT, [one], max_tokens=8).ids for one in adapters]
        largest = max(entry.size for entry in roomy.engine._residency._entries.values())
    assert len({tuple(ids) for ids in alone}) > 20  # they differ
    with Engine(model_dir, max_adapters=8, host_adapter_bytes=12 * largest) as engine:
        for number, one in enumerate(adapters):
            engine.submit(str(number), PROMPT, [one], max_tokens=8)
        together = [engine.wait(str(number)) for number in range(40)]
        assert [answer.error for answer in together] == [""] * 40
        assert [answer.ids for answer in together] == alone
        engine.assert_nothing_held()
        stats = engine.engine.stats().adapters
        assert stats.host_bytes <= stats.host_limit_bytes == 12 * largest
        assert (stats.hits_device, stats.hits_host, stats.hits_disk) == (0, 0, 40)
        assert stats.slots_filled <= 8
        assert stats.evictions_host >= 40 - stats.host_adapters
        assert stats.read_seconds > 0


def test_an_adapter_that_memory_has_no_room_for_is_refused(model_dir, adapter_dir, tmp_path):
    large = make_adapter(model_dir, tmp_path / "large", 3, r=16, target_modules=projections("llama"))
    with Engine(model_dir, host_adapter_bytes=32_000) as engine:
        answer = engine.ask(PROMPT, [use(large)])
        assert answer.error.startswith(f"[ADAPTER_INVALID] adapter {digest_of(large)}: takes ")
        assert answer.error.endswith(" bytes of memory, at most 32000 (engine.host_adapter_bytes) are right")
        assert engine.ask(PROMPT, [use(adapter_dir)]).finish_reason == "length"
        assert engine.engine.stats().adapters.host_bytes <= 32_000
        engine.assert_nothing_held()


def test_a_load_begins_when_its_request_is_submitted(model_dir, adapter_dir, tmp_path):
    """While the only row is taken, and the engine between two steps."""
    cold = changed(adapter_dir, tmp_path / "cold")
    entered, released, opened = threading.Event(), threading.Event(), threading.Event()

    def stop_once(outputs) -> None:
        if not entered.is_set():
            entered.set()
            assert released.wait(60)

    with Engine(model_dir, stop_once, max_batch=1) as engine:
        open_adapter = engine.engine._residency._open

        def noted(digest: str, path: str):
            opened.set()
            return open_adapter(digest, path)

        engine.engine._residency._open = noted
        engine.submit("running", PROMPT, max_tokens=20)
        assert entered.wait(60)
        engine.submit("next", PROMPT, [use(cold)])
        assert opened.wait(60)
        released.set()
        assert engine.wait("next").ids == engine.ask(PROMPT, [use(adapter_dir)]).ids
        engine.assert_nothing_held()


def test_a_slow_load_holds_nobody_up(model_dir, adapter_dir, tmp_path):
    """Running requests, and those that come later, go on while an adapter is being read."""
    slow_dir = changed(adapter_dir, tmp_path / "slow")
    released = threading.Event()
    with Engine(model_dir) as engine:
        opened = engine.engine._residency._open

        def slow_open(digest: str, path: str):
            if path == slow_dir:
                assert released.wait(60)
            return opened(digest, path)

        engine.engine._residency._open = slow_open
        expected = engine.ask(PROMPT, [use(adapter_dir)]).ids  # resident from here on
        engine.submit("running", PROMPT, max_tokens=40)
        engine.until(lambda answers: "running" in answers)
        engine.submit("slow", PROMPT, [use(slow_dir)])
        engine.submit("later", PROMPT, [use(adapter_dir)])
        assert engine.wait("later").ids == expected
        assert engine.wait("running").finish_reason == "length"
        assert "slow" not in engine.answers
        released.set()
        assert engine.wait("slow").ids == expected  # the same weights under another digest
        engine.assert_nothing_held()


def test_the_weight_that_counts_is_the_recorded_integer(engine, adapter_dir):
    """Weights are 1e-6 units; weight 0 of a segment adds nothing."""
    base = engine.ask(PROMPT, logprobs=0, max_tokens=1)
    zero = engine.ask(PROMPT, [AdapterUse(digest_of(adapter_dir), adapter_dir, 0)], logprobs=0, max_tokens=1)
    unit = engine.ask(PROMPT, [AdapterUse(digest_of(adapter_dir), adapter_dir, 1)], logprobs=0, max_tokens=1)
    whole = engine.ask(PROMPT, [AdapterUse(digest_of(adapter_dir), adapter_dir, 1_000_000)], logprobs=0, max_tokens=1)
    assert zero.logprobs == base.logprobs
    assert abs(unit.logprobs[0].logprob - base.logprobs[0].logprob) < 1e-4
    assert whole.logprobs != base.logprobs
