"""The checks notice an engine that breaks a rule: each rule is broken by a small change of its source, and the check
that is named with it fails.

What is changed is a copy in memory; everything that depends on it is loaded anew.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from engine_rig import InProcessRig
from fake_tensorrt_llm import fake_tensorrt_llm
from protocol_checks import CHECKS
from protocol_world import OPTIONS, REFUSES, Store, World

PACKAGE = "openlora.engine"
# In the order in which they need each other.
MODULES = (
    "one_adapter.peft_files", "one_adapter.ensemble", "one_adapter.placing", "one_adapter.engine",
    "tensorrt_llm_abilities", "tensorrt_llm_failures", "tensorrt_llm_surface", "tensorrt_llm_cache",
    "tensorrt_llm_engine",
)  # fmt: skip


class Mutation(NamedTuple):
    module: str
    old: str
    new: str
    check: str
    version: str = "1.2"


ADAPTERS = "greedy_answers_are_those_of_transformers_and_peft"
MUTATIONS = {
    "an argument that no version knows": Mutation(
        "tensorrt_llm_engine", '"max_batch_size": options.max_batch,', '"max_batch": options.max_batch,', ADAPTERS
    ),
    "quant_config on the PyTorch backend": Mutation(
        "tensorrt_llm_engine", '"dtype": options.dtype,', '"dtype": options.dtype, "quant_config": None,', ADAPTERS
    ),
    "tokens are not copied": Mutation(
        "tensorrt_llm_engine",
        "list(made.token_ids_diff)",
        "made.token_ids_diff",
        "tokens_come_as_they_are_made",
    ),
    "cumulative tokens for new ones": Mutation(
        "tensorrt_llm_engine", "list(made.token_ids_diff)", "list(made.token_ids)", ADAPTERS
    ),
    "no lora_config": Mutation(
        "tensorrt_llm_engine", "lora_config=lora_config(names, room)", "lora_config=None", ADAPTERS
    ),
    "the adapter as second positional argument": Mutation(
        "tensorrt_llm_engine",
        "sampling_params=self._parameters(request),\n                lora_request=",
        "*(self._parameters(request), True), prompt_adapter_request=",
        ADAPTERS,
    ),
    "an id is used again": Mutation(
        "one_adapter.placing", "return len(self._numbers) + 1", "return 1", "versions_under_one_name_do_not_mix"
    ),
    "one id for all sums": Mutation(
        "one_adapter.placing", "return len(self._numbers) + 1", "return len(self._numbers) + 1 if not staged else 99",
        ADAPTERS,
    ),
    "errors of the iteration are not looked at": Mutation(
        "one_adapter.engine",
        'self._finish(live, "error", self._told(live, error))',
        'self._finish(live, "stop")',
        "bad_adapters_are_refused_and_nobody_else_suffers",
    ),
    "no preflight": Mutation(
        "one_adapter.peft_files",
        "raise AdapterInvalid(f\"{name} holds NaN or Inf (as torch.{dtype})\")",
        "pass",
        "bad_adapters_are_refused_and_nobody_else_suffers",
    ),
    "adapters with patterns as they are": Mutation(
        "one_adapter.peft_files", "not config.rank_pattern and not config.alpha_pattern", "True", ADAPTERS
    ),
    "a cancelled request runs on": Mutation(
        "tensorrt_llm_engine",
        "result.abort()",
        "pass",
        "a_cancelled_request_leaves_nothing_running",
    ),
    "no salt": Mutation(
        "tensorrt_llm_engine",
        "cache_salt=request.cache_salt or None",
        "cache_salt=None",
        "prefixes_are_shared_under_one_salt_and_adapter_only",
    ),
    "stop tokens are cut off": Mutation(
        "tensorrt_llm_engine", '"include_stop_str_in_output": True', '"include_stop_str_in_output": False',
        "answers_end_where_they_must",
    ),
    "the default of 32 tokens": Mutation(
        "tensorrt_llm_engine", '"max_tokens": min(sampling.max_tokens, room),', "", "answers_end_where_they_must"
    ),
    "weights are not folded in": Mutation("one_adapter.ensemble", "* weight / WEIGHT_ONE", "", ADAPTERS),
    "ranks are not added up": Mutation(
        "one_adapter.placing",
        "check_rank_sum([one.rank for one in facts], self._max_rank)",
        "pass",
        "an_ensemble_may_not_outgrow_the_engine",
    ),
    "1.3 looked for where 1.2 has it": Mutation(
        "tensorrt_llm_surface", '"tensorrt_llm._torch.peft.lora.config", "tensorrt_llm.lora_helper"',
        '"tensorrt_llm.lora_helper",', ADAPTERS, "1.3",
    ),
    "penalties for a version that ignores them": Mutation(
        "tensorrt_llm_surface",
        '"1.2": Surface(_LORA_HELPER, _MODULES, TORCH_SAMPLER,',
        '"1.2": Surface(_LORA_HELPER, _MODULES, TORCH_SAMPLER_WITH_PENALTIES,',
        "a_parameter_does_what_it_says_or_is_refused",
    ),
    "seeds for a version that ignores them": Mutation(
        "tensorrt_llm_surface",
        '"1.2": Surface(_LORA_HELPER, _MODULES, TORCH_SAMPLER,',
        '"1.2": Surface(_LORA_HELPER, _MODULES, TORCH_SAMPLER_WITH_SEEDS,',
        "a_seed_gives_the_same_answer_again",
    ),
    "temperature and nothing else": Mutation(
        "tensorrt_llm_engine", "sampling.temperature == 0 or (sampling.top_p == 1 and sampling.top_k)",
        "sampling.temperature == 0 or sampling.top_p == 1", "a_draw_is_a_draw", "1.1",
    ),
    "a request that ended still counts": Mutation(
        "tensorrt_llm_engine", "self._active -= 1", "pass", "an_idle_engine_says_so"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


def load_engine(mutation: Mutation | None, monkeypatch: pytest.MonkeyPatch) -> type:
    """`TensorrtLlmEngine` as it is with `mutation`."""
    for short in MODULES:
        name = f"{PACKAGE}.{short}"
        original = importlib.import_module(name)
        source = Path(original.__file__).read_text()
        if mutation is not None and mutation.module == short:
            assert source.count(mutation.old) >= 1, f"{short} has no {mutation.old!r} any more"
            source = source.replace(mutation.old, mutation.new)
        module = ModuleType(name)
        module.__file__, module.__package__ = original.__file__, name.rpartition(".")[0]
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(source, original.__file__, "exec"), module.__dict__)
    return sys.modules[f"{PACKAGE}.tensorrt_llm_engine"].TensorrtLlmEngine


def judge(engine: type, version: str, check: str, store: Store, scratch: Path) -> None:
    with (
        fake_tensorrt_llm(version),
        InProcessRig(engine(store.model_dir, "0" * 64, stats_seconds=0.01, **OPTIONS)) as rig,
    ):
        CHECKS[check](World(rig, store, scratch, REFUSES[f"tensorrt_llm-{version}"]))
        assert not rig.engine._backend._llm.active, "it still works on what was answered"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("rule", MUTATIONS)
def test_a_broken_rule_is_noticed(rule: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation = MUTATIONS[rule]
    engine = load_engine(mutation, monkeypatch)
    with pytest.raises((Exception, asyncio.CancelledError)):
        judge(engine, mutation.version, mutation.check, store, tmp_path)


@pytest.mark.parametrize(
    ("check", "version"), sorted({(mutation.check, mutation.version) for mutation in MUTATIONS.values()})
)
def test_the_same_checks_pass_without_a_change(
    check: str, version: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge(load_engine(None, monkeypatch), version, check, store, tmp_path)
