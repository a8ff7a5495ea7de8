"""`openlora bench`: workloads ask for what they say, lines hold what was done, figures follow from times."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import Engine, make_adapter, make_model, make_prompt, projections, use
from typer.testing import CliRunner

from openlora.bench.measure import weight_bytes
from openlora.bench.popularity import POPULARITIES, ZIPF_EXPONENT
from openlora.bench.report import Report, percentiles, rates_of
from openlora.bench.runner import Batch, Runner, Timing
from openlora.cli import app
from openlora.engine.torch_engine import TorchEngine
from openlora.errors import InvalidArgument

BATCH, PROMPT, NEW, REPEAT, ADAPTERS, RANK = 5, 9, 4, 2, 3, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("bench") / "model")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    root = tmp_path_factory.mktemp("bench") / "adapters"
    for number in range(ADAPTERS):
        make_adapter(model, root / f"a{number}", number, r=RANK, target_modules=projections("llama"))
    return root


def invoke_bench(model: str, adapters: Path | None, file: Path, *options: str) -> Result:
    sizes = ["--batch", str(BATCH), "--prompt-len", str(PROMPT), "--new-tokens", str(NEW), "--repeat", str(REPEAT)]
    where = [] if adapters is None else ["--adapters", str(adapters)]
    command = ["bench", "--model", model, *where, *sizes, "--threads", "1", "--json", str(file), *options]
    return CliRunner().invoke(app, command, catch_exceptions=False)


def run_bench(model: str, adapters: Path | None, tmp_path: Path, *options: str) -> tuple[list[dict], str]:
    """The lines of the file, and what was printed."""
    file = tmp_path / "lines.jsonl"
    result = invoke_bench(model, adapters, file, *options)
    assert result.exit_code == 0
    assert result.stdout == file.read_text()
    return [json.loads(line) for line in result.stdout.splitlines()], result.stderr


def test_every_popularity_gives_a_whole_line(model: str, adapters: Path, tmp_path: Path) -> None:
    options = [word for name in POPULARITIES for word in ("--popularity", name)]
    lines, table = run_bench(model, adapters, tmp_path, *options)
    assert [line["settings"]["popularity"] for line in lines] == list(POPULARITIES)
    for line in lines:
        assert set(line) == {one.name for one in fields(Report)}
        assert line["new_tokens"] == BATCH * NEW * REPEAT
        assert line["settings"]["batch"] == BATCH
        assert (line["settings"]["dtype"], line["settings"]["threads"]) == ("float32", 1)
        assert line["tokens_per_s_min"] <= line["tokens_per_s"] <= line["tokens_per_s_max"]
        assert line["decode_tokens_per_s"] > 0
        for name in ("ttft_ms", "inter_token_ms"):
            assert 0 < line[name]["p50"] <= line[name]["p90"] <= line[name]["p99"]
        # 9 + 4 tokens, the last of which is never stored, are one block of 16.
        assert (line["kv_blocks_used"], line["kv_blocks_wasted"]) == (BATCH, 0)
        assert line["machine"]["cores"] >= 1
        assert line["peak_rss_bytes"] > 50 << 20
        assert line["settings"]["popularity"] in table
    distinct = {line["settings"]["popularity"]: line["distinct_adapters"] for line in lines}
    assert (distinct["base"], distinct["identical"], distinct["distinct"]) == (0, 1, ADAPTERS)
    assert all(line["adapters_loaded"] == ADAPTERS for line in lines)
    # fp32, rank 4: q and o 64 + 64, k and v 64 + 32, gate, up and down 64 + 96 numbers for each rank, 3 layers.
    size = 4 * RANK * 3 * (2 * 128 + 2 * 96 + 3 * 160)
    assert [line["adapter_weight_bytes"] for line in lines] == [None, *[size] * 4]
    assert weight_bytes(adapters / "a0", "bfloat16") == size // 2


def test_base_runs_without_adapters_unless_they_are_to_be_loaded(model: str, adapters: Path, tmp_path: Path) -> None:
    (alone,), _ = run_bench(model, adapters, tmp_path, "--popularity", "base")
    assert (alone["adapters_loaded"], alone["adapter_resident_bytes"]) == (0, None)
    loaded_path = tmp_path / "loaded"
    loaded_path.mkdir()
    (loaded,), _ = run_bench(model, adapters, loaded_path, "--load-adapters")
    assert loaded["settings"]["popularity"] == "base"
    assert (loaded["adapters_loaded"], loaded["distinct_adapters"]) == (ADAPTERS, 0)
    assert loaded["adapter_resident_bytes"] is not None


def test_one_new_token_has_no_decode_rate(model: str, tmp_path: Path) -> None:
    (line,), _ = run_bench(model, None, tmp_path, "--new-tokens", "1")
    assert (line["new_tokens"], line["decode_tokens_per_s"], line["inter_token_ms"]) == (BATCH * REPEAT, None, None)


@pytest.mark.parametrize("options", [("--popularity", "distinct"), ("--load-adapters",)])
def test_adapters_that_are_not_there_are_refused(model: str, tmp_path: Path, options: tuple[str, ...]) -> None:
    for adapters, words in ((None, "needs some"), (tmp_path, "no directory with an adapter_config.json")):
        result = invoke_bench(model, adapters, tmp_path / "lines.jsonl", *options)
        assert result.exit_code == 2
        assert words in result.stderr


def test_unknown_popularity_is_refused_with_the_known_ones(model: str) -> None:
    result = CliRunner().invoke(app, ["bench", "--model", model, "--popularity", "zipf"])
    assert result.exit_code == 2
    assert all(name in result.stderr for name in POPULARITIES)


def test_the_runner_computes_what_the_engine_computes(model: str, adapters: Path) -> None:
    """Tokens of a batch through the runner are those that each request gets by itself."""
    prompts = [make_prompt(seed, PROMPT) for seed in range(BATCH)]
    paths = [None, adapters / "a0", adapters / "a1", adapters / "a0", adapters / "a2"]
    with Engine(model) as alone:
        uses = [() if path is None else (use(str(path)),) for path in paths]
        expected = [alone.ask(*pair, max_tokens=NEW).ids for pair in zip(prompts, uses, strict=True)]
    runner = Runner(TorchEngine(model, "0" * 64, device="cpu", max_model_len=64, kv_cache_tokens=2048), 16)
    try:
        batch = runner.run(prompts, paths, NEW)
        assert [timing.token_ids for timing in batch.timings] == expected
        with pytest.raises(InvalidArgument, match="leave no room"):
            runner.run([make_prompt(0, 64)], [None], NEW)
        assert runner.run(prompts, paths, NEW).new_tokens == BATCH * NEW  # it goes on after a refusal
    finally:
        runner.close()


def test_rates_follow_from_the_times() -> None:
    """Two requests of 10 prompt tokens: first tokens after 1 and 2 s, the last ones after 4 s."""
    timings = [Timing(10, [1, 2, 3], [101.0, 103.0, 104.0], True), Timing(10, [1, 2], [102.0, 104.0], True)]
    batch = Batch(100.0, timings, kv_blocks_used=7, kv_blocks_wasted=2)
    assert (batch.tokens_per_s, batch.prefill_tokens_per_s, batch.decode_tokens_per_s) == (5 / 4, 20 / 2, 3 / 2)
    assert batch.ttfts == [1.0, 2.0]
    assert batch.inter_tokens == [2.0, 1.0, 2.0]
    slower = Batch(98.0, timings, kv_blocks_used=6, kv_blocks_wasted=6)
    rates = rates_of([batch, slower, batch])
    assert (rates.tokens_per_s, rates.tokens_per_s_min, rates.tokens_per_s_max) == (1.25, 0.83, 1.25)
    assert (rates.new_tokens, rates.kv_blocks_used, rates.kv_blocks_wasted) == (15, 7, 2)


@given(st.lists(st.floats(0.001, 10), min_size=1, max_size=300))
def test_percentiles_are_times_that_leave_the_right_share_above(times: list[float]) -> None:
    found = percentiles(times)
    for share, value in ((50, found.p50), (90, found.p90), (99, found.p99)):
        assert any(math.isclose(value, 1000 * time, abs_tol=1e-3) for time in times)
        assert sum(1000 * time > value + 1e-3 for time in times) <= len(times) * (100 - share) / 100
        assert sum(1000 * time < value - 1e-3 for time in times) < len(times) * share / 100


@pytest.mark.parametrize("name", POPULARITIES)
def test_popularities_draw_valid_adapters_and_repeat(name: str) -> None:
    for requests, count in ((1, 1), (16, 3), (16, 40)):
        drawn = POPULARITIES[name](requests, count, random.Random(5))
        assert drawn == POPULARITIES[name](requests, count, random.Random(5))
        assert len(drawn) == requests
        assert all(index is None if name == "base" else 0 <= index < count for index in drawn)


def test_popularities_have_the_shares_that_their_names_promise() -> None:
    requests, count = 40_000, 8
    drawn = {name: Counter(make(requests, count, random.Random(1))) for name, make in POPULARITIES.items()}
    assert drawn["base"] == {None: requests}
    assert drawn["identical"] == {0: requests}
    assert set(drawn["distinct"].values()) == {requests // count}
    assert len(set(POPULARITIES["distinct"](count, count, random.Random(1)))) == count
    whole = sum((index + 1) ** -ZIPF_EXPONENT for index in range(count))
    for index in range(count):
        assert drawn["uniform"][index] / requests == pytest.approx(1 / count, abs=0.01)
        share = (index + 1) ** -ZIPF_EXPONENT / whole
        assert drawn["skewed"][index] / requests == pytest.approx(share, abs=0.01)
