"""Hostile adapters by `adapter_config.json`: what is no JSON, ranks, patterns that never end, settings unheard of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hostile_kind import CONFIG, Hostile, Maker, file, harmless


def _set(**changes: Any) -> Maker:
    def make(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return make


def _with(key: str, value: str) -> Maker:
    """`value` is JSON as it stands in the file, whatever `json` would write."""

    def make(folder: Path) -> None:
        path = folder / CONFIG
        tree = json.loads(path.read_text())
        tree.pop(key, None)
        path.write_text(f"{json.dumps(tree)[:-1]}, {json.dumps(key)}: {value}}}")

    return make


def _encoded(codec: str) -> Maker:
    def make(folder: Path) -> None:
        path = folder / CONFIG
        path.write_bytes(path.read_text().encode(codec))

    return make


def _without(key: str) -> Maker:
    def make(folder: Path) -> None:
        path = folder / CONFIG
        tree = json.loads(path.read_text())
        del tree[key]
        path.write_text(json.dumps(tree))

    return make


def _deep(levels: int) -> str:
    return "[" * levels + "]" * levels


NO_JSON = "adapter_config.json is not JSON"
TEXTS = {
    "config-empty-file": Hostile(file(CONFIG, b""), NO_JSON),
    "config-array": Hostile(file(CONFIG, b"[]"), "adapter_config.json holds a list, a JSON object is wanted"),
    "config-null": Hostile(file(CONFIG, b"null"), "adapter_config.json holds a NoneType, a JSON object is wanted"),
    "config-number": Hostile(file(CONFIG, b"1"), "adapter_config.json holds a int, a JSON object is wanted"),
    "config-text": Hostile(file(CONFIG, b'"LORA"'), "adapter_config.json holds a str, a JSON object is wanted"),
    "config-object-empty": Hostile(file(CONFIG, b"{}"), "peft_type is None, only 'LORA' is supported"),
    "config-cut-short": Hostile(file(CONFIG, b'{"peft_type": "LORA"'), NO_JSON),
    "config-with-more-behind": Hostile(file(CONFIG, b"{} {}"), NO_JSON),
    "config-not-UTF-8": Hostile(file(CONFIG, b'{"a": "\xff"}'), NO_JSON),
    "config-with-BOM": Hostile(_encoded("utf-8-sig"), NO_JSON),
    "config-UTF-16": Hostile(_encoded("utf-16"), NO_JSON),
    "config-of-zeros": Hostile(file(CONFIG, bytes(1000)), NO_JSON),
    "config-over-1-MiB": Hostile(_set(revision="x" * (1 << 20)), "bytes, at most 1048576 are possible here"),
    "config-twice-the-key": Hostile(_with("r", '4, "r": 8'), "comes twice"),
    "config-deep": Hostile(_with("revision", _deep(500)), "adapter_config.json is not JSON: nested deeper than 32"),
    "config-too-deep-to-parse": Hostile(_with("revision", _deep(100_000)), NO_JSON),
    "config-NaN": Hostile(_with("lora_dropout", "NaN"), "NaN is not a JSON number"),
    "config-Infinity": Hostile(_with("lora_dropout", "-Infinity"), "-Infinity is not a JSON number"),
    "config-1e400": Hostile(_with("lora_dropout", "1e400"), "1e400 is out of range"),
    "config-number-of-5000-digits": Hostile(_with("lora_dropout", "1" * 5000), NO_JSON),
    "config-surrogate-key": Hostile(_with("\ud800", "1"), r"the setting \ud800 = 1 is not supported"),
    "config-key-with-escapes": Hostile(_set(**{"\x1b[2J\n": 1}), r"the setting \x1b[2J\n = 1 is not supported"),
    "config-key-with-markup": Hostile(_set(**{"[/red]": 1}), "the setting [/red] = 1 is not supported"),
    "config-key-of-a-megabyte": Hostile(_set(**{"k" * 1_000_000: 1}), "kkkk…"),
    "config-of-half-a-megabyte": harmless(_set(base_model_name_or_path="../../etc/passwd\x1b[2J" * 20_000)),
    "config-code-of-a-stranger": harmless(_set(auto_mapping={"base_model_class": "os", "parent_library": "os"})),
}

SLOW = "(([a-z._0-9]+)+)+!"
TOO_SLOW = "checking it took more than 2 s: the patterns in its configuration are too slow"
RATHER_SLOW = "[a-z._0-9]*" * 8 + "!"  # some tenths of a second a name
NO_RANK = "a whole number of at least 1 is wanted"
SETTINGS = {
    "rank-100000": Hostile(_set(r=100_000), "rank 100000 is over the limit of 16"),
    "rank-100000-in-a-pattern": Hostile(_set(rank_pattern={"x": 100_000}), "rank 100000 is over the limit of 16"),
    "rank-of-4000-digits": Hostile(_with("r", "9" * 4000), "rank 99999999"),
    "rank-0": Hostile(_set(r=0), f"rank r is 0, {NO_RANK}"),
    "rank-negative": Hostile(_set(r=-4), f"rank r is -4, {NO_RANK}"),
    "rank-float": Hostile(_set(r=4.0), f"rank r is 4.0, {NO_RANK}"),
    "rank-text": Hostile(_set(r="4"), f"rank r is '4', {NO_RANK}"),
    "rank-true": Hostile(_set(r=True), f"rank r is True, {NO_RANK}"),
    "rank-list": Hostile(_set(r=[4]), f"rank r is [4], {NO_RANK}"),
    "rank-missing": Hostile(_without("r"), f"rank r is None, {NO_RANK}"),
    "rank-pattern-list": Hostile(_set(rank_pattern=[1]), "rank_pattern is [1], an object of patterns is wanted"),
    "rank-pattern-null": Hostile(_set(rank_pattern=None), "rank_pattern is None, an object of patterns is wanted"),
    "rank-pattern-other": Hostile(_set(rank_pattern={"q_proj": 8}), "has rank 4, adapter_config.json says 8"),
    "rank-pattern-broken": Hostile(_set(rank_pattern={"(": 4}), "rank_pattern: '(.*\\\\.)?(()$' is not a pattern"),
    "rank-pattern-slow": Hostile(_set(rank_pattern={SLOW: 4}), TOO_SLOW),
    "alpha-pattern-rather-slow": Hostile(
        _set(alpha_pattern={RATHER_SLOW: 4}), "the patterns in its configuration took"
    ),
    "rank-pattern-of-memory": Hostile(
        _set(rank_pattern={"(?:a?b?){2000000000}": 4}), "checking it needs more than 512 MiB of memory"
    ),
    "rank-patterns-50000": Hostile(
        _set(rank_pattern={f"x{number}": 4 for number in range(50_000)}), "rank_pattern has 50000 entries, at most 2048"
    ),
    "alpha-NaN": Hostile(_with("lora_alpha", "NaN"), "NaN is not a JSON number"),
    "alpha-Infinity": Hostile(_with("lora_alpha", "Infinity"), "Infinity is not a JSON number"),
    "alpha-1e400": Hostile(_with("lora_alpha", "1e400"), "1e400 is out of range"),
    "alpha-1e308": Hostile(_set(lora_alpha=1e308), "lora_alpha is out of range, a finite number of 32 bits is wanted"),
    "alpha-of-4000-digits": Hostile(_with("lora_alpha", "9" * 4000), "lora_alpha is out of range, a finite number"),
    "alpha-text": Hostile(_set(lora_alpha="8"), "lora_alpha is '8', a number is wanted"),
    "alpha-true": Hostile(_set(lora_alpha=True), "lora_alpha is True, a number is wanted"),
    "alpha-missing": Hostile(_without("lora_alpha"), "lora_alpha is None, a number is wanted"),
    "alpha-pattern-1e39": Hostile(_set(alpha_pattern={"q_proj": -1e39}), "is out of range, a finite number of 32"),
    "targets-slow": Hostile(_set(target_modules=SLOW), TOO_SLOW),
    "targets-broken": Hostile(_set(target_modules="q_proj("), "target_modules: 'q_proj(' is not a pattern"),
    "targets-number": Hostile(_set(target_modules=7), "target_modules is 7, a pattern or a list of names is wanted"),
    "targets-of-numbers": Hostile(_set(target_modules=[7]), "target_modules is [7], a pattern or a list of names is"),
    "targets-none": Hostile(_set(target_modules=[]), "target_modules is missing"),
    "targets-200000": Hostile(
        _set(target_modules=["q_proj"] * 99_999), "target_modules has 99999 entries, at most 2048 are allowed"
    ),
    "targets-elsewhere": Hostile(_set(target_modules=["query"]), "match no module of the base model"),
    "targets-output-head": Hostile(_set(target_modules=["q_proj", "lm_head"]), "LoRA on lm_head (embeddings, output"),
    "targets-embedding": Hostile(_set(target_modules=["embed_tokens"]), "LoRA on model.embed_tokens (embeddings, out"),
    "excluded-slow": Hostile(_set(exclude_modules=SLOW), TOO_SLOW),
    "layers-pattern-slow": Hostile(_set(layers_to_transform=[0], layers_pattern=[SLOW]), TOO_SLOW),
    "layers-true": Hostile(_set(layers_to_transform=True), "a list of layer numbers is wanted"),
    "layers-negative": Hostile(_set(layers_to_transform=[-1]), "match no module of the base model"),
    "DoRA": Hostile(_set(use_dora=True), "DoRA is not supported"),
    "bias": Hostile(_set(bias="lora_only"), "bias is 'lora_only', only 'none' is supported"),
    "bias-of-LoRA": Hostile(_set(lora_bias=True), "biases of LoRA matrices (lora_bias) are not supported"),
    "saved-modules": Hostile(_set(modules_to_save=["lm_head"]), "it brings whole modules (modules_to_save), only LoRA"),
    "saved-tokens": Hostile(_set(trainable_token_indices=[1]), "trained token embeddings are not supported"),
    "layers-replicated": Hostile(_set(layer_replication=[[0, 3]]), "layer replication changes the base model and is"),
    "parameters-targeted": Hostile(_set(target_parameters=["x"]), "LoRA on bare parameters (target_parameters) is not"),
    "PiSSA": Hostile(_set(init_lora_weights="pissa"), "init_lora_weights 'pissa' trains against changed base weights"),
    "OLoRA": Hostile(_set(init_lora_weights="olora"), "init_lora_weights 'olora' trains against changed base weights"),
    "LoftQ": Hostile(_set(init_lora_weights="loftq"), "init_lora_weights 'loftq' trains against changed base weights"),
    "init-1": Hostile(_set(init_lora_weights=1), "init_lora_weights 1 trains against changed base weights"),
    "not-LoRA": Hostile(_set(peft_type="IA3"), "peft_type is 'IA3', only 'LORA' is supported"),
    "not-a-causal-LM": Hostile(_set(task_type="SEQ_CLS"), "task_type is 'SEQ_CLS', only 'CAUSAL_LM' is supported"),
    "setting-unknown": Hostile(_set(run_this="rm -rf /"), "the setting run_this = 'rm -rf /' is not supported"),
    "setting-unknown-zero": Hostile(_set(run_this=0), "the setting run_this = 0 is not supported"),
    "setting-in-capitals": Hostile(_set(USE_DORA=True), "the setting USE_DORA = True is not supported"),
    "layers-out-of-range-too": harmless(_set(layers_to_transform=[0, 1, 2, 10**30])),
}
CONFIGS = {**TEXTS, **SETTINGS}
