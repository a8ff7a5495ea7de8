"""docs/card.md: its example is a card that uses every field, and its table has the fields that a card may have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from documents import PAGES, ROOT, blocks, models_in, named, table
from pydantic import BaseModel

from openlora.attribution.blobs import model_terms
from openlora.attribution.card import Card, parse_card
from openlora.strict_json import parse_strict

PAGE = ROOT / "docs" / "card.md"


def fields_of(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Every field as JSON names it, those within it after a dot, and whether it has to be given."""
    for name, field in kind.model_fields.items():
        path = prefix + (field.alias or name)
        yield path, field.is_required()
        for part in models_in(field.annotation):
            yield from fields_of(part, f"{path}.")


def paths_in(document: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(document, list):
        for one in document:
            yield from paths_in(one, prefix)
    elif isinstance(document, dict):
        for name, value in document.items():
            yield prefix + name
            yield from paths_in(value, f"{prefix}{name}.")


def example() -> dict[str, Any]:
    (text,) = blocks(PAGE, "json")
    return parse_strict(text)


def test_the_example_is_a_card() -> None:
    card = parse_card(example())
    terms = model_terms("0" * 64, card)
    assert (terms["input"], terms["output"]) == ("200000", "1500000000000000000")
    assert sum(dataset["ppm"] for dataset in terms["datasets"]) == 1_000_000


def test_the_example_has_every_field_but_the_other_policy_s() -> None:
    fields = {path for path, _ in fields_of(Card)}
    assert fields - set(paths_in(example())) == {path for path in fields if path.startswith("access.token")}


def test_the_table_has_every_field_and_says_which_are_required() -> None:
    rows = [named(row[0])[0] for row in table("docs/card.md", "field")]
    assert rows == list(dict.fromkeys(rows)) and set(rows) == {path for path, _ in fields_of(Card)}
    required = [path for path, needed in fields_of(Card) if needed and "." not in path]
    (said,) = [line for line in PAGE.read_text().splitlines() if "Required are" in line]
    assert named(said[said.index("Required are") :]) == required


def test_other_pages_point_to_it() -> None:
    for path in PAGES:
        if path.name in ("README.md", "validation.md", "routing.md"):
            assert "card.md)" in path.read_text(), path.name
