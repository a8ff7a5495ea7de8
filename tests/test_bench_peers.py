"""The comparison with peers: its files, its workers, its arithmetic. vLLM's own environment is not for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from comparison import Row, ratios_of, series_of
from make_shape import AdapterSet
from peft import PeftModel
from protocol import Job, Settings
from systems import BASE, CLAIMS, DECODE, DISTINCT, GROUPS, OURS, PREFILL, WORKLOADS, Claim, Shape
from tiny_models import Engine, use
from transformers import AutoModelForCausalLM, AutoTokenizer
from worker_process import Worker, WorkerFailed

from openlora.bench.measure import weight_bytes

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
VOCAB, NEW = 400, 6


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Shape:
    """Two layers in fp32, so that every system chooses the same tokens."""
    root = tmp_path_factory.mktemp("peers") / "shape"
    sizes = {"hidden": 64, "layers": 2, "heads": 4, "kv-heads": 2, "mlp": 96, "vocab": VOCAB, "context": 128}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    script = [sys.executable, str(BENCHMARKS / "make_shape.py"), "--out", str(root), "--dtype", "float32"]
    subprocess.run([*script, *options, "--adapters", "3x16", "3x8", "1x64"], check=True)
    return Shape(root)


def start(shape: Shape, worker: str, tmp_path: Path, adapters: list[str], **options: bool | str) -> Worker:
    settings = Settings(shape.model, adapters, batch=4, tokens=40, max_rank=64, threads=1, options=options)
    log = tmp_path / "worker.log"
    return Worker(Path(sys.executable), BENCHMARKS / "peers" / f"worker_{worker}.py", settings, {}, log)


def prompts(count: int) -> list[list[int]]:
    return [[(7 * row + 13 * place) % VOCAB for place in range(9)] for row in range(count)]


def expected(shape: Shape, job: Job) -> list[list[int]]:
    """What each request gets by itself."""
    with Engine(shape.model) as engine:
        uses = [() if path is None else (use(path),) for path in job.adapters]
        return [engine.ask(*pair, max_tokens=NEW).ids for pair in zip(job.prompts, uses, strict=True)]


def test_a_shape_is_a_model_with_adapters_that_peft_takes(shape: Shape) -> None:
    model = AutoModelForCausalLM.from_pretrained(shape.model)
    input_ids = torch.tensor(prompts(1))
    with torch.inference_mode():
        plain = model(input_ids).logits
        adapted = PeftModel.from_pretrained(model, shape.adapters(8)[0])(input_ids).logits
    assert model.config.vocab_size == VOCAB
    assert (plain - adapted).abs().max() > 0.01
    assert [len(shape.adapters(rank)) for rank in (16, 8, 64)] == [3, 3, 1]
    sizes = [weight_bytes(Path(shape.adapters(rank)[0]), "float32") for rank in (8, 16, 64)]
    assert sizes == [sizes[0], 2 * sizes[0], 8 * sizes[0]]


def test_a_shape_has_a_tokenizer_that_covers_its_vocabulary(shape: Shape) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shape.model)
    assert len(tokenizer) == VOCAB
    assert sorted(tokenizer.get_vocab().values()) == list(range(VOCAB))
    for text in ("the cat sat", "Zürich 東京 🙂\n\ttabs"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("the cat sat")["input_ids"]) < len("the cat sat")


@pytest.mark.parametrize("text", ["16", "0x8", "16x", "x8", "16x8x2"])
def test_adapter_sets_are_count_times_rank(text: str) -> None:
    assert AdapterSet.parse("16x8") == AdapterSet(count=16, rank=8)
    with pytest.raises(Exception, match="COUNTxRANK is right"):
        AdapterSet.parse(text)


def wait_until_stopped(process: psutil.Process) -> None:
    """A stop signal takes effect when a process next meets the kernel, a little after it was sent."""
    deadline = time.monotonic() + 10
    while process.status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline, f"still {process.status()}"
        os.sched_yield()


def test_our_worker_and_peft_do_the_same_work_and_are_stopped_between_jobs(shape: Shape, tmp_path: Path) -> None:
    adapters = shape.adapters(16)
    jobs = [
        Job(prompts(4), [adapters[1], None, adapters[0], adapters[1]], NEW),
        Job(prompts(3), [adapters[2]] * 3, NEW),
        Job(prompts(2), [None] * 2, NEW),
    ]
    answers = [expected(shape, job) for job in jobs]
    assert answers[1][:2] != answers[2]  # or this test would see no adapters
    for name, options in (("openlora", {"quantization": "none"}), ("peft", {})):
        worker = start(shape, name, tmp_path, adapters, **options)
        try:
            process = psutil.Process(worker.pid)
            for job, answer in zip(jobs, answers, strict=True):
                wait_until_stopped(process)
                run = worker.run(job)
                assert run.result.tokens == answer
                assert run.result.seconds > 0
                assert 0 <= run.foreign_share <= 1
            assert worker.memory_bytes() > 50 << 20
        finally:
            worker.close()
        assert not process.is_running()


@pytest.mark.parametrize("continuous", [False, True])
def test_transformers_does_the_same_work(shape: Shape, tmp_path: Path, continuous: bool) -> None:
    job = Job(prompts(3), [None] * 3, NEW)
    worker = start(shape, "transformers", tmp_path, [], continuous=continuous)
    try:
        assert worker.run(job).result.tokens == expected(shape, job)
        assert worker.run(job).result.tokens == expected(shape, job)  # the second job finds it as the first did
    finally:
        worker.close()


def test_a_worker_that_cannot_start_says_why(shape: Shape, tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match="int3"):
        start(shape, "openlora", tmp_path, [], quantization="int3")


def rows(system: str, workload: str, tokens: int, *seconds: float) -> list[Row]:
    return [Row(system, workload, number, 2, tokens, time, 0.0, None) for number, time in enumerate(seconds)]


def test_ratios_compare_runs_of_one_round_with_the_best_of_the_others() -> None:
    claim = Claim("base", ("a", BASE), (("b", BASE), ("c", BASE), ("absent", BASE)), goal=1.5)
    measured = [
        *rows("a", BASE.name, 100, 1.0, 2.0, 1.0),
        *rows("b", BASE.name, 100, 2.0, 2.0, 4.0),
        *rows("c", BASE.name, 100, 5.0, 5.0, 0.1),  # the better extreme, the worse median
    ]
    (ratio,) = ratios_of(series_of(measured), [claim, Claim("other", ("absent", BASE), (("b", BASE),), 1.0)])
    assert (ratio.against, ratio.median, ratio.low, ratio.high) == ("b", 2.0, 1.0, 4.0)


def test_the_decode_rate_is_what_a_batch_takes_beyond_its_prefill() -> None:
    measured = [*rows("a", BASE.name, 64, 3.0, 5.0), *rows("a", PREFILL.name, 40, 1.0, 1.0)]
    series = series_of(measured)
    assert series["a", PREFILL.name] == [40.0, 40.0]
    assert series["a", DECODE.name] == [31.0, 15.5]  # 64 tokens, 2 of them from the prefill
    assert ("b", DECODE.name) not in series_of(rows("b", BASE.name, 64, 3.0))


def test_every_claim_is_about_workloads_that_its_systems_do() -> None:
    done = {(one.name, workload.name) for group in GROUPS for one in group for workload in one.workloads}
    done |= {(system, DECODE.name) for system, workload in done if workload == PREFILL.name}
    for claim in CLAIMS:
        assert {(system, workload.name) for system, workload in (claim.ours, *claim.others)} <= done
    for group in GROUPS:
        assert len({one.name for one in group}) == len(group)
        assert OURS in {one.name for one in group}


def test_workloads_ask_for_the_adapters_that_they_name(shape: Shape) -> None:
    asked = {workload.name: workload.adapters(shape, 3) for workload in WORKLOADS}
    assert asked[BASE.name] == asked[PREFILL.name] == asked["base, adapters loaded"] == [None] * 3
    assert asked["identical"] == shape.adapters(16)[:1] * 3
    assert asked[DISTINCT.name] == shape.adapters(16)
    assert asked["distinct, rank 8"] == shape.adapters(8)
    assert asked["one rank 64 among rank 8"] == [*shape.adapters(8)[:2], *shape.adapters(64)]


def test_a_whole_run_of_our_own_systems(shape: Shape, tmp_path: Path) -> None:
    sizes = ["--batch", "3", "--prompt-len", "5", "--new-tokens", "4", "--repeat", "2", "--threads", "1"]
    where = ["--root", str(tmp_path), "--shape", str(shape.root), "--json", str(tmp_path / "lines.jsonl")]
    script = [sys.executable, str(BENCHMARKS / "peers" / "run.py"), *where, *sizes, "--quiet-share", "1"]
    done = subprocess.run([*script, "--systems", OURS, "openlora+lora"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert done.stdout.splitlines() == (tmp_path / "lines.jsonl").read_text().splitlines()
    runs = [(line["round"], line["system"], line["workload"]) for line in lines]
    loaded = ["base, adapters loaded", "identical", "distinct", "distinct, rank 8", "one rank 64 among rank 8"]
    pairs = [(OURS, BASE.name), (OURS, PREFILL.name), *(("openlora+lora", name) for name in loaded)]
    assert runs == [(number, *pair) for number in range(2) for pair in pairs]
    for line in lines:
        assert line["tokens"] == (15 if line["workload"] == PREFILL.name else 12)
        assert line["tokens_per_s"] == pytest.approx(line["tokens"] / line["seconds"], rel=0.01)
        assert line["first_token_agreement"] == 1.0
    assert "distinct / own base" in done.stderr
