"""README.md and docs/ as text: their pages, code and tables, for the tests that hold them to the code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(r"(?:^ {4}\S.*\n)+", re.MULTILINE)
_SPAN = re.compile(r"`([^`\n]+)`")
_CELL = re.compile(r"(?<!\\)\|")


@dataclass(frozen=True)
class Code:
    """A piece of code on a page: a fenced or indented block, or a span within a line (`language` None)."""

    page: Path
    text: str
    language: str | None

    @property
    def where(self) -> str:
        return str(self.page.relative_to(ROOT))


def page(name: str) -> str:
    return (ROOT / name).read_text()


def blocks(path: Path, language: str | None = None) -> list[str]:
    """The fenced blocks of a page, of one language if it is given."""
    return [
        found["text"]
        for found in _FENCE.finditer(path.read_text())
        if language is None or found["language"] == language
    ]


def prose(path: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", path.read_text())


def code(path: Path) -> Iterator[Code]:
    """All code of a page."""
    for found in _FENCE.finditer(path.read_text()):
        yield Code(path, found["text"], found["language"])
    rest = prose(path)
    for found in _INDENTED.finditer(rest):
        yield Code(path, found[0], "")
    for found in _SPAN.finditer(_INDENTED.sub("", rest)):
        yield Code(path, found[1], None)


def table(name: str, first_heading: str) -> list[list[str]]:
    """The rows, cell by cell, of the tables of a page whose head begins with `first_heading`."""
    rows: list[list[str]] = []
    inside = False
    for line in page(name).splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        cells = [cell.strip().replace("\\|", "|") for cell in _CELL.split(line.strip()[1:-1])]
        if not inside:
            inside = cells[0] == first_heading
        elif set("".join(cells)) - set("-: "):
            rows.append(cells)
    return rows


def named(cell: str) -> list[str]:
    """What stands in backticks in a cell."""
    return _SPAN.findall(cell)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic models that a field of this type may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)
