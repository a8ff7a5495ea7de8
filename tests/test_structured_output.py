"""Structured output: every answer keeps to its guide, and nobody else notices."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import openai
import pytest
from conftest import ALICE_KEY
from live_server import LiveServer
from raw_calls import ask, refusal
from tiny_models import Engine, make_model, make_prompt
from tokenizers import Tokenizer

from openlora.engine.api import GUIDE_KINDS, MAX_GUIDE_BYTES, Guide
from openlora.engine.guide_worker import Readable, Refused, read_guide
from openlora_client import OpenLoRAClient

EOS = 1
VOCAB = 1408  # of the demo's tokenizer
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "moods": {"type": "array", "items": {"enum": ["glad", "sad"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "moods"],
    "additionalProperties": False,
}
PHONE = r"\+[0-9]{2}-[0-9]{3,5}"
GBNF = 'root ::= sum\nsum ::= term (("+" | "-") term){1,4}\nterm ::= [0-9] | "(" term ")"\n'
LARK = 'start: term (("+" | "-") term){1,4}\nterm: /[0-9]/ | "(" term ")"\n'
CHOICES = ["yes", "no", "perhaps 🐶"]
TERM = re.compile(r"\(*[0-9]\)*")


@pytest.fixture(scope="module")
def model_dir(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model, which has no reason to keep to anything, with the demo's tokenizer."""
    directory = tmp_path_factory.mktemp("guided") / "model"
    make_model(directory, vocab_size=VOCAB, bos_token_id=0, eos_token_id=EOS, pad_token_id=2)
    shutil.copy(demo / "model" / "tokenizer.json", directory)
    return str(directory)


@pytest.fixture(scope="module")
def tokenizer(demo: Path) -> Tokenizer:
    return Tokenizer.from_file(str(demo / "model" / "tokenizer.json"))


@pytest.fixture(scope="module")
def engine(model_dir: str):
    with Engine(model_dir, max_model_len=200) as engine:
        yield engine


def guide(kind: str, text: Any = "") -> Guide:
    return Guide(kind, text if isinstance(text, str) else json.dumps(text), "its_name")


def is_person(text: str) -> bool:
    person = json.loads(text)
    return (
        set(person) == {"name", "age", "moods"}
        and isinstance(person["name"], str)
        and len(person["name"]) <= 12
        and type(person["age"]) is int
        and 0 <= person["age"] <= 150
        and 1 <= len(person["moods"]) <= 3
        and set(person["moods"]) <= {"glad", "sad"}
    )


def is_sum(text: str) -> bool:
    terms = re.split(r"[+-]", text)
    return 2 <= len(terms) <= 5 and all(TERM.fullmatch(t) and t.count("(") == t.count(")") for t in terms)


CASES: dict[str, tuple[Guide, Any]] = {
    "json_schema": (guide("json_schema", SCHEMA), is_person),
    "regex": (guide("regex", PHONE), re.compile(PHONE).fullmatch),
    "anchored regex": (guide("regex", f"^{PHONE}$"), re.compile(PHONE).fullmatch),
    "gbnf": (guide("grammar", GBNF), is_sum),
    "lark": (guide("grammar", LARK), is_sum),
    "choice": (guide("choice", CHOICES), CHOICES.__contains__),
}


@pytest.mark.parametrize("case", CASES)
def test_answers_keep_to_their_guides(engine: Engine, tokenizer: Tokenizer, case: str) -> None:
    """At any temperature and with any filter; what ends by itself is whole."""
    wanted, judge = CASES[case]
    prompt = make_prompt(1, 8)
    settings = [{"temperature": 0.0}] + [
        {"temperature": temperature, "seed": seed, **more}
        for seed in range(6)
        for temperature, more in ((1.0, {}), (20.0, {}), (5.0, {"top_p": 0.9}), (3.0, {"top_k": 20, "min_p": 0.01}))
    ]
    names = [f"{case}-{index}" for index in range(len(settings))]
    for name, setting in zip(names, settings, strict=True):
        engine.submit(name, prompt, guide=wanted, eos_token_ids=(EOS,), max_tokens=150, **setting)
    answers = [engine.wait(name) for name in names]
    texts = [tokenizer.decode(answer.ids) for answer in answers]
    whole = [text for text, answer in zip(texts, answers, strict=True) if answer.finish_reason == "stop"]
    assert len(whole) > len(answers) / 2
    assert {answer.finish_reason for answer in answers} <= {"stop", "length"}
    assert all(judge(text) for text in whole), texts
    assert len(set(whole)) > 1
    engine.assert_nothing_held()


def test_any_json_object(engine: Engine, tokenizer: Tokenizer) -> None:
    for seed in range(4):
        answer = engine.ask(
            (5, 6), guide=guide("json"), eos_token_ids=(EOS,), temperature=1.0, seed=seed, max_tokens=60
        )
        text = tokenizer.decode(answer.ids)
        assert text.lstrip().startswith("{")
        if answer.finish_reason == "stop":
            assert isinstance(json.loads(text), dict)


def test_the_end_comes_where_the_guide_is_complete(engine: Engine, tokenizer: Tokenizer) -> None:
    """At once where nothing can follow, with no EOS of its own; by an EOS or a stop token where more could."""
    hot = {"temperature": 30.0, "max_tokens": 100}
    closed = engine.ask((5,), guide=guide("regex", "a{3}"), eos_token_ids=(EOS,), **hot)
    assert (tokenizer.decode(closed.ids), closed.finish_reason, EOS in closed.ids) == ("aaa", "stop", False)
    for ends in ({"eos_token_ids": (EOS,)}, {"stop_token_ids": (EOS,)}):
        lengths = set()
        for seed in range(8):
            answer = engine.ask((5,), guide=guide("regex", "[abc]{3,}"), seed=seed, **ends, **hot)
            text = tokenizer.decode(answer.ids)
            assert re.fullmatch("[abc]{3,}", text)
            assert (answer.finish_reason == "stop") == (answer.ids[-1] == EOS)
            lengths.add(len(text))
        assert len(lengths) > 1
    endless = engine.ask((5,), guide=guide("regex", "[abc]{3,}"), **hot)  # no token of its own to end with
    assert (endless.finish_reason, EOS in endless.ids) == ("length", False)
    empty = engine.ask((5,), guide=guide("regex", ""), **hot)
    assert (empty.ids, empty.finish_reason) == ([EOS], "stop")


def test_min_tokens_and_bad_words(engine: Engine, tokenizer: Tokenizer) -> None:
    hot = {"temperature": 30.0, "max_tokens": 60, "eos_token_ids": (EOS,)}
    for seed in range(4):
        later = engine.ask((5,), guide=guide("regex", "[ab]*"), min_tokens=20, seed=seed, **hot)
        assert len(later.ids) >= 20 and set(tokenizer.decode(later.ids)) == {"a", "b"}
        banned = tuple((token,) for piece, token in tokenizer.get_vocab().items() if "a" in piece)
        without = engine.ask((5,), guide=guide("regex", "[ab]{1,9}"), bad_words=banned, seed=seed, **hot)
        assert without.finish_reason == "stop" and set(tokenizer.decode(without.ids)) == {"b"}
    never = engine.ask((5,), guide=guide("regex", "a{3}"), bad_words=banned, **hot)
    assert (never.finish_reason, never.ids) == ("error", [])
    assert never.error == "[INVALID_ARGUMENT] bad_words: every token that the guide allows is banned"
    short = engine.ask((5,), guide=guide("regex", "a{3}"), min_tokens=10, **hot)
    assert short.finish_reason == "error" and tokenizer.decode(short.ids) == "aaa"
    assert re.fullmatch(
        r"\[INVALID_ARGUMENT\] min_tokens: 10 can't be reached: after \d nothing but an end is left", short.error
    )
    engine.assert_nothing_held()


def test_a_draw_is_the_same_with_a_guide_that_allows_it(engine: Engine, tokenizer: Tokenizer) -> None:
    """A guide removes tokens and shifts nothing; penalties count as without one."""
    settings = {"temperature": 0.8, "max_tokens": 12, "presence_penalty": 1.5, "repetition_penalty": 1.2}
    compared = 0
    for seed in range(12):
        free = engine.ask(make_prompt(2, 6), seed=seed, logprobs=2, **settings)
        text = tokenizer.decode(free.ids)
        if "\ufffd" in text:
            continue
        held = engine.ask(
            make_prompt(2, 6), seed=seed, logprobs=2, guide=guide("regex", r"(?s)(.|\n){0,500}"), **settings
        )
        assert held.ids == free.ids
        assert held.logprobs == free.logprobs
        compared += 1
    assert compared > 1


def mixed_requests() -> dict[str, dict[str, Any]]:
    guides = [None, guide("json_schema", SCHEMA), guide("regex", "([a-z]+ )+"), guide("grammar", LARK)]
    common = {"temperature": 1.5, "max_tokens": 60, "eos_token_ids": (EOS,)}
    return {f"{index}": {**common, "seed": index, "guide": guides[index % 4]} for index in range(12)}


def test_neighbours_order_and_preemption_change_nothing(model_dir: str) -> None:
    """Guided and free requests together, in any order of arrival, in batches that change and run out of blocks."""
    requests = mixed_requests()
    prompts = {name: make_prompt(int(name), 5 + 2 * int(name)) for name in requests}
    with Engine(model_dir, max_model_len=128, max_batch=1) as engine:
        alone = {name: engine.ask(prompts[name], **settings) for name, settings in requests.items()}
    for order in (list(requests), list(reversed(requests))):
        with Engine(model_dir, max_model_len=128, max_batch=5, max_step_tokens=24, kv_cache_tokens=144) as engine:
            for name in order:
                engine.submit(name, prompts[name], **requests[name])
            for name in requests:
                together = engine.wait(name)
                assert (together.ids, together.finish_reason) == (alone[name].ids, alone[name].finish_reason)
            engine.assert_nothing_held()
            assert engine.engine.stats().preemptions > 0


BAD: dict[str, tuple[Guide, str]] = {
    "kind": (Guide("yaml", "a", "its_name"), "'yaml' is unknown, one of json, json_schema,"),
    "too long": (guide("regex", "a" * (MAX_GUIDE_BYTES + 1)), f"at most {MAX_GUIDE_BYTES} bytes, got"),
    "schema": (guide("json_schema", '{"type": "nope"}'), "Invalid type: nope"),
    "schema keyword": (guide("json_schema", '{"not": {}}'), 'Unimplemented keys: ["not"]'),
    "schema elsewhere": (guide("json_schema", '{"$ref": "file:///etc/hostname"}'), "file:///etc/hostname"),
    "no JSON": (guide("json_schema", "{"), "EOF while parsing"),
    "deep JSON": (guide("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000), "recursion limit exceeded"),
    "regex": (guide("regex", "a("), "unclosed group"),
    "look-around": (guide("regex", "(?=a)b"), "look-around"),
    "grammar": (guide("grammar", "root ::= nothing"), "Rule 'nothing' not found"),
    "lark": (guide("grammar", "start: nothing"), "nothing"),
    "deep grammar": (guide("grammar", "root ::= " + "(" * 9000 + '"a"' + ")" * 9000), "recursion"),
    "choice": (guide("choice", "[]"), "at least one string"),
    "choice of numbers": (guide("choice", "[1]"), "at least one string"),
    "endless tokens": (
        guide("grammar", "start: A\nA: /.*a.{25}/ & /.*b.{20}/ & ~/.*c.{18}/"),
        "fuel exhausted",
    ),
}


def test_bad_guides_are_refused_before_any_token(engine: Engine) -> None:
    for name, (bad, _) in BAD.items():
        engine.submit(f"bad {name}", (5,), guide=bad)
    for name, (_, reason) in BAD.items():
        answer = engine.wait(f"bad {name}")
        assert (answer.ids, answer.finish_reason) == ([], "error"), name
        assert answer.error.startswith("[INVALID_ARGUMENT] its_name: "), answer.error
        assert reason in answer.error
        assert len(answer.error) < 400
    engine.assert_nothing_held()


def test_the_same_bad_guide_is_told_under_each_name(engine: Engine) -> None:
    for name in ("one", "other"):
        answer = engine.ask((5,), guide=Guide("regex", "a(b", name))
        assert answer.error.startswith(f"[INVALID_ARGUMENT] {name}: ")


def slow_grammar() -> str:
    """Quadratic to convert: every pass over the rules settles one of a chain, and looks at a long one again."""
    chain = "\n".join(f"a{i} ::= a{i + 1}" for i in range(2000))
    return f"root ::= b\nb ::= {'[c] ' * 8000} a0\n{chain}\na2000 ::= [a]"


def test_a_hostile_grammar_costs_others_nothing_and_itself_two_seconds(engine: Engine) -> None:
    """Its request waits; one that came after it, and one with a guide that is known, are answered meanwhile."""
    engine.ask((5,), guide=guide("regex", "a{2}"), eos_token_ids=(EOS,))
    engine.submit("hostile", (5,), guide=guide("grammar", slow_grammar()))
    engine.submit("given up", (5,), guide=guide("grammar", slow_grammar() + "\n"))
    assert engine.ask((5,), guide=guide("regex", "a{2}"), eos_token_ids=(EOS,)).finish_reason == "stop"
    assert engine.ask(make_prompt(1, 5)).finish_reason == "length"
    engine.engine.cancel("given up")
    assert engine.wait("given up").finish_reason == "cancelled"
    assert not engine.answers.get("hostile")
    answer = engine.wait("hostile")
    assert answer.error == ("[INVALID_ARGUMENT] its_name: too large: reading it takes more than 2 s or too much memory")
    engine.assert_nothing_held()


def test_a_guide_that_grows_too_complex_ends_its_own_request(engine: Engine) -> None:
    """Here only while it is followed: the lexer would need more states than one guide may have."""
    heavy = guide("regex", "(.{0,5000}a.{0,5000}){100}")
    engine.submit("heavy", (5,), guide=heavy, temperature=5.0, max_tokens=150)
    free = engine.ask(make_prompt(1, 5))
    assert free.finish_reason == "length"
    answer = engine.wait("heavy")
    assert answer.finish_reason == "error"
    assert answer.error.startswith("[INVALID_ARGUMENT] its_name: too complex: ")
    engine.assert_nothing_held()


def test_a_model_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    with Engine(make_model(tmp_path / "model")) as engine:
        answer = engine.ask((5,), guide=guide("regex", "a"))
        assert answer.error == ("[UNSUPPORTED_MODEL] the model has no tokenizer.json, which structured output needs")
        assert engine.ask((5,)).finish_reason == "length"


def test_every_kind_can_be_read() -> None:
    assert {wanted.kind for wanted, _ in CASES.values()} | {"json"} == set(GUIDE_KINDS)
    for wanted, _ in CASES.values():
        assert isinstance(read_guide(wanted), Readable)
    assert isinstance(read_guide(guide("regex", "(")), Refused)


# --- through the server ------------------------------------------------------------------------------------------

PROMPT = "Tell me about the cat."
HOT = {"temperature": 4.0, "seed": 3, "max_tokens": 120}
SAME: dict[str, list[dict[str, Any]]] = {  # one guide, said in every way
    "json_schema": [
        {"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": json.dumps(SCHEMA)},
        {"sampling": {"structured_outputs": {"json": SCHEMA}}},
        {"sampling": {"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None}}},
        {"sampling": {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}}},
    ],
    "regex": [
        {"guided_decoding_guide_type": "regex", "guided_decoding_guide": PHONE},
        {"sampling": {"structured_outputs": {"regex": PHONE}}},
        {  # tensors win
            "guided_decoding_guide_type": "regex",
            "guided_decoding_guide": PHONE,
            "sampling": {"structured_outputs": {"regex": "a+"}},
        },
    ],
    "gbnf": [
        {"guided_decoding_guide_type": "ebnf_grammar", "guided_decoding_guide": GBNF},
        {"sampling": {"structured_outputs": {"grammar": GBNF}}},
    ],
    "choice": [{"sampling": {"structured_outputs": {"choice": CHOICES}}}],
}


@pytest.mark.parametrize("case", SAME)
@pytest.mark.parametrize("adapter", ["", "pirate"])
def test_a_guide_through_the_server(server: LiveServer, case: str, adapter: str) -> None:
    judge = CASES[case][1]
    more = {"adapters": adapter} if adapter else {}
    replies = [ask(server, PROMPT, **HOT, **inputs, **more) for inputs in SAME[case]]
    assert len({tuple(reply.token_ids) for reply in replies}) == 1
    assert replies[0].finish_reason == "stop", replies[0].text
    assert judge(replies[0].text)
    assert replies[0].receipt["out_tokens"] == len(replies[0].token_ids)


@pytest.mark.parametrize(
    "inputs",
    [
        {"guided_decoding_guide_type": "json"},
        {"sampling": {"structured_outputs": {"json_object": True, "json": None}}},
        {"sampling": {"response_format": {"type": "json_object"}}},
    ],
)
def test_any_json_object_through_the_server(server: LiveServer, inputs: dict[str, Any]) -> None:
    reply = ask(server, PROMPT, temperature=0.0, max_tokens=40, stream=True, **inputs)
    assert reply.text.lstrip().startswith("{")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "type": ({"guided_decoding_guide_type": "xml"}, "guided_decoding_guide_type: 'xml' is unknown"),
    "no type": ({"guided_decoding_guide": "a"}, "guided_decoding_guide_type: '' is unknown"),
    "no guide": ({"guided_decoding_guide_type": "regex"}, "guided_decoding_guide: missing, the type is regex"),
    "too much": (
        {"guided_decoding_guide_type": "json", "guided_decoding_guide": "{}"},
        "guided_decoding_guide: nothing is wanted with the type json",
    ),
    "too long": (
        {"guided_decoding_guide_type": "regex", "guided_decoding_guide": "a" * (MAX_GUIDE_BYTES + 1)},
        f"guided_decoding_guide: at most {MAX_GUIDE_BYTES} bytes, got {MAX_GUIDE_BYTES + 1}",
    ),
    "no JSON": (
        {"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": "{"},
        "guided_decoding_guide: not JSON: ",
    ),
    "no schema": (
        {"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": "[]"},
        "guided_decoding_guide: a JSON Schema is wanted, which is an object",
    ),
    "two": ({"sampling": {"structured_outputs": {"regex": "a", "json_object": True}}}, "structured_outputs: one of "),
    "none": ({"sampling": {"structured_outputs": {"json_object": False}}}, "structured_outputs: one of "),
    "key": ({"sampling": {"structured_outputs": {"regexp": "a"}}}, "structured_outputs: 'regexp': not supported"),
    "value": ({"sampling": {"structured_outputs": {"choice": ["a", 1]}}}, "structured_outputs: choice: a list of"),
    "surrogate": ({"sampling": '{"structured_outputs": {"regex": "\\ud800"}}'}, "structured_outputs: not UTF-8: "),
    "format": ({"sampling": {"response_format": {"type": "yaml"}}}, "response_format: type: one of text, json_object,"),
    "format key": (
        {"sampling": {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "x": 1}}}},
        "response_format: 'x': not supported",
    ),
    "twice": (
        {"sampling": {"response_format": {"type": "text"}, "structured_outputs": {"regex": "a"}}},
        "response_format: given twice with this request, also as structured_outputs",
    ),
    "regex": (
        {"guided_decoding_guide_type": "regex", "guided_decoding_guide": "a("},
        'guided_decoding_guide: at 1(8): invalid regex "a("',
    ),
    "keyword": (
        {"sampling": {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}},
        'response_format: Unimplemented keys: ["not"]',
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_guides_are_refused_by_name(server: LiveServer, case: str) -> None:
    inputs, message = REFUSED[case]
    assert refusal(server, PROMPT, **inputs).startswith(f"[INVALID_ARGUMENT] {message}")


def test_the_sdk_passes_guides_on(server: LiveServer) -> None:
    with OpenLoRAClient(server.grpc_url) as client:
        answer = client.generate(PROMPT, structured_outputs={"choice": CHOICES}, temperature=3.0, max_tokens=40)
        assert answer.text in CHOICES
        streamed = "".join(chunk.text for chunk in client.stream(PROMPT, response_format=person_format(), **HOT))
        assert is_person(streamed)


def person_format() -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}


def test_openais_client_gets_what_its_format_says(server: LiveServer) -> None:
    with openai.OpenAI(base_url=f"{server.gateway_url}/v1", api_key=ALICE_KEY, max_retries=0) as gateway:
        talk = [{"role": "user", "content": PROMPT}]
        chat = gateway.chat.completions.create(model="pirate", messages=talk, response_format=person_format(), **HOT)
        assert chat.choices[0].finish_reason == "stop"
        assert is_person(chat.choices[0].message.content)
        chunks = gateway.chat.completions.create(
            model="base", messages=talk, response_format=person_format(), stream=True, **HOT
        )
        assert is_person("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices))
        plain = gateway.chat.completions.create(
            model="base", messages=talk, response_format={"type": "text"}, temperature=0, max_tokens=8
        )
        assert plain.choices[0].finish_reason == "length"
        completion = gateway.completions.create(
            model="base", prompt=PROMPT, extra_body={"structured_outputs": {"regex": PHONE}}, **HOT
        )
        assert re.fullmatch(PHONE, completion.choices[0].text)
        with pytest.raises(openai.BadRequestError) as caught:
            gateway.chat.completions.create(
                model="base",
                messages=talk,
                response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nope"}}},
            )
        assert caught.value.param == "response_format"
        assert "Invalid type: nope" in str(caught.value)
