"""Merging against PEFT, module by module, and where the two differ on purpose, by how much."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_cases import (
    FACTOR_METHODS,
    MODULES,
    WEIGHTS,
    by_peft,
    deltas,
    loaded,
    make,
    make_even,
    make_uneven,
    merged,
    sums,
)
from peft.utils import merge_utils
from safetensors.torch import load_file

from openlora.adapters.lora_config import AdapterConfig
from openlora.adapters.merge_methods import COMBINE, Choices, Part, keep_largest, keep_random
from openlora.adapters.merge_plan import METHODS
from openlora.errors import AdapterInvalid


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance=1e-5):
    assert ours.keys() == theirs.keys()
    for name, delta in theirs.items():
        torch.testing.assert_close(ours[name].to(delta.dtype), delta, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def even(folder):
    return make_even(folder)


@pytest.fixture(scope="module")
def uneven(folder):
    return make_uneven(folder)


def test_every_method_has_its_arithmetic():
    assert COMBINE.keys() == METHODS.keys()


@pytest.mark.parametrize(
    ("method", "sign"),
    [
        (name, sign)
        for name, method in METHODS.items()
        for sign in ("total", "frequency")[: 1 + ("majority_sign" in method.settings)]
    ],
)
def test_equal_to_peft(method, sign, even, tmp_path):
    known = METHODS[method].settings
    choices, theirs = {}, {}
    if "density" in known:
        choices["density"] = theirs["density"] = 0.55
    if "majority_sign" in known:
        choices["majority_sign"] = theirs["majority_sign_method"] = sign
    if "seed" in known:
        choices["seed"] = theirs["seed"] = 11
    ours = loaded(merged(tmp_path / "merged", even, method=method, **choices))
    assert_same(deltas(ours, "0"), deltas(by_peft(even, WEIGHTS, method, **theirs), "merged"))


@pytest.mark.parametrize("method", FACTOR_METHODS)
def test_factors_are_pefts_too(method, even, tmp_path):
    choices = {key: value for key, value in {"density": 0.4, "seed": 5}.items() if key in METHODS[method].settings}
    tensors = load_file(merged(tmp_path / "merged", even, method=method, **choices) / "adapter_model.safetensors")
    theirs = by_peft(even, WEIGHTS, method, **choices).state_dict()
    assert len(tensors) == 12
    for key, tensor in tensors.items():
        torch.testing.assert_close(tensor, theirs[key.replace(".weight", ".merged.weight")], rtol=1e-6, atol=1e-6)


def test_cat_is_the_sum_whatever_differs(uneven, tmp_path):
    ours = loaded(merged(tmp_path / "merged", uneven)).double()
    assert_same(deltas(ours, "0"), sums(uneven, WEIGHTS), 1e-6)
    config = AdapterConfig.read(tmp_path / "merged")
    assert [config.of(f"model.layers.{layer}.q_proj").rank for layer in (0, 1)] == [7, 9]
    assert not config.targets("model.layers.0.v_proj")


def test_svd_is_the_sum_when_the_rank_allows(uneven, tmp_path):
    ours = loaded(merged(tmp_path / "merged", uneven, method="svd", rank=9)).double()
    assert_same(deltas(ours, "0"), sums(uneven, WEIGHTS), 1e-6)
    assert AdapterConfig.read(tmp_path / "merged").of("model.layers.1.v_proj").rank == 2  # the sum has no higher one


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("method", ["svd", "ties_svd"])
def test_svd_methods_are_the_truncated_optimum(method, rank, even, tmp_path):
    if method == "svd":
        wanted = sums(even, WEIGHTS)
        folder = merged(tmp_path / "merged", even, method=method, rank=rank)
    else:
        model = loaded(*even)
        changes = [deltas(model, str(number)) for number in range(3)]
        wanted = {}
        for name in MODULES.linear:
            there = [(change[name], weight) for change, weight in zip(changes, WEIGHTS, strict=True) if name in change]
            wanted[name] = merge_utils.ties([d for d, _ in there], torch.tensor([w for _, w in there]), 0.3).double()
        folder = merged(tmp_path / "merged", even, method=method, rank=rank, density=0.3)
    for name, delta in deltas(loaded(folder), "0").items():
        tail = torch.linalg.svdvals(wanted[name])[rank:].norm()  # Eckart–Young: no matrix of the rank is nearer
        error = (delta.double() - wanted[name]).norm()
        assert error == pytest.approx(tail.item(), rel=1e-5, abs=1e-4)
        assert torch.linalg.matrix_rank(delta, rtol=1e-4) == rank


power_of_two = st.sampled_from([-4.0, -1.0, -0.5, 0.25, 1.0, 2.0])


@settings(max_examples=40)
@given(
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
    coefficients=st.data(),
)
def test_cat_is_exact_bit_by_bit(ranks, seed, coefficients):
    draw = torch.Generator().manual_seed(seed)
    parts = [
        Part(
            torch.randn(rank, 7, generator=draw),
            torch.randn(5, rank, generator=draw),
            coefficients.draw(power_of_two),
            coefficients.draw(power_of_two),
        )
        for rank in ranks
    ]
    a, b = COMBINE["cat"](parts, Choices(rank=sum(ranks)))
    start = 0
    for part, rank in zip(parts, ranks, strict=True):
        assert torch.equal(a[start : start + rank], part.a * (part.weight * part.scaling))
        assert torch.equal(b[:, start : start + rank], part.b)
        start += rank
    total = sum(part.weight * part.scaling * (part.b.double() @ part.a.double()) for part in parts)
    torch.testing.assert_close(b.double() @ a.double(), total, rtol=1e-12, atol=1e-12)


@settings(max_examples=40)
@given(
    count=st.integers(1, 5),
    rank=st.integers(1, 6),
    seed=st.integers(0, 1000),
    density=st.sampled_from([0.1, 0.35, 0.5, 0.9]),
    sign=st.sampled_from(["total", "frequency"]),
    weights=st.lists(st.floats(0.1, 3), min_size=5, max_size=5),
)
def test_sparse_methods_against_pefts_functions(count, rank, seed, density, sign, weights):
    draw = torch.Generator().manual_seed(seed)
    parts = [
        Part(torch.randn(rank, 7, generator=draw), torch.randn(9, rank, generator=draw), weight, 2.0)
        for weight in weights[:count]
    ]
    roots = torch.tensor([math.sqrt(part.weight * 2.0) for part in parts])
    theirs = {
        "ties": lambda tensors: merge_utils.ties(tensors, roots, density, sign),
        "dare_ties": lambda tensors: merge_utils.dare_ties(tensors, roots, density, sign),
        "dare_linear": lambda tensors: merge_utils.dare_linear(tensors, roots, density),
        "magnitude_prune": lambda tensors: merge_utils.magnitude_prune(tensors, roots, density),
        "linear": lambda tensors: merge_utils.task_arithmetic(tensors, roots),
    }
    assert list(sorted(theirs)) == sorted(FACTOR_METHODS)
    for method, peft in theirs.items():
        torch.manual_seed(seed)
        wanted = peft([part.a for part in parts]), peft([part.b for part in parts])
        ours = COMBINE[method](parts, Choices(rank, density, sign, torch.Generator().manual_seed(seed)))
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


def test_linear_is_no_sum_of_changes(folder, tmp_path):
    wide = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    paths = [make(folder / f"wide{seed}", seed, **wide) for seed in (20, 21)]
    linear = deltas(loaded(merged(tmp_path / "linear", paths, (0.5, 0.5), "linear")), "0")
    total = sums(paths, (0.5, 0.5))
    error = {name: ((linear[name] - total[name]).norm() / total[name].norm()).item() for name in total}
    assert all(0.5 < value < 1.6 for value in error.values()), error


def test_pefts_rslora_is_too_strong_by_the_root_of_the_rank(folder, tmp_path):
    stable = {"r": 4, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj"]}
    paths = [make(folder / f"stable{seed}", seed, **stable) for seed in (30, 31)]
    ours = deltas(loaded(merged(tmp_path / "merged", paths, (1.0, 0.5))).double(), "0")
    assert_same(ours, sums(paths, (1.0, 0.5)), 1e-6)
    theirs = deltas(by_peft(paths, (1.0, 0.5), "cat"), "merged")
    assert_same({name: delta * math.sqrt(8) for name, delta in ours.items()}, theirs)


def test_one_source_is_still_merged_by_the_method(even, tmp_path):
    pruned = deltas(loaded(merged(tmp_path / "merged", even[:1], (1.0,), "magnitude_prune", density=0.2)), "0")
    linear = deltas(by_peft(even[:1], (1.0,), "magnitude_prune", density=0.2), "merged")
    assert_same(linear, {name: delta.float() for name, delta in sums(even[:1], (1.0,)).items()})
    assert all(not torch.allclose(pruned[name], linear[name], atol=0.1) for name in linear)


def test_equal_ranks_in_each_module_are_enough(folder, tmp_path):
    """PEFT fails here: it compares what the configurations hold at most."""
    paths = [
        make(folder / "by_module0", 40, r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 5}),
        make(folder / "by_module1", 41, r=5, target_modules=["v_proj"]),
    ]
    names = deltas(loaded(merged(tmp_path / "merged", paths, (1.0, 1.0), "linear")), "0").keys()
    config = AdapterConfig.read(tmp_path / "merged")
    assert {name: config.of(name).rank for name in names} == {
        "model.layers.0.q_proj": 2,
        "model.layers.0.v_proj": 5,
        "model.layers.1.q_proj": 2,
        "model.layers.1.v_proj": 5,
    }


def test_pruning_keeps_the_first_of_equals():
    tensor = torch.tensor([[2.0, -2.0, 1.0], [2.0, -3.0, 0.0]])
    assert keep_largest(tensor, 0.5).tolist() == [[2.0, -2.0, 0.0], [0.0, -3.0, 0.0]]
    assert keep_largest(tensor, 0.1).count_nonzero() == 0
    assert keep_largest(tensor, 1.0) is tensor


def test_dare_keeps_the_expected_value():
    draw = torch.Generator().manual_seed(3)
    kept = keep_random(torch.ones(200, 200), Choices(1, density=0.25, generator=draw))
    assert set(kept.unique().tolist()) == {0.0, 4.0}
    assert kept.mean().item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("method", ["cat", "svd", "ties_svd"])
def test_numbers_that_overflow_are_refused_by_module(method, folder, tmp_path):
    huge = folder / f"huge-{method}"
    make(huge, 50, r=2, target_modules=["v_proj"], lora_alpha=1e38)
    choices = {"density": 0.9} if method == "ties_svd" else {}
    with pytest.raises(AdapterInvalid, match=r"module model\.layers\.0\.v_proj: the merged numbers overflow float32"):
        merged(tmp_path / "merged", [huge], (10.0,), method, **choices)


def test_targets_stay_exact_where_short_names_would_mean_more(folder, tmp_path):
    paths = [make(folder / "one_layer", 60, r=2, target_modules=["q_proj"], layers_to_transform=[1])]
    merged(tmp_path / "merged", paths, (1.0,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of missing and unexpected keys
        model = loaded(tmp_path / "merged")
    assert list(deltas(model, "0")) == ["model.layers.1.q_proj"]
