"""What README.md and docs/ name is there: pages, headings, make targets, commands and their options, scripts, files."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from documents import PAGES, ROOT, Code, blocks, code, named, page, prose, table

from openlora.cli import app
from openlora.strict_json import parse_strict

LIBRARY = ROOT / "backends" / "openlora_python" / "openlora"
SOURCES = ["backends", "benchmarks", "build_scripts", "clients", "contracts", "deploy", "docs"]
SOURCES += ["model_repository", "tests"]
_LINK = re.compile(r"\]\((?P<path>[^)\s#:]*)(?:#(?P<heading>[^)\s]+))?\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_SHELL = ("", "bash", "sh")
_COMMENT = re.compile(r"(?:^|\s)#\s.*$")
_NEXT_COMMAND = re.compile(r"\s(?:&&|\|\|?|;)\s|;\s|\s·\s")
_OPTION = re.compile(r"(?<![\w-])--?[a-zA-Z][\w-]*")
_QUOTED = re.compile(r"\"[^\"]*\"|'[^']*'")
_SCRIPT = re.compile(r"(?:benchmarks|build_scripts)/[\w/]+\.(?:py|sh)")
_FILE = re.compile(r"[\w./-]*\w\.(?:py|cpp|h|mjs|sh|pbtxt|yaml)")
NOT_OURS = {"hf_ptq.py", "examples/quantization/quantize.py"}  # NVIDIA's
OF_A_READER = {"serve.yaml", "vllm.yaml", "trtllm.yaml", "values.yaml", "settings.yaml"}


def ids(of: object) -> str:
    return str(of.relative_to(ROOT)) if isinstance(of, Path) else ""


@dataclass(frozen=True)
class Command:
    """What a reader may run, without comments: from a block, to be copied, or named within the text."""

    words: str
    to_copy: bool


@cache
def commands_on(path: Path) -> tuple[Command, ...]:
    return tuple(
        Command(part.strip(), piece.language is not None)
        for piece in code(path)
        for line in _lines(piece)
        for part in _NEXT_COMMAND.split(line)
    )


def _lines(piece: Code) -> Iterator[str]:
    if piece.language is None:
        yield piece.text
    elif piece.language in _SHELL:
        for line in piece.text.replace("\\\n", " ").splitlines():
            yield _COMMENT.sub("", line)


def run_with(program: str, path: Path, *, to_copy: bool = False) -> Iterator[str]:
    """What stands behind a program's name, for every command on a page that runs it; those in blocks, if wanted."""
    for command in commands_on(path):
        words = command.words.removeprefix(".venv/bin/").removeprefix("venv/bin/")
        if words.startswith(program + " ") and (command.to_copy or not to_copy):
            yield words.removeprefix(program + " ")


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_links_lead_somewhere(path: Path) -> None:
    for link in _LINK.finditer(prose(path)):
        target = (path.parent / link["path"]).resolve() if link["path"] else path
        assert target.exists(), link[0]
        if link["heading"]:
            assert link["heading"] in slugs(target), link[0]


@cache
def slugs(path: Path) -> set[str]:
    """Its headings, as GitHub names them in a link."""
    plain = (re.sub(r"[`*]", "", heading).lower() for heading in _HEADING.findall(prose(path)))
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_make_targets_are_there(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", page("Makefile"), re.MULTILINE))
    for words in run_with("make", path):
        assert words.split()[0] in targets, f"make {words}"


def test_every_target_of_make_is_in_the_readme_or_a_page() -> None:
    (phony,) = re.findall(r"^\.PHONY: (.+)$", page("Makefile"), re.MULTILINE)
    said = {words.split()[0] for path in [*PAGES, ROOT / "contracts" / "README.md"] for words in run_with("make", path)}
    assert set(phony.split()) <= said


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_commands_and_their_options_are_there(path: Path) -> None:
    for words in run_with("openlora", path):
        command, rest = resolved(words)
        if command is None:
            continue
        known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}
        told = set(_OPTION.findall(_QUOTED.sub("", rest)))
        assert told <= known, f"openlora {words}"


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_commands_that_can_be_copied_have_what_they_need(path: Path) -> None:
    for words in run_with("openlora", path, to_copy=True):
        command, rest = resolved(words)
        assert command is not None, f"openlora {words}"
        needed = [param.opts for param in command.params if param.required and param.param_type_name == "option"]
        assert all(any(name in rest.split() for name in names) for names in needed), f"openlora {words}"


def resolved(words: str) -> tuple[Any | None, str]:
    """The command that the words begin with, and what follows; None if they name a group (`openlora settle …`)."""
    command: Any = openlora()
    left = words.split()
    while hasattr(command, "commands"):
        name = left.pop(0) if left else "…"
        if name == "…":
            return None, ""
        assert name in command.commands, f"openlora {words}"
        command = command.commands[name]
    return command, " ".join(left)


@cache
def openlora() -> Any:
    return typer.main.get_command(app)


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_scripts_are_run_as_they_can_be(path: Path) -> None:
    for script in _SCRIPT.findall(path.read_text()):
        assert (ROOT / script).is_file(), script
    for words in (*run_with("python", path), *run_with("python3", path)):
        script, *arguments = words.split()
        if _SCRIPT.fullmatch(script):
            options, needed = options_of(ROOT / script)
            told = set(_OPTION.findall(" ".join(arguments)))
            assert told <= options and needed <= told, f"{words}: {sorted(needed - told) or sorted(told - options)}"


@cache
def options_of(script: Path) -> tuple[frozenset[str], frozenset[str]]:
    """The options of a script's own argparse, and of what it imports of ours; and those that must be given."""
    text = script.read_text()
    tree = ast.parse(text)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    added = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"]
    named_ = [(call, str(call.args[0].value)) for call in added if isinstance(call.args[0], ast.Constant)]
    needed = {name for call, name in named_ if any(one.arg == "required" for one in call.keywords)}
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    files = [LIBRARY.parent.joinpath(*name.split(".")).with_suffix(".py") for name in imported]
    texts = [text, *(file.read_text() for file in files if file.is_file())]
    return frozenset(re.findall(r'"(--[a-z-]+)"', "".join(texts))), frozenset(needed)


@cache
def repository_files() -> frozenset[str]:
    found = [path for top in SOURCES for path in (ROOT / top).rglob("*.*") if "node_modules" not in path.parts]
    return frozenset("/" + str(path.relative_to(ROOT)) for path in found)


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_files_that_are_named_are_there(path: Path) -> None:
    spans = {piece.text.partition("::")[0] for piece in code(path) if piece.language is None}
    for span in filter(_FILE.fullmatch, spans - NOT_OURS - OF_A_READER):
        assert any(file.endswith("/" + span) for file in repository_files()), span


def test_the_readme_has_every_page_and_every_package() -> None:
    listed = {(ROOT / link["path"]).resolve() for link in _LINK.finditer(page("README.md")) if link["path"]}
    assert set(PAGES[1:]) <= listed
    packages = {str(file.parent.relative_to(LIBRARY)) for file in LIBRARY.glob("*/**/__init__.py")}
    modules = {file.name for file in LIBRARY.glob("*.py")} - {"__init__.py", "cli.py"}
    assert {name for row in table("README.md", "package") for name in named(row[0])} == packages | modules


def test_rows_for_perf_analyzer_are_inputs_of_the_ensemble() -> None:
    (text,) = blocks(ROOT / "docs" / "clients.md", "json")
    inputs = page("model_repository/openlora/config.pbtxt").partition("output [")[0]
    rows = parse_strict(text)["data"]
    assert rows and all(f'name: "{name}"' in inputs for row in rows for name in row)
    assert len({frozenset(row) for row in rows}) == 1, "perf_analyzer wants the same inputs in every row"
