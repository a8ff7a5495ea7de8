"""Everything that is generated from each recipe, for each version, as it was when somebody looked at it.

`UPDATE_GOLDEN=1 pytest tests/test_recipes_golden.py` writes the files anew: look at the difference then.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from recipe_cases import RECIPES, everything_generated

from openlora.recipes.catalogue import VERSIONS

GOLDEN = Path(__file__).parent / "golden" / "recipes"
CASES = [(name, version) for name in RECIPES for version in VERSIONS]


@pytest.mark.parametrize(("name", "version"), CASES)
def test_generated_text_is_the_golden_one(name: str, version: str) -> None:
    file = GOLDEN / name / f"{version}.yaml"
    text = everything_generated(RECIPES[name].retargeted(None, version))
    if os.environ.get("UPDATE_GOLDEN") == "1":
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert file.read_text() == text


def test_no_golden_file_is_left_over() -> None:
    found = {(file.parent.name, file.stem) for file in GOLDEN.glob("*/*.yaml")}
    assert found == set(CASES)
