"""Sampling parameters and outputs through Triton: TensorRT-LLM's tensors, vLLM's JSON, and what comes back."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from live_server import LiveServer
from raw_calls import ask, post
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

PROMPT = "Tell me about the cat."
GREEDY = {"temperature": 0.0, "max_tokens": 24}
LONG = {"temperature": 0.0, "max_tokens": 60}  # beyond the end of the answer, where the model repeats itself
HOT = {"temperature": 3.0, "seed": 5, "max_tokens": 24}
ALWAYS = {"text_output", "request_id", "token_ids", "finish_reason", "num_input_tokens", "num_output_tokens"}
EOS = 1


@pytest.fixture(scope="module")
def tokenizer(demo: Path) -> Tokenizer:
    return Tokenizer.from_file(str(demo / "model" / "tokenizer.json"))


@pytest.fixture(scope="module")
def oracle(demo: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(demo / "model", dtype=torch.float32).eval()

    def logprobs(prompt_ids: list[int], output_ids: list[int]) -> torch.Tensor:
        """log-softmax at each place of the output: [output tokens, vocabulary]."""
        with torch.no_grad():
            logits = model(torch.tensor([prompt_ids + output_ids])).logits[0]
        return torch.log_softmax(logits.double(), -1)[len(prompt_ids) - 1 : -1]

    return logprobs


# --- the same setting in two ways ------------------------------------------------------------------------------------

SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # tensors, JSON
    "temperature": ({**HOT, "temperature": 1.3}, {**HOT, "temperature": 1.3}),  # float32 and a JSON number
    "top_k": ({**HOT, "top_k": 3}, {**HOT, "top_k": 3}),
    "top_p": ({**HOT, "top_p": 0.3}, {**HOT, "top_p": 0.3}),
    "seed": ({**HOT, "seed": 2**64 - 1}, {**HOT, "seed": str(2**64 - 1)}),
    "repetition_penalty": ({**LONG, "repetition_penalty": 1.7}, {**LONG, "repetition_penalty": 1.7}),
    "presence_penalty": ({**LONG, "presence_penalty": 2.0}, {**LONG, "presence_penalty": 2}),
    "frequency_penalty": ({**LONG, "frequency_penalty": 2.0}, {**LONG, "frequency_penalty": "2"}),
    "stop": ({"stop_words": ["the", " a"], "temperature": 0.0}, {"stop": ["the", " a"], "temperature": 0}),
    "bad_words": ({"bad_words": ["cat"], "temperature": 0.0}, {"bad_words": "cat", "temperature": 0}),
    "min_tokens": ({"min_tokens": 20, "temperature": 0.0}, {"min_tokens": 20, "temperature": 0}),
}


@pytest.mark.parametrize("case", SAME)
def test_a_tensor_and_its_json_name_mean_the_same(server: LiveServer, case: str) -> None:
    by_tensor, by_json = SAME[case]
    common = {"ignore_eos": case != "min_tokens"}
    one = ask(server, PROMPT, common, **{"max_tokens": 24, **by_tensor})
    other = ask(server, PROMPT, {**common, "max_tokens": 24, **by_json})
    assert one.token_ids == other.token_ids
    assert one.text == other.text


def test_each_setting_does_something(server: LiveServer) -> None:
    """So that equality above means more than that both were dropped."""
    greedy = ask(server, PROMPT, **GREEDY)
    for changed in ({"stop_words": ["the", " a"]}, {"bad_words": ["cat"]}, {"max_tokens": 3}):
        assert ask(server, PROMPT, **{**GREEDY, **changed}).token_ids != greedy.token_ids, changed
    assert len(ask(server, PROMPT, min_tokens=23, **GREEDY).token_ids) > len(greedy.token_ids)
    hot = ask(server, PROMPT, **HOT)
    for changed in ({"temperature": 1.3}, {"seed": 6}, {"top_k": 3}, {"top_p": 0.3}):
        assert ask(server, PROMPT, **{**HOT, **changed}).token_ids != hot.token_ids, changed
    long = ask(server, PROMPT, {"ignore_eos": True}, **LONG)
    for penalty in ({"repetition_penalty": 1.7}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
        assert ask(server, PROMPT, {"ignore_eos": True}, **LONG, **penalty).token_ids != long.token_ids, penalty
    # Filters that leave one candidate are greedy at any temperature.
    for filtered in ({"top_k": 1}, {"top_p": 1e-6}, {"sampling": {"min_p": 1.0}}):
        assert ask(server, PROMPT, max_tokens=24, temperature=5.0, **filtered).token_ids == greedy.token_ids, filtered


def test_tensors_win_over_json(server: LiveServer) -> None:
    greedy = ask(server, PROMPT, **GREEDY).token_ids
    losing = {"temperature": 9, "max_tokens": 3, "stop": ["a"], "top_k": 50}
    assert ask(server, PROMPT, sampling=losing, stop_words=["\x00"], **GREEDY).token_ids == greedy


def test_a_seed_decides_and_its_absence_does_not(server: LiveServer) -> None:
    hot = {"max_tokens": 16, "temperature": 2.0}
    first = ask(server, PROMPT, seed=11, **hot).token_ids
    assert ask(server, PROMPT, seed=11, stream=True, **hot).token_ids == first
    assert ask(server, PROMPT, seed=12, **hot).token_ids != first
    assert len({tuple(ask(server, PROMPT, **hot).token_ids) for _ in range(4)}) > 1


def test_bad_words_never_come(server: LiveServer) -> None:
    plain = ask(server, PROMPT, **GREEDY).text
    word = max(plain.split(), key=len).strip(".,!")
    assert word in plain
    assert word not in ask(server, PROMPT, bad_words=[word], **GREEDY).text


# --- outputs -----------------------------------------------------------------------------------------------------


def test_an_answer_in_one_response(server: LiveServer, tokenizer: Tokenizer) -> None:
    reply = ask(server, PROMPT, **GREEDY)
    assert len(reply.responses) == 1
    assert {output.name for output in reply.responses[0].get_response().outputs} == ALWAYS | {"receipt"}
    assert reply.numbers("num_input_tokens") == [len(tokenizer.encode(PROMPT).ids)]
    assert reply.numbers("num_output_tokens") == [len(reply.token_ids)]
    assert reply.text == tokenizer.decode(reply.token_ids)
    assert reply.receipt["in_tokens"] == len(tokenizer.encode(PROMPT).ids)
    assert reply.receipt["out_tokens"] == len(reply.token_ids)
    assert reply.receipt["request_id"].removeprefix("0x") == reply.strings("request_id")[0]


def test_a_stream(server: LiveServer, tokenizer: Tokenizer) -> None:
    reply = ask(server, PROMPT, stream=True, **GREEDY)
    whole = ask(server, PROMPT, **GREEDY)
    assert len(reply.responses) > 5
    assert (reply.token_ids, reply.text) == (whole.token_ids, whole.text)
    assert set(reply.numbers("num_input_tokens")) == {len(tokenizer.encode(PROMPT).ids)}
    counts = [len(response.as_numpy("token_ids")) for response in reply.responses]
    assert reply.numbers("num_output_tokens") == counts
    assert set(reply.strings("finish_reason")[:-1]) == {""}
    assert reply.finish_reason == whole.finish_reason
    assert len(set(reply.strings("request_id"))) == 1
    assert reply.responses[-1].as_numpy("receipt") is not None  # and on no other: `receipt` takes exactly one
    assert reply.receipt["out_tokens"] == len(reply.token_ids)


def test_request_ids_are_the_servers_own(server: LiveServer) -> None:
    replies = [ask(server, PROMPT, label="1", max_tokens=1) for _ in range(3)]
    ids = [reply.strings("request_id")[0] for reply in replies]
    assert len(set(ids)) == 3
    assert all(len(request_id) >= 32 for request_id in ids)
    assert [response.get_response().id for reply in replies for response in reply.responses] == ["1"] * 3


def test_length_and_end_of_sequence(server: LiveServer, tokenizer: Tokenizer) -> None:
    cut = ask(server, PROMPT, temperature=0.0, max_tokens=3)
    assert (cut.finish_reason, len(cut.token_ids)) == ("length", 3)
    ended = ask(server, "Hello.", temperature=0.0, max_tokens=200)
    assert (ended.finish_reason, ended.token_ids[-1]) == ("stop", EOS)  # billed and listed, and no text
    assert ended.text == tokenizer.decode(ended.token_ids[:-1])
    at = len(ended.token_ids)
    beyond = ask(server, "Hello.", sampling={"ignore_eos": True, "temperature": 0, "max_tokens": at + 5})
    assert (beyond.finish_reason, len(beyond.token_ids)) == ("length", at + 5)
    later = ask(server, "Hello.", sampling={"min_tokens": at + 5, "temperature": 0, "max_tokens": at + 30})
    assert EOS not in later.token_ids[: at + 5]
    stop_id = ended.token_ids[2]
    by_id = ask(server, "Hello.", sampling={"stop_token_ids": [stop_id], "temperature": 0, "max_tokens": 200})
    assert (by_id.finish_reason, by_id.token_ids) == ("stop", ended.token_ids[:3])
    assert by_id.text == tokenizer.decode(ended.token_ids[:2])


def test_the_prompt_in_front_when_asked_for(server: LiveServer) -> None:
    plain = ask(server, PROMPT, **GREEDY)
    assert not plain.text.startswith(PROMPT)
    for stream in (False, True):
        echoed = ask(server, PROMPT, stream=stream, exclude_input_in_output=False, **GREEDY)
        assert echoed.text == PROMPT + plain.text
        assert echoed.token_ids == plain.token_ids
        assert echoed.receipt["out_tokens"] == len(plain.token_ids)
    assert ask(server, PROMPT, exclude_input_in_output=True, **GREEDY).text == plain.text


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_those_of_transformers(
    server: LiveServer, tokenizer: Tokenizer, oracle: Any, stream: bool
) -> None:
    reply = ask(server, PROMPT, sampling={"logprobs": 3, "seed": 4}, max_tokens=24, temperature=1.5, stream=stream)
    entries = [entry for text in reply.strings("logprobs") for entry in json.loads(text)]
    assert [entry["token_id"] for entry in entries] == reply.token_ids
    expected = oracle(tokenizer.encode(PROMPT).ids, reply.token_ids)
    for entry, row in zip(entries, expected, strict=True):
        assert entry["logprob"] == pytest.approx(row[entry["token_id"]].item(), abs=1e-3)
        assert entry["token"] == tokenizer.decode([entry["token_id"]], skip_special_tokens=False)
        values, ids = row.topk(3)
        assert [top["logprob"] for top in entry["top"]] == pytest.approx(values.tolist(), abs=1e-3)
        if (values[:-1] - values[1:]).min() > 1e-3:
            assert [top["token_id"] for top in entry["top"]] == ids.tolist()
    sums = list(itertools.accumulate(entry["logprob"] for entry in entries))
    cumulative = reply.numbers("cumulative_logprob")
    assert cumulative[-1] == pytest.approx(sums[-1], rel=1e-5)
    assert len(cumulative) == len(reply.responses)
    assert all(after <= before for before, after in itertools.pairwise(cumulative))


@pytest.mark.parametrize("flag", ["return_log_probs", "return_logprobs", "return_cumulative_logprob"])
def test_flags_ask_for_logprobs_of_the_chosen_tokens(server: LiveServer, flag: str) -> None:
    reply = ask(server, PROMPT, **{flag: True}, **GREEDY)
    entries = json.loads(reply.strings("logprobs")[0])
    assert [entry["token_id"] for entry in entries] == reply.token_ids
    assert all(entry["top"] == [] for entry in entries)
    assert reply.numbers("cumulative_logprob") == [pytest.approx(sum(entry["logprob"] for entry in entries), rel=1e-5)]
    without = ask(server, PROMPT, **{flag: False}, **GREEDY)
    assert without.strings("logprobs") == []
    assert without.numbers("cumulative_logprob") == []


# --- stop strings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_never_leak(server: LiveServer, include: bool) -> None:
    """Stop strings that begin and end anywhere within the tokens of a known answer."""
    text = ask(server, PROMPT, temperature=0.0, max_tokens=40).text
    for begin, length in ((1, 1), (5, 9), (11, 2), (17, 13), (len(text) - 4, 4)):
        stop = text[begin : begin + length]
        at = text.index(stop)
        sampling = {"stop": [stop, "\x00never"], "include_stop_str_in_output": include}
        reply = ask(server, PROMPT, sampling, temperature=0.0, max_tokens=40, stream=True)
        shown = list(itertools.accumulate(reply.strings("text_output")))
        expected = text[: at + len(stop)] if include else text[:at]
        assert reply.text == expected
        assert all(expected.startswith(part) for part in shown)
        assert all(text[:at].startswith(part) for part in shown[:-1])
        assert reply.finish_reason == "stop"
        assert reply.receipt["out_tokens"] == len(reply.token_ids) == sum(reply.numbers("num_output_tokens"))
        whole = ask(server, PROMPT, sampling, temperature=0.0, max_tokens=40)
        assert (whole.text, whole.token_ids) == (reply.text, reply.token_ids)


def test_what_was_held_for_a_stop_string_comes_at_the_end(server: LiveServer) -> None:
    text = ask(server, PROMPT, **GREEDY).text
    reply = ask(server, PROMPT, stop_words=[text[-6:] + "\x00"], stream=True, **GREEDY)
    assert reply.text == text


# --- over HTTP ----------------------------------------------------------------------------------------------------


def test_the_same_over_http(server: LiveServer) -> None:
    reply = ask(server, PROMPT, **GREEDY)
    body = post(server, {"text_input": PROMPT, "temperature": 0, "max_tokens": 24}).json()
    assert (body["text_output"], body["token_ids"]) == (reply.text, reply.token_ids)
    assert body["finish_reason"] == reply.finish_reason
    assert json.loads(body["receipt"])["out_tokens"] == len(reply.token_ids)
    about_the_model = {"model_name", "model_version", "sequence_id", "sequence_start", "sequence_end"}  # Triton's own
    assert body.keys() - about_the_model == ALWAYS | {"receipt"}
