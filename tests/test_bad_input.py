"""What bad input gets, through real Triton: the exact error before any token, and everybody else goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ALICE_KEY
from live_server import LiveServer
from raw_calls import ask, books, call, events, http_error, post, refusal

from openlora.adapters.catalog_reader import CatalogReader

NAME_RULE = "[A-Za-z0-9][A-Za-z0-9._-]{0,127}"


@pytest.fixture(autouse=True, scope="module")
def _answers_after_all_of_it(server: LiveServer) -> Iterator[None]:
    log = server.state_dir / "launcher.log"
    died = log.read_text().count("ended with status")
    yield
    assert server.readiness() == {"ready": True, "faults": {}}
    assert ask(server, max_tokens=3).token_ids
    assert log.read_text().count("ended with status") == died


# --- values ---------------------------------------------------------------------------------------------------------

BAD_INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    # not UTF-8, in each string
    "prompt": ({"prompt": b"ab\xffc"}, "text_input: not UTF-8: byte 2 is 0xff"),
    "surrogate": ({"prompt": "\ud800".encode(errors="surrogatepass")}, "text_input: not UTF-8: byte 0 is 0xed"),
    "cut": ({"prompt": "é".encode()[:1]}, "text_input: not UTF-8: byte 0 is 0xc3"),
    "adapters": ({"adapters": b"\xfe"}, "adapters: not UTF-8: byte 0 is 0xfe"),
    "sampling_parameters": ({"sampling": b"{\x80}"}, "sampling_parameters: not UTF-8: byte 1 is 0x80"),
    "stop_words": ({"stop_words": ["ok", b"\xff"]}, "stop_words: not UTF-8: byte 0 is 0xff"),
    "bad_words": ({"bad_words": [b"\xff"]}, "bad_words: not UTF-8: byte 0 is 0xff"),
    "api_key": ({"api_key": b"\xff"}, "api_key: not UTF-8: byte 0 is 0xff"),
    "guide": ({"guided_decoding_guide": b"\xff"}, "guided_decoding_guide: not UTF-8: byte 0 is 0xff"),
    # the caller
    "unknown key": ({"api_key": "bob"}, "api_key: unknown key"),
    # tensors
    "max_tokens 0": ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1, got 0"),
    "max_tokens": ({"max_tokens": 65_537}, "max_tokens: at most 65536 on this server, got 65537"),
    "min_tokens": ({"min_tokens": 9, "max_tokens": 8}, "min_tokens: at most max_tokens (8), got 9"),
    "top_k": ({"top_k": -2}, "top_k: Input should be greater than or equal to -1, got -2"),
    "temperature": ({"temperature": -1.0}, "temperature: Input should be greater than or equal to 0, got -1.0"),
    "temperature NaN": (
        {"temperature": np.nan},
        "temperature: Input should be less than or equal to 100, got nan",
    ),
    "temperature inf": ({"temperature": np.inf}, "temperature: Input should be less than or equal to 100, got inf"),
    "top_p": ({"top_p": 1.1}, "top_p: Input should be less than or equal to 1, got 1.1"),
    "repetition": ({"repetition_penalty": 0.0}, "repetition_penalty: Input should be greater than 0, got 0.0"),
    "presence": ({"presence_penalty": -2.5}, "presence_penalty: Input should be greater than or equal to -2, got -2.5"),
    "frequency": ({"frequency_penalty": 3.0}, "frequency_penalty: Input should be less than or equal to 2, got 3.0"),
    "17 stop words": (
        {"stop_words": ["x"] * 17},
        f"stop: at most 16 entries, got 17, got {repr(['x'] * 17)[:77]}...",
    ),
    "257 bytes": (
        {"stop_words": ["x" * 257]},
        f"stop: at most 256 bytes each, got 257, got {repr(['x' * 257])[:77]}...",
    ),
    "17 bad words": (
        {"bad_words": ["x"] * 17},
        f"bad_words: at most 16 entries, got 17, got {repr(['x'] * 17)[:77]}...",
    ),
    # JSON
    "21 logprobs": ({"sampling": {"logprobs": 21}}, "logprobs: Input should be less than or equal to 20, got 21"),
    "unknown name": ({"sampling": {"max_token": 5}}, "max_token: no such parameter"),
    "duplicate": ({"sampling": '{"top_k":1,"top_k":2}'}, "sampling_parameters: not JSON: the key 'top_k' comes twice"),
    "NaN": ({"sampling": '{"temperature":NaN}'}, "sampling_parameters: not JSON: NaN is not a JSON number"),
    "Infinity": (
        {"sampling": '{"temperature":-Infinity}'},
        "sampling_parameters: not JSON: -Infinity is not a JSON number",
    ),
    "64 KiB": (
        {"sampling": json.dumps({"stop": "x" * 65_536})},
        "sampling_parameters: at most 65536 bytes of JSON, got 65548",
    ),
    "no object": ({"sampling": "[1]"}, "sampling_parameters: a JSON object is wanted"),
    "no JSON": (
        {"sampling": "max_tokens=5"},
        "sampling_parameters: not JSON: Expecting value: line 1 column 1 (char 0)",
    ),
    "wrong type": (
        {"sampling": {"temperature": "warm"}},
        "temperature: Input should be a valid number, unable to parse string as a number, got 'warm'",
    ),
    "priority": ({"sampling": {"priority": 10**30}}, f"priority: Input should be less than {2**31}, got {10**30}"),
    "top_k JSON": ({"sampling": {"top_k": 10**30}}, f"top_k: Input should be less than {2**31}, got {10**30}"),
    "stop_token_ids": ({"sampling": {"stop_token_ids": [1_000_000]}}, "stop_token_ids: 1000000 is not below "),
    "n": ({"sampling": {"n": 2}}, "n: Input should be less than or equal to 1, got 2"),
    # two values for one setting
    "lora_name": (
        {"adapters": "pirate", "sampling": {"lora_name": "pirate"}},
        "adapters: given twice with this request, as adapters and as lora_name",
    ),
    # foreign inputs, refused by name
    "beam_width": ({"beam_width": 2}, "beam_width: not supported, only 1 is taken, got 2"),
    "sequences": ({"num_return_sequences": 2}, "num_return_sequences: not supported, only 1 is taken, got 2"),
    "length_penalty": ({"length_penalty": 0.5}, "length_penalty: not supported, only 0.0 is taken, got 0.5"),
    "guide type": (
        {"guided_decoding_guide_type": "structural_tag"},
        "guided_decoding_guide_type: 'structural_tag' is unknown, "
        "one of json, json_schema, regex, ebnf_grammar is right",
    ),
    "guide text": (
        {"guided_decoding_guide": "{}"},
        "guided_decoding_guide_type: '' is unknown, one of json, json_schema, regex, ebnf_grammar is right",
    ),
    "end_id": ({"end_id": 5}, "end_id: the model ends with [1], got 5; use stop_token_ids"),
    # too long before anything is looked at
    "a megabyte": ({"prompt": "x" * (2**20 + 1)}, "text_input: at most 1048576 bytes on this server, got 1048577"),
    "a long id": ({"label": "é" * 129}, "id: at most 256 bytes, got 258"),
    # no tokens at all
    "empty": ({"prompt": "", "sampling": {"add_special_tokens": False}}, "text_input: no tokens"),
    # adapters
    "path": ({"adapters": "../pirate"}, f"adapters: '../pirate' is no adapter name ({NAME_RULE})"),
    "absolute path": ({"adapters": "/etc"}, f"adapters: '/etc' is no adapter name ({NAME_RULE})"),
    "path in JSON": (
        {"adapters": '["../../etc/passwd"]'},
        f"adapters: '../../etc/passwd' is no adapter name ({NAME_RULE})",
    ),
    "path in lora_name": (
        {"sampling": {"lora_name": "a/../b"}},
        f"lora_name: 'a/../b' is no adapter name ({NAME_RULE})",
    ),
    "no adapter": ({"adapters": ""}, "adapters: empty; leave it out to ask the base model"),
    "base": ({"adapters": "base"}, "adapters: 'base' is the base model: leave adapters out to ask it"),
    "9 adapters": ({"adapters": json.dumps(list("abcdefghi"))}, "adapters: at most 8 adapters, got 9"),
    "weight 11": (
        {"adapters": '[{"name":"pirate","weight":11}]'},
        "adapters: weight of 'pirate': at most 10 in size, got 11",
    ),
    "weight NaN": ({"adapters": '[{"name":"pirate","weight":NaN}]'}, "adapters: not JSON: NaN is not a JSON number"),
    "weight huge": (
        {"adapters": '[{"name":"pirate","weight":1%s}]' % ("0" * 400)},
        f"adapters: weight of 'pirate': at most 10 in size, got 1{'0' * 79}",
    ),
    "weights 0": (
        {"adapters": '[{"name":"pirate","weight":0},{"name":"shout","weight":1e-9}]'},
        "adapters: all weights are zero; leave adapters out to ask the base model",
    ),
    "twice": ({"adapters": '["pirate","pirate"]'}, "adapters: 'pirate' comes twice"),
    "ties": (
        {"adapters": '{"adapters":["pirate","shout"],"method":"ties"}'},
        "adapters: method 'ties' makes new weights: only 'cat' is computed per request, "
        "make an adapter of the others with `openlora adapters merge`",
    ),
    "density": (
        {"adapters": '{"adapters":["pirate"],"density":0.5}'},
        "adapters: density has no meaning for method 'cat'",
    ),
    "adapter key": (
        {"adapters": '[{"name":"pirate","wait":1}]'},
        "adapters: unknown key 'wait', known are ['name', 'version', 'weight']",
    ),
    "version": (
        {"adapters": '[{"name":"pirate","version":"latest"}]'},
        "adapters: version 'latest' is neither a number nor the first 8 to 64 hex digits of a digest",
    ),
    "same bytes": (
        {"adapters": '["emoji","secret"]', "api_key": ALICE_KEY},
        "adapters: two of the names are the same adapter",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_invalid_argument_names_the_field(server: LiveServer, case: str) -> None:
    inputs, words = BAD_INPUTS[case]
    before = books(server)
    said = refusal(server, **inputs)
    assert said.startswith(f"[INVALID_ARGUMENT] {words}")
    assert words.endswith(" ") or said == f"[INVALID_ARGUMENT] {words}"
    assert books(server) == before


def test_a_prompt_that_is_too_long(server: LiveServer, demo: Path) -> None:
    limit = json.loads((demo / "model" / "config.json").read_text())["max_position_embeddings"]
    said = refusal(server, "a " * limit, max_tokens=16)
    assert said.startswith("[INVALID_ARGUMENT] text_input: ")
    assert said.endswith(f" tokens and max_tokens 16 are more than this model's {limit}")
    tokens = int(said.split()[2])
    assert tokens > limit
    said = refusal(server, "x" * 2**20)
    assert said.endswith(f" tokens and max_tokens 16 are more than this model's {limit}")
    assert ask(server, label="é" * 128, max_tokens=1).finish_reason == "length"
    said = refusal(server, "Hello.", max_tokens=limit)
    assert said.endswith(f" tokens and max_tokens {limit} are more than this model's {limit}")


def test_no_prompt(server: LiveServer) -> None:
    for inputs in ({"max_tokens": 3}, {"adapters": "pirate", "stream": True}, {"stop": True}):
        assert call(server, inputs).error == "[INVALID_ARGUMENT] text_input: missing"


FAULTS_OF_FORM: dict[str, tuple[dict[str, Any], str]] = {
    "two prompts": (
        {"text_input": np.array([b"a", b"b"], dtype=np.object_)},
        "unexpected shape for input 'text_input' for model 'openlora'. Expected [1], got [2]",
    ),
    "a batch dimension": (
        {"text_input": np.array([[b"a"]], dtype=np.object_)},
        "unexpected shape for input 'text_input' for model 'openlora'. Expected [1], got [1,1]",
    ),
    "a number for the prompt": (
        {"text_input": np.array([5], dtype=np.int32)},
        "inference input 'text_input' data-type is 'INT32', but model 'openlora' expects 'BYTES'",
    ),
    "a float for max_tokens": (
        {"text_input": "a", "max_tokens": np.array([5], dtype=np.float32)},
        "inference input 'max_tokens' data-type is 'FP32', but model 'openlora' expects 'INT32'",
    ),
    "an unknown tensor": (
        {"text_input": "a", "max_token": np.array([5], dtype=np.int32)},
        "unexpected inference input 'max_token' for model 'openlora'",
    ),
}


@pytest.mark.parametrize("case", FAULTS_OF_FORM)
def test_tensors_of_another_type_or_shape_are_refused_by_triton(server: LiveServer, case: str) -> None:
    inputs, words = FAULTS_OF_FORM[case]
    reply = call(server, inputs)
    assert words in str(reply.errors[0])
    assert not reply.responses


# --- request parameters and HTTP bodies ------------------------------------------------------------------------------


def test_request_parameters_are_sampling_parameters(server: LiveServer) -> None:
    prompt = {"text_input": "Tell me about the cat.", "max_tokens": 6}
    greedy = call(server, {**prompt, "temperature": 0.0})
    assert call(server, prompt, parameters={"temperature": "0"}).token_ids == greedy.token_ids
    assert call(server, prompt, parameters={"top_k": 1}).token_ids == greedy.token_ids
    for parameters, words in (
        ({"temperatur": "0"}, "temperatur: no such parameter"),
        ({"max_tokens": 6}, "max_tokens: given twice with this request"),
        ({"top_k": "few"}, "top_k: Input should be a valid integer, unable to parse string as an integer, got 'few'"),
        ({"ignore_eos": 7}, "ignore_eos: Input should be a valid boolean, unable to interpret input, got 7"),
    ):
        assert call(server, prompt, parameters=parameters).error == f"[INVALID_ARGUMENT] {words}"
    both = {**prompt, "sampling_parameters": '{"top_k": 1}'}
    assert call(server, both, parameters={"top_k": 1}).error == (
        "[INVALID_ARGUMENT] top_k: given twice with this request"
    )


BODY = {"text_input": "Tell me about the cat.", "max_tokens": 4, "temperature": 0}
BAD_BODIES: dict[str, tuple[Any, str]] = {
    "misspelt key": ({**BODY, "max_token": 4}, "[INVALID_ARGUMENT] max_token: no such parameter"),
    "capital": ({**BODY, "Stream": True}, "[INVALID_ARGUMENT] Stream: no such parameter"),
    "twice": (
        {**BODY, "sampling_parameters": '{"min_p":0.1}', "min_p": "0.1"},
        "[INVALID_ARGUMENT] min_p: given twice",
    ),
    "not UTF-8": (b'{"text_input":"a\xff"}', "[INVALID_ARGUMENT] text_input: not UTF-8: byte 1 is 0xff"),
    "NaN": (
        b'{"text_input":"a","temperature":NaN}',
        "[INVALID_ARGUMENT] temperature: Input should be less than or equal to 100, got nan",
    ),
    "adapter": ({**BODY, "adapters": "nobody"}, "[ADAPTER_NOT_FOUND] no adapter 'nobody'"),
    "no prompt": ({"max_tokens": 4}, "[INVALID_ARGUMENT] text_input: missing"),
    "nothing": ({}, "[INVALID_ARGUMENT] text_input: missing"),
}
FAULTS_OF_BODIES: dict[str, tuple[Any, str]] = {
    "word for a number": ({**BODY, "max_tokens": "four"}, "non-signed-integer as signed-integer"),
    "fraction": ({**BODY, "max_tokens": 2.5}, "non-signed-integer as signed-integer"),
    "null": ({**BODY, "max_tokens": None}, "non-signed-integer as signed-integer"),
    "negative seed": ({**BODY, "seed": -1}, "non-unsigned-integer as unsigned-integer"),
    "number for text": ({"text_input": 5}, "non-string as string"),
    "objects for text": ({**BODY, "adapters": [{"name": "pirate"}]}, "non-string as string"),
    "number for truth": ({**BODY, "stream": 1}, "non-boolean as boolean"),
    "two texts": ({"text_input": ["a", "b"]}, "can not convert input 'text_input' to tensor with proper shape"),
    "duplicate key": (b'{"text_input":"a","max_tokens":3,"max_tokens":2}', "input 'max_tokens' already exists"),
    "list for a parameter": ({**BODY, "stop_token_ids": [1]}, "parameter 'stop_token_ids' has invalid type"),
    "surrogate": (b'{"text_input":"\\ud800"}', "The surrogate pair in string is invalid"),
    "cut short": (b'{"text_input":', "failed to parse the request JSON buffer"),
}


@pytest.mark.parametrize("verb", ["generate", "generate_stream"])
@pytest.mark.parametrize("case", BAD_BODIES)
def test_bad_bodies(server: LiveServer, case: str, verb: str) -> None:
    body, words = BAD_BODIES[case]
    response = post(server, body, verb=verb)
    assert response.status_code == 400
    if verb == "generate":
        assert http_error(response).startswith(words)
    else:
        (event,) = events(response)
        assert event.keys() == {"error"}
        assert words in event["error"]


@pytest.mark.parametrize("case", FAULTS_OF_BODIES)
def test_bodies_that_triton_cannot_read(server: LiveServer, case: str) -> None:
    body, words = FAULTS_OF_BODIES[case]
    response = post(server, body)
    assert response.status_code in (400, 500)  # 500 where Triton's own parser gives up
    assert words in response.json()["error"]


def test_good_bodies(server: LiveServer) -> None:
    plain = post(server, BODY)
    assert plain.status_code == 200
    ids = plain.json()["token_ids"]
    assert len(ids) == 4
    for more in (
        {"id": "mine"},  # Triton puts it among the parameters as well
        {"temperature": 0.0, "min_p": "0.5"},
        {"ignore_eos": True},
        {"stop_words": ""},
        {"stop_words": ["", "never said"]},
    ):
        response = post(server, {**BODY, **more})
        assert (response.status_code, response.json().get("token_ids")) == (200, ids), more
    streamed = events(post(server, {**BODY, "stream": True}, verb="generate_stream"))
    assert [token for event in streamed for token in np.atleast_1d(event["token_ids"]).tolist()] == ids
    assert "receipt" in streamed[-1]


# --- what is neutral -------------------------------------------------------------------------------------------------


def test_neutral_values_of_foreign_inputs_change_nothing(server: LiveServer) -> None:
    greedy = {"max_tokens": 6, "temperature": 0.0}
    plain = ask(server, "Tell me about the cat.", **greedy)
    neutral = {
        "beam_width": 1,
        "num_return_sequences": 1,
        "length_penalty": 1.0,
        "guided_decoding_guide_type": "",
        "guided_decoding_guide": "",
        "end_id": 1,
        "pad_id": 7,
        "stop_words": ["", ""],
        "bad_words": [""],
        "return_finish_reason": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
        "top_k": 0,
        "sampling": {"n": 1, "best_of": "1", "top_k": -1, "stop": ["", ""], "logprobs": None},
    }
    assert ask(server, "Tell me about the cat.", **greedy, **neutral).token_ids == plain.token_ids
    for other in ({"length_penalty": 0.0, "end_id": -1}, {"stop_words": []}, {"sampling": ""}, {"sampling": "{}"}):
        assert ask(server, "Tell me about the cat.", **greedy, **other).token_ids == plain.token_ids, other


# --- adapters that there are not -------------------------------------------------------------------------------------


def test_an_unknown_adapter(server: LiveServer) -> None:
    before = books(server)
    assert refusal(server, adapters="nobody") == "[ADAPTER_NOT_FOUND] no adapter 'nobody'"
    assert refusal(server, adapters='["pirate", "nobody"]') == "[ADAPTER_NOT_FOUND] no adapter 'nobody'"
    assert refusal(server, sampling={"lora_name": "nobody"}) == "[ADAPTER_NOT_FOUND] no adapter 'nobody'"
    for version in (2, 0, -1, 10**12, "00000000", "f" * 64):
        wanted = json.dumps([{"name": "pirate", "version": version}])
        shown = f" version {version!r:.80}" if version else ""
        assert refusal(server, adapters=wanted) == f"[ADAPTER_NOT_FOUND] no adapter 'pirate'{shown}"
    assert books(server) == before


def test_the_right_version_by_number_and_by_digest(server: LiveServer) -> None:
    digest = CatalogReader(server.state_dir / "catalog.sqlite").lookup("pirate").digest
    for version in (1, "1", digest[:8], digest):
        reply = ask(server, adapters=json.dumps([{"name": "pirate", "version": version}]), max_tokens=1)
        (used,) = reply.receipt["blobs"]["adapters"]["adapters"]
        assert used["digest"].removeprefix("0x") == digest


@pytest.mark.parametrize(
    "form",
    [
        "{}",
        '["{}"]',
        '[{{"name": "pirate"}}, {{"name": "{}", "weight": 0.5}}]',
        '[{{"name": "{}", "version": 1}}]',
        '[{{"name": "{}", "version": "latest"}}]',
    ],
)
def test_a_forbidden_adapter_gets_the_words_of_an_unknown_one(server: LiveServer, form: str) -> None:
    """`secret` exists and is alice's alone; `secreX` doesn't exist."""
    forbidden = refusal(server, adapters=form.format("secret"))
    unknown = refusal(server, adapters=form.format("secreX"))
    assert forbidden.startswith("[ADAPTER_NOT_FOUND] no adapter 'secret'")
    assert forbidden.replace("secret", "secreX") == unknown
    over_http = {name: post(server, {**BODY, "adapters": form.format(name)}) for name in ("secret", "secreX")}
    assert http_error(over_http["secret"]) == forbidden
    assert http_error(over_http["secreX"]) == unknown
    assert over_http["secret"].status_code == over_http["secreX"].status_code
    assert over_http["secret"].headers.keys() == over_http["secreX"].headers.keys()


def test_its_owner_may_use_it(server: LiveServer) -> None:
    assert len(ask(server, adapters="secret", api_key=ALICE_KEY, max_tokens=2).token_ids) == 2
