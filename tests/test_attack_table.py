"""docs/attacks.md: every attack has a test that exists and runs with the others, or a reason why there is none."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ATTACKS = 26  # those that we know of
MARKS = "pytestmark"  # of all tests of a file
_ROW = re.compile(r"\| (?P<number>\d+)(?P<part>[a-z]?) \| (?P<attack>[^|]+) \| (?P<answer>[^|]+) \|")
_TEST = re.compile(r"`(?P<file>[\w./]+)::(?P<name>\w+)`")

ROWS = [
    found for line in (ROOT / "docs" / "attacks.md").read_text().splitlines() if (found := _ROW.fullmatch(line.strip()))
]
NAMED = sorted({found.groups() for row in ROWS for found in _TEST.finditer(row["answer"])})


@cache
def named_in(file: str) -> frozenset[str]:
    """The names of a file's tests; those of the long runs alone don't count."""
    text = (ROOT / file).read_text()
    if file.endswith(".sol"):
        return frozenset(re.findall(r"\bfunction ((?:test|invariant)\w*)\s*\(", text))
    tree = ast.parse(text)
    of_all = [node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == MARKS]
    if any("soak" in ast.unparse(mark.value) for mark in of_all):
        return frozenset()
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    short = [one for one in functions if not any("soak" in ast.unparse(mark) for mark in one.decorator_list)]
    return frozenset(one.name for one in short if one.name.startswith("test_"))


def test_all_attacks_are_in_the_table() -> None:
    assert {int(row["number"]) for row in ROWS} == set(range(1, ATTACKS + 1))
    lines = [line for line in (ROOT / "docs" / "attacks.md").read_text().splitlines() if line.startswith("| ")]
    assert len(ROWS) == len(lines) - 2  # but for the head


@pytest.mark.parametrize(
    "words",
    ["fabricated receipts", "history rewritten between two anchors", "the publisher alone", "a queue of proposals"],
)
def test_what_decides_over_money_is_attacked(words: str) -> None:
    (row,) = [row for row in ROWS if row["attack"].startswith(words)]
    assert _TEST.search(row["answer"])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["number"] + row["part"])
def test_an_attack_has_a_test_or_a_reason(row: re.Match[str]) -> None:
    answer = row["answer"]
    if answer.startswith("not applicable: "):
        assert len(answer.split(".")[0].split()) > 5, "a reason, in words"
    else:
        left = _TEST.sub("", answer).replace(",", "").strip()
        assert _TEST.search(answer) and not left, f"not a list of tests: {left!r}"


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_named_test_is_there(file: str, name: str) -> None:
    assert (ROOT / file).is_file(), f"no file {file}"
    assert name in named_in(file), f"{file} has no test {name}"
