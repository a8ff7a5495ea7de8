"""TensorRT-LLM's own: what each version and backend does of a request, its adapter modules, its errors and its end."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from engine_rig import InProcessRig
from fake_tensorrt_llm import DEATH, fake_tensorrt_llm, make_built_engine
from parity import Oracle
from protocol_world import OPTIONS, PROMPT, Store
from safetensors.torch import save_file
from tiny_models import make_adapter, use

from openlora.engine.api import GUIDE_KINDS, Guide
from openlora.engine.one_adapter.base_shapes import BaseShapes
from openlora.engine.one_adapter.failures import told
from openlora.engine.tensorrt_llm_abilities import OPTIONAL
from openlora.engine.tensorrt_llm_engine import TensorrtLlmEngine
from openlora.engine.tensorrt_llm_failures import MEANINGS, is_fatal
from openlora.engine.tensorrt_llm_surface import SURFACES, surface_of
from openlora.errors import UnsupportedModel

MANUAL = Path(__file__).resolve().parents[1] / "docs" / "engines.md"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


def fake_engine(model_dir: str, **options) -> InProcessRig:
    return InProcessRig(TensorrtLlmEngine(model_dir, "0" * 64, stats_seconds=0.01, **{**OPTIONS, **options}))


# --- what it does of a request --------------------------------------------------------------------------------------


def test_the_manual_says_what_is_checked() -> None:
    """One row a parameter, one column a surface: exactly the fields that `check` looks at."""
    lines = MANUAL.read_text().partition("### What it does of a request")[2].splitlines()
    table = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    built = {surface.built_engine for surface in SURFACES.values()} - {None}
    assert len(built) == 1, "the manual has one column for built engines"
    columns = [*(surface.pytorch for surface in SURFACES.values()), *built]

    def row(name: str, has: list[bool]) -> list[str]:
        return [name, *("yes" if one else "refused" for one in has)]

    expected = [
        ["", *SURFACES, "built engine"],
        ["---"] * (1 + len(columns)),
        *(row(name, [name in one.parameters for one in columns]) for name in OPTIONAL),
        *(row(f"guide `{kind}", [kind in one.guides for one in columns]) for kind in GUIDE_KINDS),
    ]
    assert table == expected


@pytest.mark.parametrize(
    ("version", "surface"),
    [
        ("1.1.0", "1.1"),
        ("1.2.1", "1.2"),
        ("1.3.0rc1", "1.3"),
        ("1.3.0rc23", "1.3"),
        ("1.3.0.dev2026080400", "1.3"),
        ("1.3.0rc24", "1.3.0rc24"),
        ("1.3.0rc25.post1", "1.3.0rc24"),
        ("1.3.0rc26", "1.3.0rc26"),
        ("1.3.0", "1.3.0rc26"),
        ("1.3.2rc1", "1.3.0rc26"),
    ],
)
def test_a_version_is_what_its_release_candidate_was(version: str, surface: str) -> None:
    assert surface_of(version) is SURFACES[surface]


@pytest.mark.parametrize("version", ["1.0.0", "1.4.0rc4", "2.0", "nonsense"])
def test_an_unknown_version_is_refused(version: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"is not supported, one of 1\.1, 1\.2, 1\.3 is right"):
        surface_of(version)


def test_what_it_does_not_do_is_refused_by_name(store: Store) -> None:
    with fake_tensorrt_llm("1.1"), fake_engine(store.model_dir) as rig:
        rig.submit("priority", PROMPT, priority=3)
        refusal = "TensorRT-LLM 1.1.0 (pytorch) does not do it: leave it out, got"
        assert rig.wait("priority").error == f"[INVALID_ARGUMENT] priority: {refusal} 3"
        assert rig.ask(PROMPT, bad_words=((3,),)).error == f"[INVALID_ARGUMENT] bad_words: {refusal} 1 of them"
        assert rig.ask(PROMPT, min_p=0.5).error == f"[INVALID_ARGUMENT] min_p: {refusal} 0.5"
        guide = Guide("regex", "a", "its_name")
        assert rig.ask(PROMPT, guide=guide).error.startswith("[INVALID_ARGUMENT] its_name: the model has no tokenizer")


GUIDES = [
    (Guide("json"), {"json_object": True}),
    (Guide("json_schema", '{"type": "array"}'), {"json": '{"type": "array"}'}),
    (Guide("regex", "[0-9]+"), {"regex": "[0-9]+"}),
    (Guide("grammar", 'root ::= "a"'), {"grammar": 'root ::= "a"'}),
]


@pytest.fixture
def model_with_tokenizer(store: Store, tmp_path: Path) -> str:
    shutil.copytree(store.model_dir, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")  # the stand-in looks at no word of it
    return str(tmp_path / "model")


def test_a_guide_goes_into_the_field_of_its_kind(model_with_tokenizer: str) -> None:
    with fake_tensorrt_llm("1.2"), fake_engine(model_with_tokenizer) as rig:
        for guide, fields in GUIDES:
            assert rig.ask(PROMPT, guide=guide, max_tokens=2).error == ""
            given = vars(rig.engine._backend._llm.requests[-1]["sampling_params"].guided_decoding)
            assert {name: value for name, value in given.items() if value} == fields
        choice = rig.ask(PROMPT, guide=Guide("choice", '["a"]'))
        assert choice.error.startswith(
            "[INVALID_ARGUMENT] guide: TensorRT-LLM 1.2.1 (pytorch) has no guide of the kind"
        )


def test_a_built_engine_follows_no_guide(model_with_tokenizer: str, tmp_path: Path) -> None:
    engine_dir = make_built_engine(model_with_tokenizer, tmp_path / "engine")
    with (
        fake_tensorrt_llm("1.2"),
        fake_engine(model_with_tokenizer, backend="tensorrt", engine_dir=engine_dir) as rig,
    ):
        for guide, _ in GUIDES:
            answer = rig.ask(PROMPT, guide=guide)
            assert re.search(r"^\[INVALID_ARGUMENT\] guide: .* \(tensorrt\) has no guide of the kind", answer.error)


# --- adapters -------------------------------------------------------------------------------------------------------


def test_an_adapter_on_modules_that_the_engine_was_not_told_of_is_refused(store: Store) -> None:
    with fake_tensorrt_llm("1.3"), fake_engine(store.model_dir, lora_target_modules=("attn_q", "attn_v")) as rig:
        answer = rig.ask(PROMPT, [use(store.adapters["some"])])
        assert answer.error.startswith("[ADAPTER_INVALID] ") and "down_proj" in answer.error


@pytest.mark.parametrize("targets", [("attn_q", "attn_v"), ("attn_q", "attn_v", "mlp_4h_to_h")])
def test_adapters_of_a_part_of_the_attention_are_served(store: Store, tmp_path: Path, targets: tuple[str, ...]) -> None:
    """It fills what is missing of q, k and v with zeros, and must know what those are called."""
    path = make_adapter(store.model_dir, tmp_path / "part", 5, r=4, target_modules=["q_proj", "v_proj"])
    expected = Oracle(store.model_dir, {"part": path}).greedy(PROMPT, [("part", 1.0)], 8).ids
    with fake_tensorrt_llm("1.2"), fake_engine(store.model_dir, lora_target_modules=targets) as rig:
        for _ in range(2):  # it takes an adapter whose first use failed for one that is loaded, and empty
            answer = rig.ask(PROMPT, [use(path)], max_tokens=8)
            assert (answer.ids, answer.error) == (expected, "")


def test_shapes_of_packed_weights_are_told_where_they_can_be(tmp_path: Path) -> None:
    """NVFP4 as ModelOpt writes it: two values a byte, an FP8 scale for sixteen. Of other packings nothing is told."""
    byte, scale = torch.uint8, torch.float8_e4m3fn
    tensors = {
        "model.layers.0.mlp.down_proj.weight": torch.zeros(64, 48, dtype=byte),
        "model.layers.0.mlp.down_proj.weight_scale": torch.zeros(64, 6, dtype=scale),
        "model.layers.0.mlp.down_proj.weight_scale_2": torch.zeros(()),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(48, 64, dtype=byte),  # AWQ: along the other side
        "model.layers.0.mlp.up_proj.weight_scale": torch.zeros(96, 1, dtype=torch.float16),
        "model.layers.0.mlp.gate_proj.weight": torch.zeros(96, 64, dtype=scale),
        "model.layers.0.self_attn.q_proj.weight": torch.zeros(128, 64, dtype=torch.bfloat16),
        "model.layers.0.self_attn.k_proj.qweight": torch.zeros(8, 64, dtype=torch.int32),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    shapes = BaseShapes(tmp_path)
    found = {module.rpartition(".")[2]: shapes.shape(module) for module in shapes.linears}
    assert found == {
        "down_proj": (64, 96),
        "up_proj": None,
        "gate_proj": (96, 64),
        "q_proj": (128, 64),
        "k_proj": None,
    }


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("LoRA task 5 not found in cache. Please send LoRA weights with request", "[UNAVAILABLE]"),
        ("PEFT Cache is full. Could not store taskId=7", "[OVERLOADED]"),
        ("Cache is full. There are no done tasks to evict", "[OVERLOADED]"),
        ("Not enough space allocated to device LoRA cache to hold 1 max sized LoRA", "[INVALID_ARGUMENT] engine.max"),
        ("Request for LoRA inference must have both lora_weights and lora_keys", "[ADAPTER_INVALID]"),
        ("lora_task_id must be set for LoRA inference", "[ADAPTER_INVALID]"),
        ("Expected lora weights to be the same data type as base model", "[ADAPTER_INVALID]"),
        ("lora module attn_q not enabled for this model", "[ADAPTER_INVALID]"),
        ("lora_weights has to few values for attn_k", "[ADAPTER_INVALID]"),
        ("Invalid low_rank (65). low_rank must be smaller than mMaxLowRank (64)", "[ADAPTER_INVALID]"),
        ("CUDA out of memory. Tried to allocate 2 GiB", "[OVERLOADED]"),
        ("CUDA error: out of memory", "[OVERLOADED]"),
        ("CUDA error: an illegal memory access was encountered", "[ENGINE_RESTARTED] TensorRT-LLM died while"),
        ("the executor has been shut down", "[ENGINE_RESTARTED] TensorRT-LLM died while"),
        ("something else", "[INTERNAL] RuntimeError: something else"),
    ],
)
def test_errors_are_told_by_their_words(words: str, expected: str) -> None:
    assert str(told(RuntimeError(words), MEANINGS)).startswith(expected)


class OfOneRequest(RuntimeError):
    """As its RequestError."""


@pytest.mark.parametrize(
    ("error", "fatal"),
    [
        (OfOneRequest("Invalid low_rank (65). low_rank must be smaller than mMaxLowRank (64)"), False),
        (OfOneRequest("CUDA out of memory. Tried to allocate 2 GiB"), False),
        (OfOneRequest("CUDA error: out of memory"), False),
        (ValueError("the prompt length is over max_num_tokens"), False),
        (OfOneRequest("CUDA error: an illegal memory access was encountered"), True),
        (OfOneRequest("CUDA error: device-side assert triggered"), True),
        (OfOneRequest("cudaErrorLaunchFailure"), True),
        (RuntimeError("a worker returned error"), True),
        (AttributeError("'NoneType' object has no attribute 'submit'"), True),
    ],
)
def test_errors_that_end_the_engine(error: Exception, fatal: bool) -> None:
    assert is_fatal(error, OfOneRequest) is fatal


@pytest.mark.parametrize("error", ["a worker was killed", "CUDA error: an illegal memory access was encountered"])
def test_an_executor_that_died_or_is_poisoned_is_a_failure(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    """So that whoever hosts the engine replaces it."""
    death = tmp_path / "death"
    monkeypatch.setenv(DEATH, str(death))
    with fake_tensorrt_llm("1.2"):
        rig = fake_engine(store.model_dir)
        rig.engine.start(rig.take)
        try:
            assert rig.ask(PROMPT, max_tokens=4).finish_reason == "length"
            rig.stats()
            assert rig.engine.failed is None
            death.write_text(error)
            assert rig.ask(PROMPT, max_tokens=4).finish_reason == "error"
            rig.stats()
            assert error in str(rig.engine.failed)
        finally:
            rig.engine.shutdown()
