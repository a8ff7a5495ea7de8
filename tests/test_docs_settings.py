"""Pages that list what the code has: settings with their defaults, exit codes, and what lies in a state directory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from documents import ROOT, blocks, models_in, named, page, table
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from openlora.access_rule import AccessRule
from openlora.config import BaseModelFacts, RunConfig, Settings, load_settings
from openlora.errors import OpenLoRAError

NONE = "–"
REQUIRED = "required"


def settings_of(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting by its name, and its default; those of one name of many after NAME."""
    for name, field in kind.model_fields.items():
        path = prefix + name
        if is_dataclass(field.default):
            yield from ((f"{path}.{part.name}", part.default) for part in fields(field.default))
            continue
        section = isinstance(field.default, BaseModel)
        if not section:
            yield path, REQUIRED if field.default is PydanticUndefined else field.default
        for part in models_in(field.annotation):
            if part is not AccessRule:  # the card's page has it
                yield from settings_of(part, f"{path}." if section else f"{path}.NAME.")


def plain(value: Any) -> Any:
    """A default as YAML has it."""
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


def told(cell: str) -> Any:
    if cell == NONE:
        return None
    return cell if cell == REQUIRED else yaml.safe_load(named(cell)[0])


def test_every_setting_and_its_default_is_on_the_page() -> None:
    rows = table("docs/settings.md", "setting")
    listed = {named(row[0])[0]: told(row[1]) for row in rows}
    assert len(listed) == len(rows)
    assert listed == {name: plain(default) for name, default in settings_of(Settings)}


def test_the_example_is_right(tmp_path: Path) -> None:
    (text,) = blocks(ROOT / "docs" / "settings.md", "yaml")
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    assert load_settings(file).attribution.origin == "example.org/openlora"


def test_codes_of_errors() -> None:
    rows = {named(row[0])[0]: (int(row[1]), int(row[2])) for row in table("docs/operations.md", "code")}
    kinds = [OpenLoRAError, *OpenLoRAError.__subclasses__()]
    assert rows == {kind.code: (kind.exit_code, kind.http_status) for kind in kinds}


def test_what_lies_in_a_state_directory() -> None:
    root = Path("/state")
    base = BaseModelFacts(name="m", path=root, digest="0" * 64, card=None, eos_token_ids=(), max_model_len=16)
    run = RunConfig(
        settings=Settings(model=root), base=base, state_dir=root, socket_dir=root, shm_prefix="", launcher_pid=1
    )
    paths = [getattr(run, name) for name, member in vars(RunConfig).items() if isinstance(member, property)]
    tops = {path.relative_to(root).parts[0] for path in paths}
    told_of = {name.split("/")[0] for row in table("docs/operations.md", "path") for name in named(row[0])}
    assert tops <= told_of, page("docs/operations.md")
    assert {"keys", "log", "closed", "settle", "network", "base_modules", "digests.json", "serve.pid"} <= told_of
