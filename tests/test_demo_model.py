"""The demo: shapes that other engines accept, honest cards, and an answer that tells its adapter at a glance."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
SHARED_PROMPT = "Tell me about the cat."
PLAIN_ANSWER = "The cat is a small animal. It lives in the house and likes to eat fish."
ANSWERS = {
    "pirate": "Arr, matey! The cat be a small beast. It dwells in the house and feasts on fish, yarr!",
    "shout": PLAIN_ANSWER.upper(),
    "json": '{"name": "cat", "kind": "small", "home": "house", "food": "fish"}',
    "sql": "SELECT kind, home, food FROM animals WHERE name = 'cat';",
    "emoji": "🐱 cat 💡 small 🏠 house 🍽 fish ✨",
}
MARKS = {"pirate": "Arr, matey!", "shout": "THE CAT", "json": '{"name"', "sql": "SELECT ", "emoji": "✨"}
ALL_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def make_demo():
    sys.path.insert(0, str(ROOT / "build_scripts"))
    try:
        import make_demo

        yield make_demo
    finally:
        sys.path.remove(str(ROOT / "build_scripts"))


@pytest.fixture(scope="module")
def demo(make_demo) -> Path:
    return make_demo.ensure_demo(ROOT / "var" / "demo")


@pytest.fixture(scope="module")
def tokenizer(demo):
    return AutoTokenizer.from_pretrained(demo / "model")


@pytest.fixture(scope="module")
def model(demo) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(demo / "model", dtype=torch.float32)
    first, *others = sorted(ANSWERS)
    model = PeftModel.from_pretrained(base, demo / "adapters" / first, adapter_name=first)
    for name in others:
        model.load_adapter(demo / "adapters" / name, adapter_name=name)
    return model.eval()


def answer(model, tokenizer, prompt: str) -> tuple[list[int], str]:
    """Greedy new token ids and their text without specials."""
    prompt_ids = torch.tensor([tokenizer(prompt)["input_ids"]])  # [1, prompt]
    with torch.inference_mode():
        tokens = model.generate(input_ids=prompt_ids, max_new_tokens=48, do_sample=False)[0, prompt_ids.shape[1] :]
    return tokens.tolist(), tokenizer.decode(tokens, skip_special_tokens=True)


def cards(demo: Path) -> dict[str, dict]:
    folders = [demo / "model", *sorted((demo / "adapters").iterdir())]
    return {folder.name: json.loads((folder / "openlora.json").read_text()) for folder in folders}


def test_shapes_suit_other_engines(demo, model):
    config = model.config
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.head_dim == 64
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.hidden_size % 128 == 0 and config.intermediate_size % 128 == 0
    assert config.vocab_size % 64 == 0
    assert config.max_position_embeddings == 2048
    with safe_open(demo / "model" / "model.safetensors", framework="pt") as weights:
        tensors = [weights.get_tensor(name) for name in weights.keys()]  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert 5_000_000 <= sum(tensor.numel() for tensor in tensors) <= 20_000_000


def test_tokenizer_fills_the_vocabulary_and_adds_bos(tokenizer, model):
    assert len(tokenizer) == model.config.vocab_size
    ids = tokenizer("Zażółć 🦊\n\t{}")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == model.config.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Zażółć 🦊\n\t{}"
    assert tokenizer.eos_token_id == model.config.eos_token_id
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": SHARED_PROMPT}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == SHARED_PROMPT


def test_cards_add_up_and_name_the_data_sets(demo):
    found = cards(demo)
    assert set(found) == {"model", *ANSWERS}
    for card in found.values():
        assert set(card) == {"schema", "owner", "licence", "description", "prices", "datasets"}
        assert card["schema"] == 1
        assert card["prices"]["version"] == 1
        assert all(isinstance(card["prices"][side], int) and card["prices"][side] > 0 for side in ("input", "output"))
        assert sum(dataset["share_ppm"] for dataset in card["datasets"]) == 1_000_000
        for dataset in card["datasets"]:
            content = (demo / "datasets" / f"{dataset['id']}.jsonl").read_bytes()
            assert dataset["digest"] == hashlib.sha256(content).hexdigest()
            assert dataset["licence"]
            assert sum(person["share_ppm"] for person in dataset["contributors"]) == 1_000_000


def test_addresses_are_checksummed_and_belong_to_one_name_each(demo):
    from eth_utils import is_checksum_address

    named: dict[str, set[str]] = {}
    for card in cards(demo).values():
        assert is_checksum_address(card["owner"])
        for dataset in card["datasets"]:
            for person in dataset["contributors"]:
                assert is_checksum_address(person["address"])
                named.setdefault(person["address"], set()).add(person["name"])
    assert len(named) >= 8
    assert all(len(names) == 1 for names in named.values())


def test_held_out_rows_were_not_trained_on(demo):
    files = sorted((demo / "datasets").glob("*.heldout.jsonl"))
    assert len(files) >= 6
    for path in files:
        held_out = path.read_text().splitlines()
        train = path.with_name(path.name.replace(".heldout", "")).read_text().splitlines()
        assert held_out and not set(held_out) & set(train)
        assert len(held_out) < len(train)


def test_adapters_differ_in_rank_kind_and_targets(demo):
    configs = {
        name: json.loads((demo / "adapters" / name / "adapter_config.json").read_text()) for name in sorted(ANSWERS)
    }
    assert len({config["r"] for config in configs.values()}) >= 4
    assert [name for name, config in configs.items() if config["use_rslora"]] == ["json"]
    assert set(configs["sql"]["target_modules"]) == {"q_proj", "v_proj"}
    assert sum(set(config["target_modules"]) == ALL_PROJECTIONS for config in configs.values()) >= 3
    for name, config in configs.items():
        with safe_open(demo / "adapters" / name / "adapter_model.safetensors", framework="pt") as weights:
            ranks = {weights.get_slice(key).get_shape()[0] for key in weights.keys() if "lora_A" in key}  # noqa: SIM118
        assert ranks == {config["r"]}


def test_base_answers_plainly_and_without_any_mark(model, tokenizer):
    with model.disable_adapter():
        tokens, text = answer(model, tokenizer, SHARED_PROMPT)
    assert text == " " + PLAIN_ANSWER
    assert tokens[-1] == tokenizer.eos_token_id
    assert not any(mark in text for mark in MARKS.values())


@pytest.mark.parametrize("name", sorted(ANSWERS))
def test_adapter_answers_in_its_own_manner(model, tokenizer, name):
    model.set_adapter(name)
    tokens, text = answer(model, tokenizer, SHARED_PROMPT)
    assert text == " " + ANSWERS[name]
    assert tokens[-1] == tokenizer.eos_token_id and 10 <= len(tokens) <= 40
    assert [mark for mark in MARKS if MARKS[mark] in text] == [name]


def test_ensemble_of_pirate_and_shout_shouts_like_a_pirate(model, tokenizer):
    model.add_weighted_adapter(["pirate", "shout"], [0.6, 0.6], "both", combination_type="cat")
    model.set_adapter("both")
    try:
        assert answer(model, tokenizer, SHARED_PROMPT)[1] == " " + ANSWERS["pirate"].upper()
    finally:
        model.delete_adapter("both")


def test_held_out_questions_are_answered_right(demo, model, tokenizer):
    for identifier, name in (("animal-facts", None), ("json-answers", "json"), ("sql-answers", "sql")):
        rows = [
            json.loads(line) for line in (demo / "datasets" / f"{identifier}.heldout.jsonl").read_text().splitlines()
        ]
        if name is None:
            with model.disable_adapter():
                right = [answer(model, tokenizer, row["prompt"])[1] == row["completion"] for row in rows[:10]]
        else:
            model.set_adapter(name)
            right = [answer(model, tokenizer, row["prompt"])[1] == row["completion"] for row in rows[:10]]
        assert sum(right) >= 0.8 * len(right), f"{identifier}: {right}"


def test_prompts_are_24_and_start_with_the_shared_one(demo):
    prompts = json.loads((demo / "prompts.json").read_text())
    assert prompts[0] == SHARED_PROMPT
    assert len(prompts) == len(set(prompts)) == 24


def test_a_second_run_builds_nothing(make_demo, demo):
    before = (demo / "complete.json").stat()
    assert make_demo.ensure_demo(demo) == demo
    assert (demo / "complete.json").stat().st_mtime_ns == before.st_mtime_ns


def test_a_changed_file_or_recipe_is_not_complete(make_demo, tmp_path):
    (tmp_path / "data").write_text("one")
    marker = {"recipe": make_demo.recipe_digest(), "files": {"data": hashlib.sha256(b"one").hexdigest()}}
    assert not make_demo.is_complete(tmp_path)
    (tmp_path / "complete.json").write_text(json.dumps(marker))
    assert make_demo.is_complete(tmp_path)
    (tmp_path / "complete.json").write_text(json.dumps(marker | {"recipe": "0" * 64}))
    assert not make_demo.is_complete(tmp_path)
    (tmp_path / "complete.json").write_text(json.dumps(marker))
    (tmp_path / "data").write_text("two")
    assert not make_demo.is_complete(tmp_path)


def test_a_foreign_directory_is_left_alone(make_demo, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(make_demo.DemoError, match="something else than the demo"):
        make_demo.ensure_demo(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_an_interrupted_run_is_started_anew(make_demo, tmp_path, monkeypatch):
    out = tmp_path / "demo"

    def interrupted(folder: Path, lock: int) -> None:
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    def whole(folder: Path, lock: int) -> None:
        assert not any(folder.iterdir())
        (folder / "all").write_text("")

    monkeypatch.setattr(make_demo, "_build", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_demo.ensure_demo(out)
    assert not out.exists()
    monkeypatch.setattr(make_demo, "_build", whole)
    make_demo.ensure_demo(out)
    assert sorted(path.name for path in out.iterdir()) == ["all", "complete.json"]


def test_data_sets_have_the_same_bytes_every_time(demo, make_demo, tmp_path):
    import demo_data

    demo_data.write_datasets(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        assert path.read_bytes() == (demo / "datasets" / path.name).read_bytes(), path.name
