"""What engines with one adapter per request share: ids, written-out sums, their limits, and the end of a life."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from engine_rig import InProcessRig
from fake_tensorrt_llm import fake_tensorrt_llm
from protocol_world import OPTIONS, PROMPT, Store
from recipe_cases import RECIPES
from safetensors.numpy import load_file
from tiny_models import digest_of, make_adapter, use

from openlora.adapters.manifest import adapter_manifest
from openlora.config import EngineSettings
from openlora.engine.one_adapter.base_shapes import BaseShapes
from openlora.engine.one_adapter.options import OneAdapterOptions, options_of
from openlora.engine.one_adapter.peft_files import manifest_digest
from openlora.engine.one_adapter.placing import LifeSpent, Placing
from openlora.engine.one_adapter.staging import Staging
from openlora.engine.tensorrt_llm_cache import adapter_room
from openlora.engine.tensorrt_llm_engine import TensorrtLlmEngine
from openlora.engine.tensorrt_llm_options import TensorrtLlmOptions
from openlora.engine.tensorrt_llm_surface import SURFACES
from openlora.errors import InvalidArgument, UnsupportedModel
from openlora.recipes.deployment import serve_settings
from openlora.recipes.layout import Layout
from openlora.recipes.recipe import Recipe


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


def placing(store: Store, directory: Path, **options) -> Placing:
    given = OneAdapterOptions(**options)
    return Placing(BaseShapes(store.model_dir), "float32", 64, given, Staging(directory, given.max_staged_bytes))


def fake_engine(store: Store, **options) -> InProcessRig:
    return InProcessRig(TensorrtLlmEngine(store.model_dir, "0" * 64, stats_seconds=0.01, **{**OPTIONS, **options}))


def test_the_same_content_has_one_id_and_other_content_another(store: Store, tmp_path: Path) -> None:
    place = placing(store, tmp_path / "staging").place
    a, b = use(store.adapters["all"]), use(store.adapters["some"])
    half_a, half_b = use(store.adapters["all"], 0.5), use(store.adapters["some"], 0.5)
    numbers = [
        place(uses).number for uses in ([a], [b], [half_a], [half_a, half_b], [half_b, half_a], [a, half_b], [a])
    ]
    assert numbers == [1, 2, 3, 4, 4, 5, 1]
    assert place([]) is None


def test_a_plain_adapter_is_read_where_it_lies(store: Store, tmp_path: Path) -> None:
    shelf = placing(store, tmp_path / "staging")
    assert shelf.place([use(store.adapters["all"])]).path == store.adapters["all"]
    assert shelf.place([use(store.adapters["patterns"])]).path.startswith(str(tmp_path / "staging"))


def test_a_sum_is_exact(store: Store, tmp_path: Path) -> None:
    """The product of its matrices is the weighted sum of its members', scalings included."""
    shelf = placing(store, tmp_path / "staging")
    uses = [use(store.adapters["some"], 1.25), use(store.adapters["patterns"], -0.3)]
    placed = Path(shelf.place(uses).path)
    made = load_file(placed / "adapter_model.safetensors")
    config = json.loads((placed / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 9 + 5
    assert all(tensor.shape[0 if ".lora_A." in key else 1] == 14 for key, tensor in made.items())
    some, patterns = (
        load_file(Path(store.adapters[name]) / "adapter_model.safetensors") for name in ("some", "patterns")
    )
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    expected = 1.25 * 3 / 3 * some[key.format("B")].astype(float) @ some[key.format("A")]
    expected -= 0.3 * 4 / 3 * patterns[key.format("B")].astype(float) @ patterns[key.format("A")]
    assert np.abs(made[key.format("B")].astype(float) @ made[key.format("A")] - expected).max() < 1e-6
    assert adapter_manifest(placed).digest == digest_of(str(placed))


def test_the_manifest_digest_is_the_catalogs(store: Store) -> None:
    directory = Path(store.adapters["all"])
    files = [(directory / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")]
    assert manifest_digest(*files) == adapter_manifest(directory).digest


def test_a_life_has_so_many_ids_and_sums(store: Store, tmp_path: Path) -> None:
    shelf = placing(store, tmp_path / "staging", max_adapter_ids=3, max_ensembles=1)
    a, b = use(store.adapters["all"]), use(store.adapters["some"])
    shelf.place([a])
    shelf.place([use(a.path, 0.5)])
    with pytest.raises(LifeSpent, match="has made 1 weighted adapters and is being replaced"):
        shelf.place([use(b.path, 0.5)])
    shelf.place([b])
    with pytest.raises(LifeSpent, match="has used 3 adapters and is being replaced"):
        shelf.place([use(store.more(1)[0])])
    assert [shelf.place(uses).number for uses in ([a], [use(a.path, 0.5)], [b])] == [1, 2, 3]


def test_staging_is_bounded_emptied_and_written_again(store: Store, tmp_path: Path) -> None:
    directory = tmp_path / "staging"
    (directory / "of an earlier engine").mkdir(parents=True)
    shelf = placing(store, directory, max_staged_bytes=1)
    first = shelf.place([use(store.adapters["all"], 0.5)])
    second = shelf.place([use(store.adapters["all"], 0.25)])
    assert sorted(path.name for path in directory.iterdir()) == sorted([first.name, second.name])  # both are held
    content = (Path(first.path) / "adapter_model.safetensors").read_bytes()
    shelf.release(first)
    assert [path.name for path in directory.iterdir()] == [second.name]
    again = shelf.place([use(store.adapters["all"], 0.5)])
    assert again == first
    assert (Path(again.path) / "adapter_model.safetensors").read_bytes() == content
    shelf.release(again)
    shelf.release(second)
    assert list(directory.iterdir()) == []


def test_a_spent_engine_answers_what_it_took_and_ends(store: Store) -> None:
    with fake_tensorrt_llm("1.2"), fake_engine(store, max_ensembles=1) as rig:
        rig.submit("running", PROMPT, [use(store.adapters["all"], 0.5)], max_tokens=70)
        rig.until(lambda answers: "running" in answers)
        spent = rig.ask(PROMPT, [use(store.adapters["all"], 0.25)])
        assert spent.error == (
            "[OVERLOADED] this engine has made 1 weighted adapters and is being replaced retry_after_ms=5000"
        )
        assert rig.engine.ending and not rig.engine.ended
        assert rig.ask(PROMPT).error == "[OVERLOADED] this engine is being replaced retry_after_ms=5000"
        assert len(rig.wait("running").ids) == 70
        assert rig.engine.ended


def test_a_full_queue_says_when_to_come_back(store: Store) -> None:
    with fake_tensorrt_llm("1.2"), fake_engine(store, max_batch=1, max_waiting=3) as rig:
        for number in range(8):
            rig.submit(str(number), PROMPT, max_tokens=20)
        answers = [rig.wait(str(number)) for number in range(8)]
        refused = [answer.error for answer in answers if answer.finish_reason == "error"]
        assert refused and all(
            error.startswith("[OVERLOADED] 3 requests are waiting retry_after_ms=") for error in refused
        )
        assert [answer.finish_reason for answer in answers[:4]] == ["length"] * 4


def test_shutdown_stops_what_runs_and_leaves_no_files(store: Store) -> None:
    with fake_tensorrt_llm("1.2"):
        rig = fake_engine(store)
        with rig:
            rig.submit("running", PROMPT, [use(store.adapters["all"], 0.5)], max_tokens=70)
            rig.until(lambda answers: "running" in answers)
            llm, staging = rig.engine._backend._llm, rig.engine._staging_dir
            assert list(staging.iterdir())
        assert llm.closed and not llm.active
        assert not staging.exists()
        assert not rig.answers["running"].finish_reason


def test_room_for_adapters_follows_the_rule_and_the_memory(store: Store) -> None:
    shapes, known = BaseShapes(store.model_dir), SURFACES["1.2"].lora_modules
    room = adapter_room(shapes, known, TensorrtLlmOptions(max_adapters=4, host_adapters=10, max_rank=16))
    assert sorted(room.modules) == sorted(known.keys() - {"mlp_gate_up"})
    assert (room.device_module_layers, room.host_module_layers) == (16 * 3 * 7 * 4, 16 * 3 * 7 * 10)
    part = adapter_room(shapes, known, TensorrtLlmOptions(lora_target_modules=("mlp_gate",), max_rank=16))
    assert part.module_layers_per_adapter == 16 * 3 * 4  # q, k and v are added
    size = 3 * 16 * 2 * (2 * (64 + 128) + 2 * (64 + 64) + 3 * (64 + 96))
    tight = adapter_room(shapes, known, TensorrtLlmOptions(max_rank=16, device_adapter_bytes=2 * size + 1))
    assert (tight.max_loras, tight.max_cpu_loras) == (2, 32)
    with pytest.raises(InvalidArgument, match=f"takes {size} bytes, {size - 1} hold none"):
        adapter_room(shapes, known, TensorrtLlmOptions(max_rank=16, device_adapter_bytes=size - 1))
    with pytest.raises(InvalidArgument, match="lora_target_modules: 'attn_qkv' is not in the base model"):
        adapter_room(shapes, known, TensorrtLlmOptions(lora_target_modules=("attn_qkv",)))


@pytest.mark.parametrize(
    ("version", "options", "error", "words"),
    [
        ("1.3", {"backend": "tensorrt", "engine_dir": "x"}, UnsupportedModel, "loads no built engines any more"),
        ("1.2", {"backend": "tensorrt"}, InvalidArgument, "engine_dir: the backend 'tensorrt', and no other"),
        ("1.2", {"engine_dir": "x"}, InvalidArgument, "engine_dir: the backend 'tensorrt', and no other"),
        ("1.2", {"quantization": "int8"}, InvalidArgument, "quantization: 'int8' is not made here"),
        ("1.2", {"nonsense": 1}, InvalidArgument, "nonsense: no such option"),
    ],
)
def test_what_cannot_start_says_why(store: Store, version: str, options: dict, error: type, words: str) -> None:
    with fake_tensorrt_llm(version), pytest.raises(error) as caught:
        fake_engine(store, **options)
    assert words in str(caught.value)


def test_nothing_of_an_engine_is_imported_until_it_is_chosen() -> None:
    """And what the host process imports under another interpreter is little."""
    program = """
import sys
import openlora.engine.host, openlora.engine.vllm_engine, openlora.engine.tensorrt_llm_engine
loaded = {name.partition(".")[0] for name in sys.modules}
print(sorted(loaded & {"torch", "vllm", "tensorrt_llm", "transformers", "pydantic", "rfc8785", "peft", "safetensors"}))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_settings_of_an_engine_are_checked_by_name() -> None:
    settings = EngineSettings(kind="vllm", vllm={"enforce_eager": True, "max_ensembles": 9})
    assert (settings.max_adapters, settings.max_rank, settings.one_adapter) == (8, 64, True)
    assert EngineSettings().max_adapters == 64
    with pytest.raises(InvalidArgument, match="max_ensembles: 0 is too small"):
        EngineSettings(kind="vllm", vllm={"max_ensembles": 0})
    with pytest.raises(ValueError, match="dtype is set with all engines' settings"):
        EngineSettings(kind="vllm", vllm={"dtype": "float16"})
    with pytest.raises(InvalidArgument, match="host_adapters: 3 is too small, at least max_adapters = 8 is right"):
        options_of(OneAdapterOptions, {"host_adapters": 3})


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_the_engine_takes_what_a_recipe_gives_it(recipe: Recipe) -> None:
    given = serve_settings(recipe, Layout())["engine"]
    settings = EngineSettings.model_validate(given)
    options = options_of(TensorrtLlmOptions, settings.tensorrt_llm)
    assert {name: getattr(options, name) for name in given["tensorrt_llm"]} == given["tensorrt_llm"]
    assert set(options.lora_target_modules) <= SURFACES["1.2"].lora_modules.keys()
    assert (settings.max_rank, settings.one_adapter) == (recipe.lora.max_rank, True)


def test_a_failing_read_is_not_remembered(store: Store, tmp_path: Path) -> None:
    late = make_adapter(store.model_dir, tmp_path / "late", 5, r=2, target_modules=["q_proj"])
    wanted = use(late)
    weights = Path(late) / "adapter_model.safetensors"
    kept = weights.read_bytes()
    weights.unlink()
    with fake_tensorrt_llm("1.2"), fake_engine(store) as rig:
        assert "is missing" in rig.ask(PROMPT, [wanted]).error
        weights.write_bytes(kept)
        assert rig.ask(PROMPT, [wanted]).finish_reason == "length"
        assert rig.stats().adapters.failed_loads == 1
