"""The scripts that carry recipes out: what they print, what they leave, and what they do when they are started again.

TensorRT-LLM is not here, so its commands are stood in for by a script that writes what it was asked to; the steps,
the stamps, the renaming and the processes are real.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from recipe_cases import RECIPES, ROOT
from rich.console import Console

from openlora.config import load_settings
from openlora.errors import InvalidArgument, Unavailable
from openlora.recipes.build_plan import Cluster, Step, group_hosts, launch_steps, partial_of
from openlora.recipes.layout import Layout
from openlora.recipes.step_runner import run_steps

FP8, PIPELINE = "llama-3.1-8b-fp8-h100", "llama-3.3-70b-bf16-tp8-pp2-h100"
QUIET = Console(quiet=True)

# Stands in for hf_ptq.py, quantize.py and trtllm-build: counts its calls, and fills the directory that it was given.
WRITER = """#!{python}
import pathlib, sys
told = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:] if "=" in word)
calls = pathlib.Path("{calls}")
calls.write_text((calls.read_text() if calls.exists() else "") + "x")
target = pathlib.Path(told.get("export_path") or told["output_dir"])
target.mkdir(parents=True)
(target / "config.json").write_text(repr(sorted(told)))
"""


def script(name: str, *words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "build_scripts" / f"{name}.py"), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **(env or {})})


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    base = tmp_path / "models" / "meta-llama" / "Llama-3.1-8B-Instruct"
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    writer = tmp_path / "bin" / "trtllm-build"
    writer.parent.mkdir()
    writer.write_text(WRITER.format(python=sys.executable, calls=tmp_path / "calls"))
    writer.chmod(0o755)
    return {"root": tmp_path, "base": base, "writer": writer, "calls": tmp_path / "calls"}


def options(places: dict[str, Path]) -> list[str]:
    root = places["root"]
    return [f"--models={root / 'models'}", f"--artefacts={root / 'made'}", f"--state-dir={root / 'state'}"]


def sh(name: str, line: str, output: Path | None = None, *inputs: Path) -> Step:
    return Step(name, ("sh", "-c", line), inputs=inputs, output=output)


# --- the scripts ----------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_commands_and_touches_nothing(places: dict[str, Path]) -> None:
    made = script("quantize", FP8, "--dry-run", *options(places))
    assert made.returncode == 0
    line, move = made.stdout.splitlines()
    checkpoint = places["root"] / "made" / FP8 / "1.2.1" / "checkpoint"
    assert line.startswith("/usr/bin/python3 /opt/Model-Optimizer/examples/llm_ptq/hf_ptq.py --pyt_ckpt_path=")
    assert f"--export_path={checkpoint}.partial --qformat=fp8 --kv_cache_qformat=fp8" in line
    assert move == f"mv {checkpoint}.partial {checkpoint}"
    assert not (places["root"] / "made").exists()


def test_quantize_and_build_run_once_for_the_same_inputs(places: dict[str, Path]) -> None:
    """Quantize, build; again: nothing; another base model: both anew."""
    name, tools = "llama-3.1-8b-fp8-h100-engine", places["root"] / "examples"
    (tools / "quantization").mkdir(parents=True)
    (tools / "quantization" / "quantize.py").write_text(places["writer"].read_text())
    words = [f"--python={sys.executable}", f"--trtllm-examples={tools}", *options(places)]
    path = {"PATH": f"{places['writer'].parent}{os.pathsep}{os.environ['PATH']}"}

    def both() -> str:
        assert script("quantize", name, *words).returncode == 0
        assert script("build_engine", name, *options(places), env=path).returncode == 0
        return places["calls"].read_text()

    assert both() == "xx"
    made = places["root"] / "made" / name / "1.2.1"
    assert (made / "engine" / "config.json").is_file() and not list(made.glob("*.partial"))
    assert both() == "xx"
    (places["base"] / "config.json").write_text('{"other": true}')
    assert both() == "xxx"  # the checkpoint anew; its content is the same, and so the engine is left alone


def test_a_recipe_that_cannot_work_is_refused_before_anything_runs(places: dict[str, Path]) -> None:
    made = script("quantize", FP8, "--gpu=A100-80GB", *options(places))
    assert made.returncode == 2
    assert "fp8-needs-ada" in made.stderr
    assert not (places["root"] / "made").exists()


def test_a_model_served_as_it_is_needs_nothing_made(places: dict[str, Path]) -> None:
    made = script("quantize", "llama-3.1-8b-bf16-h100", *options(places))
    assert (made.returncode, "nothing to do" in made.stderr) == (0, True)
    made = script("build_engine", FP8, *options(places))
    assert (made.returncode, "only recipes of path engine are built" in made.stderr) == (2, True)


def test_a_missing_base_model_is_named(places: dict[str, Path]) -> None:
    made = script("quantize", "qwen3-8b-fp8-h100", *options(places))
    assert made.returncode == 2
    assert f"{places['root']}/models/Qwen/Qwen3-8B is not there" in made.stderr.replace("\n", "")


def test_launching_writes_settings_and_becomes_the_server(places: dict[str, Path]) -> None:
    server = places["root"] / "openlora"
    server.write_text('#!/bin/sh\necho "$HF_HUB_OFFLINE $*"\nexit 7\n')
    server.chmod(0o755)
    made = script("launch_engine", FP8, f"--openlora={server}", *options(places))
    settings = places["root"] / "state" / "recipes" / f"{FP8}-1.2.1.yaml"
    assert (made.returncode, made.stdout) == (7, f"1 serve --config={settings}\n")
    written = yaml.safe_load(settings.read_text())
    assert written["model"] == str(places["root"] / "made" / FP8 / "1.2.1" / "checkpoint")
    assert written["engine"]["tensorrt_llm"]["kv_cache_dtype"] == "fp8"


def test_several_nodes_need_hosts(places: dict[str, Path]) -> None:
    made = script("launch_engine", PIPELINE, "--dry-run", *options(places))
    assert (made.returncode, "give --hosts, or --slurm" in made.stderr) == (2, True)
    made = script("launch_engine", PIPELINE, "--dry-run", "--hosts=a,b,c", *options(places))
    assert (made.returncode, "2 nodes, 3 hosts are given" in made.stderr) == (2, True)
    made = script("launch_engine", PIPELINE, "--dry-run", "--hosts=a,b", *options(places))
    assert made.returncode == 0 and "mpirun -np 16 --host a:8,b:8 --map-by ppr:8:node" in made.stdout


def test_a_group_names_its_own_hosts(places: dict[str, Path]) -> None:
    group = {"LWS_LEADER_ADDRESS": "x-70b-0.x-70b.prod", "LWS_GROUP_SIZE": "2"}
    made = script("launch_engine", PIPELINE, "--dry-run", "--group", *options(places), env=group)
    assert "--host x-70b-0.x-70b.prod:8,x-70b-0-1.x-70b.prod:8" in made.stdout
    with pytest.raises(InvalidArgument, match="LWS_LEADER_ADDRESS and LWS_GROUP_SIZE are not set"):
        group_hosts({})


def test_the_settings_are_what_the_server_takes(tmp_path: Path) -> None:
    """Every recipe's, against the settings tree of the engine."""
    for recipe in RECIPES.values():
        step = launch_steps(recipe, Layout(state=tmp_path), Cluster("slurm"))[0]
        file = tmp_path / f"{recipe.name}.yaml"
        file.write_text(step.text or "")
        engine = load_settings(file).engine
        assert (engine.kind, engine.max_adapters) == ("tensorrt_llm", recipe.lora.device_adapters)


# --- steps ----------------------------------------------------------------------------------------------------------


def test_a_failed_step_leaves_no_output_and_is_tried_again(tmp_path: Path) -> None:
    output = tmp_path / "out"
    step = sh("make", f"echo half > {partial_of(output)}; test -e {tmp_path}/ok", output)
    with pytest.raises(Unavailable, match="make: sh ended with status 1"):
        run_steps([step], tmp_path, QUIET)
    assert not output.exists()
    (tmp_path / "ok").touch()
    run_steps([step], tmp_path, QUIET)
    assert output.read_text() == "half\n"


def test_a_killed_step_is_not_taken_for_done(tmp_path: Path) -> None:
    """SIGKILL to the runner and its command while the output is half there; started again, it is made whole."""
    output, pipe = tmp_path / "out", tmp_path / "pipe"
    os.mkfifo(pipe)
    line = f"mkdir {partial_of(output)} && echo 1 > {partial_of(output)}/a && echo started > {pipe}; test -e ok || cat"
    program = f"""
from pathlib import Path
from rich.console import Console
from openlora.recipes.build_plan import Step
from openlora.recipes.step_runner import run_steps
step = Step("make", ("sh", "-c", {line!r}), output=Path({str(output)!r}))
run_steps([step], Path({str(tmp_path)!r}), Console(quiet=True))
"""
    command = [sys.executable, "-c", program]
    running = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, cwd=tmp_path)
    assert pipe.read_text() == "started\n"  # opened when the half is written
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert partial_of(output).exists() and not output.exists()
    (tmp_path / "ok").touch()
    again = subprocess.Popen(command, stdin=subprocess.DEVNULL, cwd=tmp_path)
    assert pipe.read_text() == "started\n"
    assert again.wait() == 0
    assert (output / "a").read_text() == "1\n" and not partial_of(output).exists()


def test_a_step_is_done_again_when_its_command_or_input_changed(tmp_path: Path) -> None:
    output, source, calls = tmp_path / "out", tmp_path / "in", tmp_path / "calls"
    source.write_text("1")
    line = f"echo >> {calls}; cp {source} {partial_of(output)}"

    def times(step: Step) -> int:
        run_steps([step], tmp_path, QUIET)
        return len(calls.read_text())

    assert times(sh("make", line, output, source)) == 1
    assert times(sh("make", line, output, source)) == 1
    assert times(sh("make", line + " ", output, source)) == 2
    source.write_text("2")
    assert times(sh("make", line + " ", output, source)) == 3
    output.unlink()
    assert times(sh("make", line + " ", output, source)) == 4


def test_large_inputs_are_known_by_size_and_time(tmp_path: Path) -> None:
    weights, output, calls = tmp_path / "weights", tmp_path / "out", tmp_path / "calls"
    weights.write_bytes(bytes(2 << 20))
    step = sh("make", f"echo >> {calls}; touch {partial_of(output)}", output, weights)
    run_steps([step], tmp_path, QUIET)
    os.utime(weights, ns=(1, 1))
    run_steps([step], tmp_path, QUIET)
    assert len(calls.read_text()) == 2


def test_a_command_that_is_not_there_or_makes_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="build: trtllm-nowhere: No such file or directory"):
        run_steps([Step("build", ("trtllm-nowhere",), output=tmp_path / "out")], tmp_path, QUIET)
    with pytest.raises(Unavailable, match="make: sh succeeded and wrote no"):
        run_steps([sh("make", "true", tmp_path / "out")], tmp_path, QUIET)


# --- the commands ---------------------------------------------------------------------------------------------------


def engines(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "openlora.cli", "engines", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_list_and_show_in_json() -> None:
    listed = json.loads(engines("list", "--json").stdout)
    assert [one["recipe"]["name"] for one in listed] == list(RECIPES)
    shown = json.loads(engines("show", FP8, "--json").stdout)
    assert shown == next(one for one in listed if one["recipe"]["name"] == FP8)
    assert shown["memory"]["fits"] and shown["containers"][0] == "26.07"


def test_show_for_people() -> None:
    shown = engines("show", FP8, "--gpu", "L4")
    assert shown.returncode == 0 and "DOES NOT FIT" in shown.stdout


def test_check_says_why_and_exits_with_2() -> None:
    good = engines("check", FP8)
    assert good.returncode == 0 and "can work on H100-80GB with TensorRT-LLM 1.2.1" in good.stdout
    bad = engines("check", FP8, "--gpu", "A100-40GB", "--version", "1.1.0", "--json")
    told = json.loads(bad.stdout)
    assert (bad.returncode, told["works"], told["gpu"]) == (2, False, "A100-40GB")
    assert "fp8-needs-ada" in {finding["rule"] for finding in told["findings"]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["check", "nothing"], "no recipe 'nothing' in engines"),
        (["check", FP8, "--gpu", "H100"], "gpu: 'H100' is not in the catalogue"),
        (["list", "--recipes", "docs"], "docs holds no recipe"),
    ],
)
def test_errors_are_one_line(words: list[str], message: str) -> None:
    made = engines(*words)
    assert made.returncode == 2 and message in made.stderr and len(made.stderr.splitlines()) == 1
