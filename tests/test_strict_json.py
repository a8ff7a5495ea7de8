"""JSON from strangers: how deep it is, told before any parser sees it, and what no two readers may see differently."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openlora.strict_json import MAX_DEPTH, parse_strict, refuse_depth

strings = st.text(alphabet='a"\\[]{}é', max_size=6)
trees = st.recursive(
    st.none() | st.integers() | strings,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(strings, inner, max_size=3),
    max_leaves=30,
)


def depth_of(tree: object) -> int:
    if isinstance(tree, dict):
        return 1 + max(map(depth_of, tree.values()), default=0)
    return 1 + max(map(depth_of, tree), default=0) if isinstance(tree, list) else 0


@given(tree=trees, deepest=st.integers(0, 6), ascii_only=st.booleans())
def test_depth_is_that_of_the_document(tree: object, deepest: int, ascii_only: bool) -> None:
    text = json.dumps(tree, ensure_ascii=ascii_only)
    if depth_of(tree) > deepest:
        with pytest.raises(ValueError, match=f"nested deeper than {deepest} levels"):
            parse_strict(text, deepest)
    else:
        assert parse_strict(text, deepest) == tree


@pytest.mark.parametrize(
    "text",
    ["[" * 8_000_000, '{"a":' * 1_000_000, '[["' + '\\"[{' * 2_000_000, '["' * 2_000_000, "[}" * 4_000_000 + "[["],
    ids=["lists", "objects", "a string without an end", "strings", "no pairs"],
)
def test_what_no_parser_should_see_takes_no_time(text: str) -> None:
    """Far below pytest's timeout: what took the square of the length took days."""
    with pytest.raises(ValueError):
        parse_strict(text)


def test_many_are_not_deep() -> None:
    refuse_depth('{"a":[' + "[]," * 2_000_000 + "0]}")
    refuse_depth("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    with pytest.raises(ValueError):
        refuse_depth("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "b": 2, "a": 1}', "the key 'a' comes twice"),
        ("[NaN]", "NaN is not a JSON number"),
        ("[-Infinity]", "-Infinity is not a JSON number"),
        ("[1e999]", "1e999 is out of range"),
        ("[1] 2", "Extra data"),
    ],
)
def test_leniencies_of_parsers_are_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_strict(text)


def test_bytes_are_utf_8() -> None:
    assert parse_strict('["é"]'.encode()) == ["é"]
    with pytest.raises(ValueError):
        parse_strict('["é"]'.encode("utf-16"))
