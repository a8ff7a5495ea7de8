"""The `adapters` input: every form that is taken, and every refusal with its exact words."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openlora.adapters.adapter_spec import AdapterSpec, parse_adapters
from openlora.errors import InvalidArgument

NAME_RULE = "[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
TAKEN = {
    "pirate": [("pirate", 1_000_000, None)],
    "  pirate\n": [("pirate", 1_000_000, None)],
    "A.b_c-9": [("A.b_c-9", 1_000_000, None)],
    "x" * 128: [("x" * 128, 1_000_000, None)],
    '["pirate"]': [("pirate", 1_000_000, None)],
    '["a", {"name": "b"}]': [("a", 1_000_000, None), ("b", 1_000_000, None)],
    '[{"name": "a", "weight": -0.3, "version": 2}]': [("a", -300_000, 2)],
    '[{"name": "a", "weight": 10, "version": "0123abcd"}]': [("a", 10_000_000, "0123abcd")],
    '[{"name": "a", "version": null}]': [("a", 1_000_000, None)],
    ' {"adapters": ["a"]}': [("a", 1_000_000, None)],
    '{"adapters": ["a", "b"], "method": "cat"}': [("a", 1_000_000, None), ("b", 1_000_000, None)],
    '{"task": "sql"}': [("", 1_000_000, None, "sql")],
    '["a", {"task": "sql", "weight": 0.5}]': [("a", 1_000_000, None), ("", 500_000, None, "sql")],
    # Weights are rounded to 1e-6 before anything else.
    '[{"name": "a", "weight": 0.1234564}]': [("a", 123_456, None)],
    '[{"name": "a", "weight": -10.0000004}]': [("a", -10_000_000, None)],
    '[{"name": "a", "weight": 1e-7}, "b"]': [("a", 0, None), ("b", 1_000_000, None)],
}
REFUSED = {
    "": "empty; leave it out to ask the base model",
    " \n": "empty; leave it out to ask the base model",
    "../x": f"'../x' is no adapter name ({NAME_RULE})",
    "/etc": f"'/etc' is no adapter name ({NAME_RULE})",
    "a/b": f"'a/b' is no adapter name ({NAME_RULE})",
    ".hidden": f"'.hidden' is no adapter name ({NAME_RULE})",
    "a b": f"'a b' is no adapter name ({NAME_RULE})",
    "a\0": f"'a\\x00' is no adapter name ({NAME_RULE})",
    "ä": f"'ä' is no adapter name ({NAME_RULE})",
    "x" * 129: f"'{'x' * 129}' is no adapter name ({NAME_RULE})",
    "base": "'base' is the base model: leave adapters out to ask it",
    '["base"]': "'base' is the base model: leave adapters out to ask it",
    '["../x"]': f"'../x' is no adapter name ({NAME_RULE})",
    "[5]": "an adapter is a name or an object, got 5",
    '[["a"]]': "an adapter is a name or an object, got ['a']",
    "[null]": "an adapter is a name or an object, got None",
    '[{"name": 5}]': f"5 is no adapter name ({NAME_RULE})",
    '[{"weight": 1}]': "an adapter without a name",
    '[{"name": "a", "wieght": 1}]': "unknown key 'wieght', known are ['name', 'version', 'weight']",
    "[]": "a list of 1 to 8 adapters is wanted",
    "{}": "a list of 1 to 8 adapters is wanted",
    '{"adapters": []}': "a list of 1 to 8 adapters is wanted",
    '{"adapters": "a"}': "a list of 1 to 8 adapters is wanted",
    '{"adapters": ["a"], "scale": 2}': "unknown key 'scale', known are ['adapters', 'density', 'method']",
    '{"adapters": ["a"], "density": 0.5}': "density has no meaning for method 'cat'",
    '{"adapters": ["a"], "method": "ties", "density": 0.5}': (
        "method 'ties' makes new weights: only 'cat' is computed per request, make an adapter of the others with "
        "`openlora adapters merge`"
    ),
    json.dumps([f"a{number}" for number in range(9)]): "at most 8 adapters, got 9",
    '["a", "b", {"name": "a", "weight": 2}]': "'a' comes twice",
    '[{"name": "a", "weight": 0}]': "all weights are zero; leave adapters out to ask the base model",
    '[{"name": "a", "weight": 4e-7}, {"name": "b", "weight": 0}]': (
        "all weights are zero; leave adapters out to ask the base model"
    ),
    '[{"name": "a", "weight": 10.000001}]': "weight of 'a': at most 10 in size, got 10.000001",
    '[{"name": "a", "weight": -11}]': "weight of 'a': at most 10 in size, got -11",
    '[{"name": "a", "weight": 1%s}]' % ("0" * 400): f"weight of 'a': at most 10 in size, got 1{'0' * 79}",
    '[{"name": "a", "weight": "0.5"}]': "weight of 'a': a number is wanted, got '0.5'",
    '[{"name": "a", "weight": true}]': "weight of 'a': a number is wanted, got True",
    '[{"name": "a", "weight": null}]': "weight of 'a': a number is wanted, got None",
    '[{"name": "a", "weight": NaN}]': "not JSON: NaN is not a JSON number",
    '[{"name": "a", "weight": -Infinity}]': "not JSON: -Infinity is not a JSON number",
    '[{"name": "a", "weight": 1e999}]': "not JSON: 1e999 is out of range",
    '[{"name": "a", "version": 1.5}]': "version of 'a': a number or a digest is wanted, got 1.5",
    '[{"name": "a", "version": true}]': "version of 'a': a number or a digest is wanted, got True",
    '[{"name": "a", "name": "b"}]': "not JSON: the key 'name' comes twice",
    '["a"': "not JSON: Expecting ',' delimiter: line 1 column 5 (char 4)",
    '["a"] b': "not JSON: Extra data: line 1 column 7 (char 6)",
    '["' + "x" * 65536 + '"]': "at most 65536 bytes of JSON, got 65540",
}


@pytest.mark.parametrize("text", TAKEN, ids=lambda text: text[:40])
def test_takes(text: str) -> None:
    assert parse_adapters(text) == tuple(AdapterSpec(*expected) for expected in TAKEN[text])


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:40])
def test_refuses(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_adapters(text)
    assert str(caught.value) == f"[INVALID_ARGUMENT] adapters: {REFUSED[text]}"


def test_messages_do_not_grow_with_what_was_sent() -> None:
    long = "y" * 60_000
    for tree in ([long], [[long]], [{long: 1}], {"adapters": ["a"], "method": long}, [{"name": "a", "weight": long}]):
        with pytest.raises(InvalidArgument) as caught:
            parse_adapters(json.dumps(tree))
        assert len(str(caught.value)) < 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda children: st.lists(children, max_size=9) | st.dictionaries(st.text(max_size=9), children, max_size=4),
)


@given(
    JSON | st.fixed_dictionaries({"adapters": JSON}) | st.lists(st.fixed_dictionaries({"name": JSON, "weight": JSON}))
)
def test_any_json_gives_specs_or_a_refusal(tree: object) -> None:
    try:
        specs = parse_adapters(json.dumps(tree))
    except InvalidArgument:
        return
    assert 1 <= len(specs) <= 8
    assert all(abs(spec.weight) <= 10_000_000 for spec in specs)
    assert any(spec.weight for spec in specs)
    assert len({spec.name for spec in specs}) == len(specs)
