"""What an installed copy has: every package of the library."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_package_is_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = set()
    for package, place in settings["package-dir"].items():
        for init in (ROOT / place).rglob("__init__.py"):
            found.add(".".join((package, *init.parent.relative_to(ROOT / place).parts)))
    assert set(settings["packages"]) == found
