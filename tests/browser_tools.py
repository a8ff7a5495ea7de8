"""What the tests of the page need from outside: node, its packages, a browser. `make browser-tools` brings them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

BROWSER_TESTS = Path(__file__).resolve().parent / "browser"
NODE_MODULES = BROWSER_TESTS / "node_modules"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


def require_node_modules() -> None:
    """Fails where `make browser-tools` was not run: without them nothing of the page is tested."""
    assert (NODE_MODULES / "playwright-core").is_dir(), f"{NODE_MODULES} is not there: run `make browser-tools`"


def require_chromium() -> str:
    """The browser's path. Skips, loudly, where there is none and none could be installed."""
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        pytest.skip("NO BROWSER, so the page is not tested: install Debian's chromium (`make browser-tools` as root)")
    return found
