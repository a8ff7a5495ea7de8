"""Validation of adapters: PEFT is the oracle for what is accepted; each refusal says its exact reason."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, make_adapter, make_model, projections
from transformers import AutoModelForCausalLM

from openlora.adapters.base_modules import BaseModules, base_modules
from openlora.adapters.lora_config import AdapterConfig
from openlora.adapters.weights import validate_adapter
from openlora.errors import AdapterInvalid, UnsupportedModel

BASE = "b" * 64
MAX_RANK = 16
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def modules(model, tmp_path_factory):
    return base_modules(Path(model), BASE, tmp_path_factory.mktemp("modules"))


@pytest.fixture(scope="module")
def pristine(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "poet"
    make_adapter(model, folder, 1, r=4, target_modules=["q_proj", "down_proj"])
    return folder


@pytest.fixture
def adapter(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "poet")


def check(adapter, modules, made_for=None, max_rank=MAX_RANK):
    return validate_adapter("poet", adapter, made_for, modules, BASE, max_rank)


def refused(adapter, modules, **settings):
    with pytest.raises(AdapterInvalid) as caught:
        check(adapter, modules, **settings)
    assert str(caught.value).startswith("[ADAPTER_INVALID] adapter poet: ")
    return caught.value.message


def configure(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(adapter, change):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


ACCEPTED = {
    "one projection": {"r": 2, "target_modules": ["v_proj"]},
    "all projections": {"r": 8, "target_modules": projections("llama")},
    "all-linear": {"r": 2, "target_modules": "all-linear"},
    "a pattern": {"r": 2, "target_modules": r".*layers\.[02]\..*\.(q|v)_proj"},
    "a full name": {"r": 2, "target_modules": ["model.layers.1.mlp.up_proj", "k_proj"]},
    "some layers": {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    "some layers, named list": {
        "r": 2,
        "target_modules": ["q_proj"],
        "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    "without some": {"r": 2, "target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    "rank-stabilized": {"r": 9, "lora_alpha": 3, "use_rslora": True, "target_modules": ["o_proj"]},
    "rank and alpha patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"v_proj": 1, r"layers\.1\.self_attn\.q_proj": 7, "^model.layers.2.mlp.up_proj": 3},
        "alpha_pattern": {"self_attn.q_proj": 5, r".*\.0\.mlp\.up_proj": 11},
    },
    "rank-stabilized with patterns": {
        "r": 4,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 16},
    },
    "dropout and the rest of what only training sees": {
        "r": 2,
        "target_modules": ["q_proj"],
        "lora_dropout": 0.1,
    },
}


@pytest.mark.parametrize("settings", ACCEPTED.values(), ids=ACCEPTED)
def test_accepts_what_peft_makes_and_reads_it_as_peft_does(model, modules, tmp_path, settings):
    folder = tmp_path / "poet"
    make_adapter(model, folder, 3, **settings)
    facts = check(folder, modules)

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder)
    oracle = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in loaded.named_modules()
        if isinstance(module, LoraLayer)
    }
    config = AdapterConfig.read(folder)
    ours = {
        name: (config.of(name).rank, config.of(name).scaling)
        for name in modules.linear
        if name != modules.output_head and config.targets(name)
    }
    assert ours == oracle
    assert facts.rank == max(rank for rank, _ in oracle.values())
    assert set(facts.target_modules) == {name.rpartition(".")[2] for name in oracle}
    assert facts.parameters == sum(
        tensor.numel() for tensor in load_file(folder / "adapter_model.safetensors").values()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_accepts_adapters_of_every_supported_family(family, tmp_path):
    model = make_model(tmp_path / "base", family)
    folder = tmp_path / "poet"
    make_adapter(model, folder, 3, r=2, target_modules=projections(family))
    modules = base_modules(tmp_path / "base", BASE, tmp_path / "modules")
    assert set(check(folder, modules).target_modules) == set(projections(family))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_accepts_16_bit_weights(adapter, modules, dtype):
    rewrite(adapter, lambda tensors: tensors.update({key: value.to(dtype) for key, value in tensors.items()}))
    check(adapter, modules)


@pytest.mark.parametrize("initialisation", [True, False, "gaussian", "eva", "orthogonal"])
def test_accepts_initialisations_that_leave_the_base_alone(adapter, modules, initialisation):
    configure(adapter, init_lora_weights=initialisation)
    check(adapter, modules)


PATTERN_AND_LAYERS = "layers_to_transform and layers_pattern need a list of target_modules, not a pattern"
CONFIG_REFUSALS = [
    ({"peft_type": "IA3"}, "peft_type is 'IA3', only 'LORA' is supported"),
    ({"peft_type": None}, "peft_type is None, only 'LORA' is supported"),
    ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS', only 'CAUSAL_LM' is supported"),
    ({"fan_in_fan_out": True}, "the setting fan_in_fan_out = True is not supported"),
    ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, PATTERN_AND_LAYERS),
    ({"target_modules": ".*q_proj", "layers_to_transform": 0}, PATTERN_AND_LAYERS),
    ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
    ({"use_dora": True}, "DoRA is not supported"),
    ({"bias": "all"}, "bias is 'all', only 'none' is supported"),
    ({"bias": "lora_only"}, "bias is 'lora_only', only 'none' is supported"),
    ({"modules_to_save": ["lm_head"]}, "it brings whole modules (modules_to_save), only LoRA matrices are supported"),
    ({"trainable_token_indices": [3]}, "trained token embeddings are not supported"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer replication changes the base model and is not supported"),
    ({"lora_bias": True}, "biases of LoRA matrices (lora_bias) are not supported"),
    ({"alora_invocation_tokens": [1, 2]}, "activated LoRA (aLoRA) is not supported"),
    ({"megatron_config": {"tensor_model_parallel_size": 2}}, "Megatron adapters are not supported"),
    ({"loftq_config": {"loftq_bits": 4}}, "LoftQ changes the base weights and is not supported"),
    ({"target_parameters": ["mlp.experts"]}, "LoRA on bare parameters (target_parameters) is not supported"),
    ({"use_qalora": True}, "the setting use_qalora = True is not supported"),
    ({"made_up": 7}, "the setting made_up = 7 is not supported"),
    ({"r": 0}, "rank r is 0, a whole number of at least 1 is wanted"),
    ({"r": "4"}, "rank r is '4', a whole number of at least 1 is wanted"),
    ({"rank_pattern": {"q_proj": 0}}, "rank rank_pattern['q_proj'] is 0, a whole number of at least 1 is wanted"),
    ({"lora_alpha": True}, "lora_alpha is True, a number is wanted"),
    ({"use_rslora": "yes"}, "use_rslora is 'yes', true or false is wanted"),
    ({"r": 17}, "rank 17 is over the limit of 16"),
    ({"rank_pattern": {"q_proj": 64}}, "rank 64 is over the limit of 16"),
    ({"r": 5}, "model.layers.0.self_attn.q_proj.lora_A has rank 4, adapter_config.json says 5"),
    ({"rank_pattern": {"down_proj": 2}}, "model.layers.0.mlp.down_proj.lora_A has rank 4, adapter_config.json says 2"),
    ({"target_modules": []}, "target_modules is missing: the names of the modules that it changes are wanted"),
    ({"target_modules": ["no_proj"]}, "target_modules ('no_proj',) match no module of the base model"),
    (
        {"target_modules": ["q_proj"]},
        "'base_model.model.model.layers.0.mlp.down_proj.lora_A.weight' belongs to a module that adapter_config.json "
        "does not target",
    ),
    (
        {"target_modules": ["q_proj", "down_proj", "v_proj"]},
        "no weights for model.layers.0.self_attn.v_proj, model.layers.1.self_attn.v_proj, "
        "model.layers.2.self_attn.v_proj, which the configuration targets",
    ),
    (
        {"target_modules": ["q_proj", "lm_head"]},
        "LoRA on lm_head (embeddings, output head) is not supported",
    ),
    (
        {"target_modules": ["embed_tokens"]},
        "LoRA on model.embed_tokens (embeddings, output head) is not supported",
    ),
    ({"layers_to_transform": ["0"]}, "layers_to_transform is ['0'], a list of layer numbers is wanted"),
]


@pytest.mark.parametrize(("changes", "reason"), CONFIG_REFUSALS, ids=[str(changes) for changes, _ in CONFIG_REFUSALS])
def test_refuses_configurations_by_name(adapter, modules, changes, reason):
    configure(adapter, **changes)
    assert refused(adapter, modules) == reason


@pytest.mark.parametrize("initialisation", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"])
def test_refuses_initialisations_that_change_the_base(adapter, modules, initialisation):
    configure(adapter, init_lora_weights=initialisation)
    assert f"init_lora_weights '{initialisation}' trains against changed base weights" in refused(adapter, modules)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"{", "adapter_config.json is not JSON"),
        (b"[1]", "adapter_config.json holds a list, a JSON object is wanted"),
        (b'{"r": 1, "r": 2}', "comes twice"),
        (b'{"lora_alpha": NaN}', "NaN is not a JSON number"),
        (b'{"a": "\xff"}', "adapter_config.json is not JSON"),
        (b"[" * 100_000, "adapter_config.json is not JSON"),
        (b" " * (1 << 20) + b"{}", "at most 1048576 are allowed"),
    ],
)
def test_refuses_configurations_that_are_no_json_object(adapter, modules, text, reason):
    (adapter / "adapter_config.json").write_bytes(text)
    assert reason in refused(adapter, modules)


def test_refuses_patterns_that_are_none(adapter, modules):
    configure(adapter, alpha_pattern={"(": 1})
    assert "alpha_pattern: '(.*\\\\.)?(()$' is not a pattern" in refused(adapter, modules)


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def replace(key, value):
    return lambda tensors: tensors.update({key: value})


TENSOR_REFUSALS = {
    "unmatched": (
        rename(f"{Q0}.lora_A.weight", "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"),
        "'base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight' matches no module of the base model",
    ),
    "unexpected": (
        replace("base_model.model.model.norm.weight", torch.ones(64)),
        "unexpected tensor 'base_model.model.model.norm.weight'",
    ),
    "DoRA magnitudes": (
        replace(f"{Q0}.lora_magnitude_vector", torch.ones(64)),
        f"unexpected tensor '{Q0}.lora_magnitude_vector'",
    ),
    "embedding": (
        replace("base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(4, 128)),
        "LoRA on model.embed_tokens (embeddings, output head) is not supported",
    ),
    "output head": (
        replace("base_model.model.lm_head.lora_A.weight", torch.ones(4, 64)),
        "LoRA on lm_head (embeddings, output head) is not supported",
    ),
    "no B": (
        lambda tensors: tensors.pop(f"{Q0}.lora_B.weight"),
        "model.layers.0.self_attn.q_proj has lora_A but no lora_B",
    ),
    "no A": (
        lambda tensors: tensors.pop(f"{Q0}.lora_A.weight"),
        "model.layers.0.self_attn.q_proj has lora_B but no lora_A",
    ),
    "wrong input size": (
        replace(f"{Q0}.lora_A.weight", torch.ones(4, 32)),
        "model.layers.0.self_attn.q_proj.lora_A has shape [4, 32], this base model needs [4, 64]: "
        "made for another base?",
    ),
    "wrong output size": (
        replace(f"{Q0}.lora_B.weight", torch.ones(63, 4)),
        "model.layers.0.self_attn.q_proj.lora_B has shape [63, 4], this base model needs [64, 4]: "
        "made for another base?",
    ),
    "not a matrix": (
        replace(f"{Q0}.lora_A.weight", torch.ones(256)),
        "model.layers.0.self_attn.q_proj.lora_A has shape [256], this base model needs [4, 64]: made for another base?",
    ),
    "rank of B": (
        replace(f"{Q0}.lora_B.weight", torch.ones(64, 3)),
        "model.layers.0.self_attn.q_proj.lora_B has rank 3, adapter_config.json says 4",
    ),
    "rank zero": (
        replace(f"{Q0}.lora_A.weight", torch.ones(0, 64)),
        "model.layers.0.self_attn.q_proj.lora_A has rank 0, adapter_config.json says 4",
    ),
    "integers": (
        replace(f"{Q0}.lora_A.weight", torch.ones(4, 64, dtype=torch.int32)),
        "model.layers.0.self_attn.q_proj.lora_A has dtype I32, one of F32, F16, BF16 is wanted",
    ),
}


@pytest.mark.parametrize(("change", "reason"), TENSOR_REFUSALS.values(), ids=TENSOR_REFUSALS)
def test_refuses_tensors_by_name(adapter, modules, change, reason):
    rewrite(adapter, change)
    assert refused(adapter, modules) == reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_refuses_a_single_value_that_is_not_finite(adapter, modules, dtype, value):
    def spoil(tensors):
        for key in tensors:
            tensors[key] = tensors[key].to(dtype)
        tensors[f"{Q0}.lora_B.weight"][17, 2] = value

    rewrite(adapter, spoil)
    assert refused(adapter, modules) == "model.layers.0.self_attn.q_proj.lora_B holds NaN or Inf"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_accepts_the_largest_finite_values(adapter, modules, dtype):
    def fill(tensors):
        for key in tensors:
            tensors[key] = torch.full_like(tensors[key], torch.finfo(dtype).max, dtype=dtype)

    rewrite(adapter, fill)
    check(adapter, modules)


LYING_HEADER = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,9]}}'


def header(length, content, rest=b""):
    return length.to_bytes(8, "little") + content + rest


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not safetensors or cut short: 0 bytes"),
        (b"PK\x03\x04 a zip of pickles", "is not safetensors or cut short: 21 bytes"),
        (header(1 << 60, b"{}"), "is not safetensors or cut short: 10 bytes"),
        (header(9 << 20, b" " * (9 << 20)), "header of 9437184 bytes, at most 8388608 are allowed"),
        (header(2, b"[]"), "its header holds a list, a JSON object is wanted"),
        (header(len(LYING_HEADER), LYING_HEADER, b"\0" * 9), "is not valid safetensors"),
    ],
)
def test_refuses_what_is_not_safetensors(adapter, modules, content, reason):
    (adapter / "adapter_model.safetensors").write_bytes(content)
    assert reason in refused(adapter, modules)


def test_refuses_every_truncation(adapter, modules):
    path = adapter / "adapter_model.safetensors"
    whole = path.read_bytes()
    for length in {0, 7, 8, 100, len(whole) // 2, len(whole) - 4, len(whole) - 1}:
        path.write_bytes(whole[:length])
        assert "safetensors" in refused(adapter, modules)
    path.write_bytes(whole + b"\0")
    assert "safetensors" in refused(adapter, modules)


def test_random_damage_is_refused_or_still_a_whole_adapter(adapter, modules):
    path = adapter / "adapter_model.safetensors"
    whole = path.read_bytes()
    generator = np.random.default_rng(5)
    for _ in range(200):
        damaged = bytearray(whole)
        for position in generator.integers(0, 4096, size=4):
            damaged[position] ^= int(generator.integers(1, 256))
        path.write_bytes(damaged)
        try:
            check(adapter, modules)
        except AdapterInvalid as error:
            assert error.field == "adapter poet"


def test_refuses_an_adapter_of_another_base(model, modules, tmp_path):
    other = make_model(tmp_path / "other", hidden_size=128)
    folder = tmp_path / "poet"
    make_adapter(other, folder, 2, r=2, target_modules=["q_proj"])
    assert "made for another base?" in refused(folder, modules)


def test_refuses_an_adapter_of_a_deeper_or_shallower_base(modules, tmp_path):
    for layers, reason in ((4, "layers.3.self_attn.q_proj"), (2, "no weights for model.layers.2.self_attn.q_proj")):
        other = make_model(tmp_path / f"other{layers}", num_hidden_layers=layers)
        folder = tmp_path / f"poet{layers}"
        make_adapter(other, folder, 2, r=2, target_modules=["q_proj"])
        assert reason in refused(folder, modules)


def test_the_base_that_a_card_names_must_be_ours(adapter, modules):
    check(adapter, modules, made_for=BASE)
    assert refused(adapter, modules, made_for="c" * 64) == (
        "made for base model cccccccccccccccc…, this server runs bbbbbbbbbbbbbbbb…"
    )
    assert "a digest of 64 hex digits is wanted" in refused(adapter, modules, made_for="llama")


def test_modules_are_read_from_the_cache_the_second_time(model, modules, tmp_path, monkeypatch):
    assert base_modules(Path(model), BASE, tmp_path) == modules
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", None)  # would fail if it were asked again
    assert base_modules(Path(os.devnull), BASE, tmp_path) == modules
    assert modules.output_head == "lm_head"
    assert modules.embeddings == ("model.embed_tokens",)
    assert modules.linear["model.layers.0.self_attn.k_proj"] == (32, 64)


def test_an_unknown_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "telepathy"}')
    with pytest.raises(UnsupportedModel):
        base_modules(tmp_path, BASE, tmp_path / "modules")


def test_the_size_limit_covers_the_largest_adapter(model, tmp_path):
    small = BaseModules({"a": (3, 5), "b": (7, 2)}, (), None)
    assert small.largest_adapter_bytes(4) == 4 * 4 * (3 + 5 + 7 + 2)
