"""Which merges are refused before any work, and what a merge is called: its key, its record, its bytes."""

import json
import math

import pytest
from merge_cases import FACTOR_METHODS, layout_of, make_even, make_uneven, merged, plan_of
from safetensors import safe_open

from openlora.adapters.manifest import adapter_manifest
from openlora.adapters.merge import merge_record
from openlora.adapters.merge_plan import METHODS, MergeLimits, MergeSource, read_record
from openlora.errors import InvalidArgument


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    return make_even(tmp_path_factory.mktemp("even"))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    return make_uneven(tmp_path_factory.mktemp("uneven"))


@pytest.mark.parametrize("method", FACTOR_METHODS)
def test_unequal_ranks_are_refused_by_name(method, uneven):
    choices = {"density": 0.5} if "density" in METHODS[method].settings else {}
    with pytest.raises(InvalidArgument, match=r"model\.layers\.0\.q_proj uneven0 has 3, uneven1 has 4: use 'cat'"):
        layout_of(plan_of(uneven, method=method, **choices), uneven)


def test_the_record_travels_with_the_weights(even, tmp_path):
    plan = plan_of(even, method="dare_ties", density=0.5, seed=9)
    folder = merged(tmp_path / "merged", even, method="dare_ties", density=0.5, seed=9)
    assert merge_record(folder) == plan
    assert plan.sources[1] == MergeSource(adapter_manifest(even[1]).digest, -400_000)
    assert (plan.density, plan.majority_sign, plan.seed, plan.rank) == (500_000, "total", 9, None)
    assert merge_record(even[0]) is None
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["openlora_merge"])["method"] == "dare_ties"


@pytest.mark.parametrize("change", [{"schema": 2}, {"more": 1}, {"method": "mean"}, {"sources": []}, {"density": 0}])
def test_a_wrong_record_is_refused(change, even):
    record = json.loads(plan_of(even, method="ties", density=0.5).record)
    with pytest.raises(InvalidArgument, match="merge record"):
        read_record(json.dumps({**record, **change}))


def test_the_key_changes_with_everything_that_counts(even):
    plans = [
        plan_of(even),
        plan_of(even[::-1]),
        plan_of(even, (0.7, -0.4, 1.300001)),
        plan_of(even, method="linear"),
        plan_of(even, method="svd"),
        plan_of(even, method="svd", rank=3),
        *(plan_of(even, method="ties", density=density) for density in (0.5, 0.6)),
        plan_of(even, method="ties", density=0.5, majority_sign="frequency"),
        *(plan_of(even, method="dare_linear", density=0.5, seed=seed) for seed in (0, 1)),
    ]
    assert len({plan.key for plan in plans}) == len(plans)
    assert plan_of(even, (0.7000001, -0.4, 1.3)).key == plans[0].key
    assert plan_of(even, method="ties", density=0.5, majority_sign="total").key == plans[6].key
    assert plan_of(even, method="dare_linear", density=0.5).key == plans[9].key


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"method": "mean"}, "method"),
        ({"method": "dare_linear_svd", "density": 0.5}, "method"),
        ({"density": 0.5}, "density"),
        ({"method": "ties"}, "density"),
        ({"method": "ties", "density": 0.0}, "density"),
        ({"method": "ties", "density": 1.01}, "density"),
        ({"method": "ties", "density": math.nan}, "density"),
        ({"method": "ties", "density": 0.5, "majority_sign": "most"}, "majority_sign"),
        ({"method": "ties", "density": 0.5, "seed": 1}, "seed"),
        ({"method": "dare_linear", "density": 0.5, "seed": -1}, "seed"),
        ({"method": "dare_linear", "density": 0.5, "seed": 2**53}, "seed"),
        ({"method": "linear", "rank": 3}, "rank"),
        ({"method": "svd", "rank": 0}, "rank"),
        ({"weights": (1.0, 0.0, 1.0)}, "adapters"),
    ],
)
def test_a_plan_that_can_not_be_right_is_refused(settings, field, even):
    with pytest.raises(InvalidArgument) as refused:
        plan_of(even, **settings)
    assert refused.value.field == field


def test_the_same_adapter_twice_is_refused(even):
    with pytest.raises(InvalidArgument, match="the same adapter"):
        plan_of([even[0], even[0]], (1.0, 2.0))


def test_limits_are_checked_before_any_work(even):
    with pytest.raises(
        InvalidArgument, match=r"'cat' gives rank 18 in model\.layers\.0\.q_proj, the limit is 16: 'svd' with"
    ):
        layout_of(plan_of(even), even, max_rank=16)
    with pytest.raises(InvalidArgument, match="rank: 14 is over the limit of 12"):
        layout_of(plan_of(even, method="ties_svd", density=0.5, rank=14), even, max_rank=12)
    with pytest.raises(InvalidArgument, match="MiB are allowed here"):
        layout_of(plan_of(even), even, limits=MergeLimits(max_memory_bytes=1000))


def test_the_same_merge_is_the_same_bytes(even, tmp_path):
    choices = {"method": "dare_ties", "density": 0.5}
    digests = {
        name: adapter_manifest(merged(tmp_path / name, even, seed=seed, **choices)).digest
        for name, seed in (("first", 1), ("second", 1), ("other", 2))
    }
    assert digests["first"] == digests["second"] != digests["other"]
