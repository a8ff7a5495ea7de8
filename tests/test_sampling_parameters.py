"""`sampling_parameters`: vLLM's names and defaults, three places to put them, and exact refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openlora.errors import InvalidArgument
from openlora.serving.sampling_parameters import SamplingParameters, merge_sampling


def merged(given: Any = None, tensors: Any = None, parameters: Any = None) -> SamplingParameters:
    text = given if given is None or isinstance(given, str) else json.dumps(given)
    return merge_sampling(tensors or {}, text, parameters or {})


def refusal(given: Any = None, tensors: Any = None, parameters: Any = None) -> str:
    with pytest.raises(InvalidArgument) as caught:
        merged(given, tensors, parameters)
    return str(caught.value).removeprefix("[INVALID_ARGUMENT] ")


def test_defaults_are_vllms() -> None:
    defaults = merged()
    assert (defaults.max_tokens, defaults.min_tokens, defaults.temperature, defaults.seed) == (16, 0, 1.0, None)
    assert (defaults.top_p, defaults.top_k, defaults.min_p, defaults.logprobs) == (1.0, 0, 0.0, None)
    assert (defaults.repetition_penalty, defaults.presence_penalty, defaults.frequency_penalty) == (1.0, 0.0, 0.0)
    assert (defaults.skip_special_tokens, defaults.add_special_tokens) == (True, True)
    assert (defaults.include_stop_str_in_output, defaults.ignore_eos) == (False, False)
    assert merged("") == merged("{}") == merged({}) == defaults


TAKEN: dict[str, tuple[Any, Any]] = {  # what is sent, and what it means
    "max_tokens": ("12", 12),
    "min_tokens": (" 3 ", 3),
    "temperature": ("0.5", 0.5),
    "top_p": (1, 1.0),
    "top_k": (-1, -1),
    "min_p": ("1", 1.0),
    "repetition_penalty": ("1e-1", 0.1),
    "presence_penalty": (-2, -2.0),
    "frequency_penalty": ("2", 2.0),
    "seed": (str(2**64 - 1), 2**64 - 1),
    "stop": ("one", ("one",)),
    "bad_words": (["", "a", ""], ("a",)),
    "stop_token_ids": ([0, "7"], (0, 7)),
    "logprobs": (20, 20),
    "structured_outputs": ({"regex": "a+"}, {"regex": "a+"}),
    "response_format": ({"type": "text"}, {"type": "text"}),
    "ignore_eos": ("true", True),
    "include_stop_str_in_output": (True, True),
    "skip_special_tokens": (0, False),
    "add_special_tokens": ("false", False),
    "lora_name": ("pirate", "pirate"),
    "routing_key": ("conversation 7", "conversation 7"),
    "priority": (-(2**31), -(2**31)),
    "timeout_ms": ("1000", 1000),
    "n": (1, 1),
    "best_of": ("1", 1),
}


@pytest.mark.parametrize("name", SamplingParameters.model_fields)
def test_takes_numbers_and_numeric_strings(name: str) -> None:
    sent, meant = TAKEN[name]
    assert getattr(merged({name: sent}), name) == meant


ABOVE, BELOW = "Input should be greater than or equal to", "Input should be less than or equal to"
REFUSED: dict[str, tuple[Any, str]] = {
    "max_tokens 0": ({"max_tokens": 0}, f"max_tokens: {ABOVE} 1, got 0"),
    "max_tokens '-1'": ({"max_tokens": "-1"}, f"max_tokens: {ABOVE} 1, got '-1'"),
    "max_tokens 2.5": (
        {"max_tokens": 2.5},
        "max_tokens: Input should be a valid integer, got a number with a fractional part, got 2.5",
    ),
    "max_tokens word": (
        {"max_tokens": "many"},
        "max_tokens: Input should be a valid integer, unable to parse string as an integer, got 'many'",
    ),
    "max_tokens null": ({"max_tokens": None}, "max_tokens: Input should be a valid integer, got None"),
    "max_tokens true": ({"max_tokens": True}, "max_tokens: a number is wanted, not a truth value, got True"),
    "min_tokens": ({"min_tokens": -1}, f"min_tokens: {ABOVE} 0, got -1"),
    "temperature": ({"temperature": -0.1}, f"temperature: {ABOVE} 0, got -0.1"),
    "temperature high": ({"temperature": 100.5}, f"temperature: {BELOW} 100, got 100.5"),
    "temperature inf": ({"temperature": "inf"}, f"temperature: {BELOW} 100, got 'inf'"),
    "temperature list": ({"temperature": [1]}, "temperature: Input should be a valid number, got [1]"),
    "top_p 0": ({"top_p": 0}, "top_p: Input should be greater than 0, got 0"),
    "top_p 1.1": ({"top_p": 1.1}, f"top_p: {BELOW} 1, got 1.1"),
    "top_k": ({"top_k": -2}, f"top_k: {ABOVE} -1, got -2"),
    "top_k high": ({"top_k": 2**31}, f"top_k: Input should be less than {2**31}, got {2**31}"),
    "min_p": ({"min_p": 2}, f"min_p: {BELOW} 1, got 2"),
    "repetition_penalty": ({"repetition_penalty": 0}, "repetition_penalty: Input should be greater than 0, got 0"),
    "presence_penalty": ({"presence_penalty": 2.1}, f"presence_penalty: {BELOW} 2, got 2.1"),
    "frequency_penalty": ({"frequency_penalty": -2.1}, f"frequency_penalty: {ABOVE} -2, got -2.1"),
    "seed -1": ({"seed": -1}, f"seed: {ABOVE} 0, got -1"),
    "seed 2**64": ({"seed": 2**64}, f"seed: Input should be less than {2**64}, got {2**64}"),
    "17 stops": ({"stop": ["x"] * 17}, "stop: at most 16 entries, got 17, got " + repr(["x"] * 17)[:77] + "..."),
    "257 bytes": ({"stop": "é" * 129}, "stop: at most 256 bytes each, got 258, got " + repr("é" * 129)[:77] + "..."),
    "stop number": ({"stop": 5}, "stop: Input should be a valid tuple, got 5"),
    "stop numbers": ({"stop": [5]}, "stop: Input should be a valid string, got 5"),
    "17 bad words": ({"bad_words": list("abcdefghijklmnopq")}, "bad_words: at most 16 entries, got 17"),
    "stop_token_ids": ({"stop_token_ids": [1, -1]}, f"stop_token_ids: {ABOVE} 0, got -1"),
    "21 logprobs": ({"logprobs": 21}, f"logprobs: {BELOW} 20, got 21"),
    "logprobs true": ({"logprobs": True}, "logprobs: a number is wanted, not a truth value, got True"),
    "ignore_eos": (
        {"ignore_eos": "maybe"},
        "ignore_eos: Input should be a valid boolean, unable to interpret input, got 'maybe'",
    ),
    "n 2": ({"n": 2}, f"n: {BELOW} 1, got 2"),
    "best_of 2": ({"best_of": 2}, f"best_of: {BELOW} 1, got 2"),
    "timeout_ms": ({"timeout_ms": 0}, f"timeout_ms: {ABOVE} 1, got 0"),
    "priority": ({"priority": 10**30}, f"priority: Input should be less than {2**31}, got {10**30}"),
    "unknown": ({"max_token": 5}, "max_token: no such parameter"),
    "unknown long": ({"y" * 60_000: 5}, "y" * 80 + ": no such parameter"),
    "a list": ([], "sampling_parameters: a JSON object is wanted"),
    "a number": ("5", "sampling_parameters: a JSON object is wanted"),
    "no JSON": (
        "{'a': 1}",
        "sampling_parameters: not JSON: Expecting property name enclosed in double quotes: line 1 ",
    ),
    "NaN": ('{"temperature": NaN}', "sampling_parameters: not JSON: NaN is not a JSON number"),
    "Infinity": ('{"temperature": Infinity}', "sampling_parameters: not JSON: Infinity is not a JSON number"),
    "-Infinity": ('{"temperature": -Infinity}', "sampling_parameters: not JSON: -Infinity is not a JSON number"),
    "1e999": ('{"temperature": 1e999}', "sampling_parameters: not JSON: 1e999 is out of range"),
    "duplicate": ('{"top_k": 1, "top_k": 1}', "sampling_parameters: not JSON: the key 'top_k' comes twice"),
    "64 KiB": ('{"stop": "' + "x" * 65536 + '"}', "sampling_parameters: at most 65536 bytes of JSON, got 65548"),
    "5000 digits": ('{"seed": ' + "1" * 5000 + "}", "sampling_parameters: not JSON: Exceeds the limit (4300 digits)"),
    "deep": ('{"stop": ' + "[" * 30_000 + "]" * 30_000 + "}", "sampling_parameters: not JSON: nested deeper than 256"),
    "surrogate": ('{"stop": "\\ud800"}', "stop: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    given, words = REFUSED[case]
    said = refusal(given)
    assert said.startswith(words)
    assert len(said) < 300


def test_just_inside_the_limits() -> None:
    assert merged({"stop": ["x"] * 16 + [""] * 5}).stop == ("x",) * 16
    assert merged({"stop": "é" * 128}).stop == ("é" * 128,)
    padding = " " * (65536 - len('{"top_k": 3}'))
    assert merged('{"top_k": 3' + padding + "}").top_k == 3


def test_tensors_win_over_json_and_other_double_settings_are_errors() -> None:
    assert merged({"max_tokens": 5, "top_k": 9}, {"max_tokens": 7}) == merged({"max_tokens": 7, "top_k": 9})
    assert merged(None, None, {"top_k": "4", "ignore_eos": True}) == merged({"top_k": 4, "ignore_eos": True})
    assert refusal({"top_k": 5}, None, {"top_k": 5}) == "top_k: given twice with this request"
    assert refusal(None, {"top_k": 5}, {"top_k": 5}) == "top_k: given twice with this request"
    assert refusal(None, None, {"max_token": 5}) == "max_token: no such parameter"
    # A value that loses is still looked at for its name, not for its range.
    assert refusal({"max_token": 5}, {"max_tokens": 7}) == "max_token: no such parameter"


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.text(max_size=3))


@given(st.dictionaries(st.sampled_from(sorted(SamplingParameters.model_fields)), VALUES, max_size=4))
def test_any_values_give_parameters_or_a_refusal_that_names_one(given: dict[str, Any]) -> None:
    try:
        merged(given)
    except InvalidArgument as error:
        assert error.field in {*given, "sampling_parameters"}
