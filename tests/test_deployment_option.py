"""Which deployment file a command of the chain goes by: the option's, the environment's, a devnet's that is here."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import Result
from explorer_cases import make_log
from typer.testing import CliRunner

from openlora.cli import app

VARIABLE = "OPENLORA_NETWORK__DEPLOYMENT"
NEEDING = {
    "network status": (),
    "network sync": (),
    "network revoke": ("ab" * 32, "--key", "owner.key"),
    "settle status": (),
    "settle anchor": ("--once", "--key", "submitter.key"),
}
TAKING = {**NEEDING, "explore": ("--port", "0")}


@pytest.fixture(autouse=True)
def _empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)
    make_log(tmp_path / "var", 1).close()


def run(command: str, *arguments: str, **environment: str) -> Result:
    done = CliRunner().invoke(app, [*command.split(), *TAKING[command], *arguments], env=environment)
    assert done.exit_code == 2, done.output
    return done


@pytest.mark.parametrize("command", NEEDING)
def test_without_one_a_command_says_what_to_give(command: str) -> None:
    assert f"no deployment file: give --deployment FILE, or {VARIABLE}" in run(command).stderr


@pytest.mark.parametrize("command", NEEDING)
def test_a_devnets_is_taken_where_there_is_one(command: str) -> None:
    Path("var/devnet").mkdir()
    Path("var/devnet/deployment.json").write_text("{}")
    assert "var/devnet/deployment.json" in run(command).stderr


@pytest.mark.parametrize("command", TAKING)
def test_the_option_wins_over_the_environment(command: str) -> None:
    environment = {VARIABLE: "of-environment.json"}
    assert "can't read the deployment file of-environment.json" in run(command, **environment).stderr
    given = run(command, "--deployment", "of-option.json", **environment)
    assert "can't read the deployment file of-option.json" in given.stderr
