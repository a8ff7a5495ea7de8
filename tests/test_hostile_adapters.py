"""A corpus of hostile adapters goes through ingest: each is refused with its reason, and nobody else notices."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hostile_adapters import CORPUS, write_corpus
from hostile_kind import CARD, CONFIG, WEIGHTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from tiny_models import Engine, digest_of, make_adapter, make_prompt, use
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from openlora.adapters.catalog import Catalog
from openlora.adapters.catalog_reader import CatalogReader
from openlora.adapters.catalog_rows import BaseFacts
from openlora.adapters.commands import adapters_app
from openlora.adapters.ingest import ingest, sync_directory
from openlora.adapters.ingest_worker import Copied, Ingester, IngestJob, IngestRequest, IngestResult
from openlora.adapters.lora_config import AdapterConfig
from openlora.adapters.manifest import adapter_manifest
from openlora.adapters.store import AdapterStore
from openlora.engine.api import WEIGHT_ONE, AdapterUse
from openlora.errors import InvalidArgument

PROMPT = make_prompt(1, 20)
PREFIX = "base_model.model."
GOOD = ("good", "good-between", "good-last")
MORE_MEMORY = 560 << 20  # than a good adapter takes: the check's own 512 MiB, three files of 8 MiB, and some
INGEST = """
import resource, sys
from pathlib import Path
import msgspec
from openlora.adapters.ingest import ingest
from openlora.adapters.ingest_worker import IngestRequest
request = msgspec.json.decode(sys.stdin.buffer.read(), type=IngestRequest)
results = ingest(Path(request.state_dir), request.base, request.jobs)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
sys.stdout.buffer.write(msgspec.json.encode((results, used.ru_maxrss * 1024)))
"""


@pytest.fixture(scope="module")
def good(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("first") / "good"
    make_adapter(base.path, folder, 1, r=4, target_modules=["q_proj", "v_proj"])
    return folder


class Ingesting:
    """`ingest` in a process of its own, which also says how much memory its workers took at most."""

    def __init__(self, state: Path, base: BaseFacts, folders: dict[str, Path]) -> None:
        jobs = tuple(IngestJob(name, str(folder)) for name, folder in folders.items())
        with tempfile.TemporaryFile() as request:
            request.write(msgspec.json.encode(IngestRequest(str(state), base, jobs)))
            request.seek(0)
            self._process = subprocess.Popen([sys.executable, "-c", INGEST], stdin=request, stdout=subprocess.PIPE)

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def wait(self) -> tuple[dict[str, IngestResult], int]:
        output, _ = self._process.communicate()
        assert self._process.returncode == 0
        results, peak = msgspec.json.decode(output, type=tuple[list[IngestResult], int])
        return {result.name: result for result in results}, peak


@dataclass
class Aftermath:
    """What is left when the corpus has been ingested beside an engine that answers."""

    state: Path
    folders: dict[str, Path]
    results: dict[str, IngestResult]
    peak: int  # bytes, of the worker
    peak_of_good: int
    answers: list[Any]  # given meanwhile
    expected: list[int]


@pytest.fixture(scope="module")
def aftermath(base, good, tmp_path_factory) -> Iterator[Aftermath]:
    state = tmp_path_factory.mktemp("state")
    Ingesting(state, base, {"first": good}).wait()  # reads the base model's modules, with torch
    results, peak_of_good = Ingesting(state, base, {"good": good}).wait()
    corpus = write_corpus(good, tmp_path_factory.mktemp("corpus"))
    middle = len(corpus) // 2
    names = [*list(corpus)[:middle], "good-between", *list(corpus)[middle:], "good-last"]
    folders = {name: corpus.get(name, good) for name in names}
    reader = CatalogReader(state / "catalog.sqlite")
    answers = []
    with Engine(base.path) as engine:

        def ask() -> Any:
            digest = reader.lookup("good").digest
            return engine.ask(PROMPT, [AdapterUse(digest, str(state / "adapters" / digest), WEIGHT_ONE)])

        expected = ask().ids
        ingesting = Ingesting(state, base, folders)
        while ingesting.running:
            answers.append(ask())
        more, peak = ingesting.wait()
    reader.close()
    yield Aftermath(state, folders, {**results, **more}, peak, peak_of_good, answers, expected)


def shown(state: Path, *arguments: str) -> str:
    done = CliRunner().invoke(adapters_app, [*arguments, "--state-dir", str(state)])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("name", CORPUS)
def test_it_gets_what_it_deserves_and_says_why(aftermath, name):
    kind = CORPUS[name]
    if name not in aftermath.results:
        pytest.skip("this machine doesn't let us make it")
    result = aftermath.results[name]
    assert (result.status, kind.reason in result.reason) == (kind.status, True), result.reason
    assert len(result.reason) <= 600
    tree = json.loads(shown(aftermath.state, "show", name, "--json"))
    assert (tree["status"], tree["reason"], tree["digest"]) == (result.status, result.reason, result.digest)
    assert all(line.isprintable() for line in shown(aftermath.state, "show", name).splitlines())


def test_the_corpus_is_large(aftermath):
    refused = [name for name, kind in CORPUS.items() if kind.status == "quarantined" and name in aftermath.results]
    assert len(refused) >= 150


def test_no_pickle_was_loaded(aftermath):
    assert not [name for name, folder in aftermath.folders.items() if (folder / "ran").exists()]


def test_nobody_else_was_disturbed(aftermath, good):
    assert {name: aftermath.results[name].status for name in GOOD} == dict.fromkeys(GOOD, "ready")
    assert len(aftermath.answers) > 3
    assert all((answer.error, answer.ids) == ("", aftermath.expected) for answer in aftermath.answers)
    ready = {result.digest for result in aftermath.results.values() if result.status == "ready"}
    assert digest_of(str(good)) in ready
    assert {entry.name for entry in (aftermath.state / "adapters").iterdir()} == {".lock", *ready}
    assert all(adapter_manifest(aftermath.state / "adapters" / digest).digest == digest for digest in ready)


def test_memory_has_a_bound(aftermath):
    assert aftermath.peak <= aftermath.peak_of_good + MORE_MEMORY


def test_a_list_of_them_is_a_list(aftermath):
    """Whatever stands in a reason is neither markup nor a control character to the terminal."""
    listed = shown(aftermath.state, "list")
    assert all(line.isprintable() for line in listed.splitlines())
    assert {record["name"] for record in json.loads(shown(aftermath.state, "list", "--json"))} >= set(aftermath.results)


class Meaning:
    """What an adapter directory means to PEFT, to us, and whether a running engine takes it."""

    def __init__(self, model_dir: str, engine: Engine) -> None:
        self._model_dir = model_dir
        self._engine = engine
        model = AutoModelForCausalLM.from_pretrained(model_dir)
        self._linears = [
            name
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
        ]

    def to_peft(self, folder: Path) -> dict[str, tuple[float, torch.Tensor, torch.Tensor]]:
        """(scaling, A, B) by module."""
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(self._model_dir), folder)
        return {
            name.removeprefix(PREFIX): (
                module.scaling["default"],
                module.lora_A["default"].weight,
                module.lora_B["default"].weight,
            )
            for name, module in loaded.named_modules()
            if isinstance(module, LoraLayer)
        }

    def assert_the_same(self, folder: Path) -> None:
        config, tensors = AdapterConfig.read(folder), load_file(folder / WEIGHTS)
        theirs = self.to_peft(folder)
        assert {name for name in self._linears if config.targets(name)} == theirs.keys()
        assert len(tensors) == 2 * len(theirs)
        for name, (scaling, a, b) in theirs.items():
            assert config.of(name).scaling == pytest.approx(scaling, rel=1e-12)
            assert torch.equal(tensors[f"{PREFIX}{name}.lora_A.weight"].float(), a)
            assert torch.equal(tensors[f"{PREFIX}{name}.lora_B.weight"].float(), b)
        answer = self._engine.ask(PROMPT, [use(str(folder))], max_tokens=1)
        assert not answer.error or answer.error.startswith("[NOT_FINITE]")  # of numbers near the end of the range


@pytest.fixture(scope="module")
def meaning(base) -> Iterator[Meaning]:
    with Engine(base.path) as engine:
        yield Meaning(base.path, engine)


@pytest.mark.parametrize("name", [name for name, kind in CORPUS.items() if kind.status == "ready"])
def test_what_is_odd_but_whole_means_what_it_means_to_peft(aftermath, meaning, name):
    meaning.assert_the_same(aftermath.state / "adapters" / aftermath.results[name].digest)


def test_a_number_too_large_for_the_engine_is_refused_by_it(aftermath, base):
    digest = aftermath.results["large-in-16-bit"].digest
    with Engine(base.path, dtype="float16") as engine:
        answer = engine.ask(PROMPT, [AdapterUse(digest, str(aftermath.state / "adapters" / digest), WEIGHT_ONE)])
    assert answer.error == (
        f"[ADAPTER_INVALID] adapter {digest}: "
        "model.layers.2.self_attn.v_proj.lora_B holds NaN or Inf (as torch.float16)"
    )


NAMES = ["", ".", "..", "../good", "/etc", "a/b", "a\\b", "a\nb", "good\n", "a\0b", "a b", "-a", ".hidden", "caf\u00e9"]
NAMES += ["\uff41", "a\u202eb", "a\u200bb", "\x1b[31mred", "[/red]", "a:b", "a%2fb", "~", "x" * 129, "base", "\udcff"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_name_is_told_before_anything_happens(base, good, tmp_path, name):
    with pytest.raises(InvalidArgument) as caught:
        ingest(tmp_path / "state", base, [IngestJob(name, str(good))])
    assert caught.value.field == "name"
    assert str(caught.value).isprintable()
    assert not (tmp_path / "state").exists()


def test_folders_of_an_adapters_directory_with_names_that_are_none(aftermath, base, good, tmp_path):
    state, adapters = tmp_path / "state", tmp_path / "adapters"
    shutil.copytree(aftermath.state / "base_modules", state / "base_modules")
    names = [name for name in NAMES if name and "/" not in name and "\0" not in name and not name.startswith(".")]
    for name in ("good", *names):
        shutil.copytree(good, adapters / name)
    results = sync_directory(adapters, state, base)
    assert {result.name: result.status for result in results} == {**dict.fromkeys(names, "failed"), "good": "ready"}
    assert all(result.reason.isprintable() for result in results)
    assert {entry.name for entry in (state / "adapters").iterdir()} == {".lock", digest_of(str(good))}


@pytest.fixture
def ingester(aftermath, base, tmp_path) -> Iterator[Ingester]:
    """Ingest in this process. `events` gets its reports, `on_copied` is called when the last file is copied."""
    state = tmp_path / "state"
    shutil.copytree(aftermath.state / "base_modules", state / "base_modules")
    store = AdapterStore(state / "adapters")
    with Catalog(state / "catalog.sqlite") as catalog, store.writing():
        yield Ingester(state, base, catalog, store, lambda event: None)


def test_a_source_rewritten_during_its_copy_is_not_taken(ingester, good, tmp_path, monkeypatch):
    source = shutil.copytree(good, tmp_path / "poet")
    rewritten = []

    def rewrite(event: Any) -> None:
        if isinstance(event, Copied) and not rewritten:
            rewritten.append(event)
            with open(source / WEIGHTS, "r+b") as file:
                file.seek(-4, os.SEEK_END)
                file.write(b"\0\0\xc0\x7f")

    monkeypatch.setattr(ingester, "_report", rewrite)
    result = ingester.bring_in(IngestJob("poet", str(source)))
    assert rewritten
    assert result.status == "failed"
    assert "its files changed while they were copied; add it again when they are complete" in result.reason
    assert [entry.name for entry in (tmp_path / "state" / "adapters").iterdir()] == [".lock"]
    assert ingester.bring_in(IngestJob("poet", str(source))).reason.endswith("holds NaN or Inf")


def test_a_hard_link_to_what_is_written_later_changes_nothing(ingester, good, tmp_path):
    source = shutil.copytree(good, tmp_path / "poet")
    (source / "outside").hardlink_to(source / WEIGHTS)
    result = ingester.bring_in(IngestJob("poet", str(source)))
    (source / "outside").write_bytes(b"")
    assert adapter_manifest(tmp_path / "state" / "adapters" / result.digest).digest == result.digest


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_what_was_rewritten_in_the_cache_is_made_again(ingester, good, tmp_path, monkeypatch, name, in_place):
    monkeypatch.setattr("openlora.adapters.store.SETTLED_NS", -1)  # the source is old enough to be believed
    result = ingester.bring_in(IngestJob("poet", str(good)))
    cached = tmp_path / "state" / "adapters" / result.digest
    content = bytearray((cached / name).read_bytes())
    content[-4] ^= 1
    written = cached / name if in_place else cached / "new"
    written.write_bytes(content)
    written.replace(cached / name)
    os.utime(cached)  # as if it had been used
    assert adapter_manifest(cached).digest != result.digest
    assert ingester.bring_in(IngestJob("poet", str(good))) == msgspec.structs.replace(result, change="unchanged")
    assert adapter_manifest(cached).digest == result.digest


def test_a_hostile_card_is_not_kept(ingester, good, tmp_path):
    source = shutil.copytree(good, tmp_path / "poet")
    (source / CARD).write_bytes(b'{"a":' * 30 + b"1" + b"}" * 30)
    assert ingester.bring_in(IngestJob("poet", str(source))).status == "quarantined"
    with CatalogReader(tmp_path / "state" / "catalog.sqlite") as reader:
        assert reader.find("poet").card == {"access": {"policy": "allow-list"}}  # nobody's: its own can't be read


flips = st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 255)), min_size=1, max_size=4)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(changes=flips, name=st.sampled_from([CONFIG, WEIGHTS]))
def test_flipped_bytes_are_refused_or_read_as_peft_reads_them(ingester, meaning, good, tmp_path, changes, name):
    source = tmp_path / "poet"
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(good, source)
    content = bytearray((source / name).read_bytes())
    end = len(content) if name == CONFIG else 8 + int.from_bytes(content[:8], "little")
    for place, value in changes:
        content[place % end] ^= value
    (source / name).write_bytes(content)
    result = ingester.bring_in(IngestJob("poet", str(source)))
    assert result.status in ("ready", "quarantined")
    assert result.reason.isprintable()
    assert bool(result.reason) == (result.status == "quarantined")
    if result.status == "ready":
        meaning.assert_the_same(source)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["q_proj", "all-linear", 4]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
]
FIELDS += [
    "layers_pattern",
    "use_rslora",
    "init_lora_weights",
    "bias",
    "task_type",
    "lora_dropout",
    "use_dora",
    "other",
]


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(FIELDS), json_values, min_size=1, max_size=2))
def test_any_value_of_a_setting_is_refused_or_meant_as_peft_means_it(ingester, meaning, good, tmp_path, changes):
    source = tmp_path / "poet"
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(good, source)
    config = json.loads((source / CONFIG).read_text())
    (source / CONFIG).write_text(json.dumps({**config, **changes}))
    result = ingester.bring_in(IngestJob("poet", str(source)))
    assert result.status in ("ready", "quarantined")
    if result.status == "ready":
        meaning.assert_the_same(source)
