"""Whom a price goes to: properties that hold for all terms, weights and parameters."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from settlement_cases import BASE, BASE_OWNER, FRENCH, PARAMETERS, PLATFORM, WHOLE, address_of, dataset, model

from openlora.attribution.blobs import TermsBlob
from openlora.attribution.settlement.registry import account
from openlora.attribution.settlement.shares import WHOLE_SHARE, Shares, largest_remainder, shares
from openlora.network.parameters import Parameters

PEOPLE = tuple(address_of(f"person {number}") for number in range(6))
PAYEE = address_of("node payee")
people = st.sampled_from(PEOPLE)
weights = st.one_of(st.just(0), st.integers(-10_000_000, 10_000_000), st.sampled_from([-1, 1, 700_000, -700_000]))


def parts(count: int) -> st.SearchStrategy[list[int]]:
    """Numbers from 0 on that sum to 10^6."""
    cuts = st.lists(st.integers(0, WHOLE), min_size=count - 1, max_size=count - 1).map(sorted)
    return cuts.map(lambda at: [high - low for low, high in zip([0, *at], [*at, WHOLE], strict=True)])


@st.composite
def datasets(draw: st.DrawFn) -> list[dict[str, Any]]:
    made = []
    count = draw(st.integers(0, 3))
    for number, ppm in enumerate(draw(parts(count)) if count else []):
        inner = draw(parts(draw(st.integers(1, 3))))
        contributors = [{"address": draw(people), "ppm": one} for one in inner]
        digest = {"id": str(number), "digest": "da" * 32, "licence": "MIT"}
        made.append({**digest, "ppm": ppm, "contributors": contributors})
    return made


@st.composite
def cases(draw: st.DrawFn) -> tuple[TermsBlob, list[int], Parameters]:
    base = model(BASE, draw(people), datasets=draw(datasets()))
    count = draw(st.integers(0, 4))
    adapters = [model(f"{number:064x}", draw(people), datasets=draw(datasets())) for number in range(count)]
    return blob(base, adapters), [draw(weights) for _ in adapters], parameters(draw(parts(5)))


def blob(base: dict[str, Any], adapters: list[dict[str, Any]]) -> TermsBlob:
    tree = {"price_version": 2, "parameters": "0" * 64, "base": base, "adapters": adapters}
    return msgspec.convert(tree, TermsBlob)


def parameters(ppm: list[int]) -> Parameters:
    names = ("platform_ppm", "node_ppm", "adapter_ppm", "data_ppm", "base_ppm")
    return Parameters.model_validate({**PARAMETERS, **dict(zip(names, ppm, strict=True))})


DEFAULT = Parameters.model_validate(PARAMETERS)


def shares_of(base: dict[str, Any], *adapters: tuple[dict[str, Any], int]) -> Shares:
    return shares(blob(base, [one for one, _ in adapters]), [weight for _, weight in adapters], DEFAULT, PAYEE)


@given(cases())
def test_shares_sum_to_the_whole_exactly(case: tuple[TermsBlob, list[int], Parameters]) -> None:
    found = shares(*case, PAYEE)
    assert sum(found.values()) == WHOLE_SHARE
    assert all(type(share) is int and share > 0 for share in found.values())


@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_adapters_does_not_matter(case: Any, random: Any) -> None:
    terms, weights, rules = case
    together = list(zip(terms.adapters, weights, strict=True))
    random.shuffle(together)
    shuffled = msgspec.structs.replace(terms, adapters=[one for one, _ in together])
    assert shares(shuffled, [weight for _, weight in together], rules, PAYEE) == shares(terms, weights, rules, PAYEE)


@given(cases(), st.integers(1, 1000))
def test_scaling_all_weights_changes_nothing(case: Any, factor: int) -> None:
    terms, weights, rules = case
    assert shares(terms, [-factor * one for one in weights], rules, PAYEE) == shares(terms, weights, rules, PAYEE)


@given(cases())
def test_an_adapter_of_weight_zero_earns_nothing_by_itself(case: Any) -> None:
    terms, weights, rules = case
    if not any(weights):
        weights = [1] * len(weights)
    idle = msgspec.convert(model("dd" * 32, address_of("idle")), type(terms.base))
    longer = msgspec.structs.replace(terms, adapters=[*terms.adapters, idle])
    if weights:
        assert shares(longer, [*weights, 0], rules, PAYEE) == shares(terms, weights, rules, PAYEE)


@given(st.integers(1, WHOLE - 1), st.integers(1, WHOLE - 1), st.integers(0, 10_000_000))
def test_splitting_a_data_set_between_ones_own_accounts_raises_no_sum(cut: int, inner: int, weight: int) -> None:
    """Sybil: with any number of data sets, contributors and addresses, the declared part stays what it was."""
    whole = model(FRENCH, PEOPLE[0], datasets=[dataset("all", WHOLE, alice=WHOLE)])
    split = [dataset("a", cut, alice=inner, alice2=WHOLE - inner), dataset("b", WHOLE - cut, alice3=WHOLE)]
    mine = [account(address_of(name)) for name in ("alice", "alice2", "alice3")]
    other = (model("cc" * 32, PEOPLE[1]), 500_000)
    base = model(BASE, BASE_OWNER)
    before = shares_of(base, (whole, weight), other)
    after = shares_of(base, ({**whole, "datasets": split}, weight), other)
    # Each account's share is less than 10^-9 of a price off its fraction, whichever way the remainders fall.
    assert sum(after.get(who, 0) for who in mine) <= before.get(mine[0], 0) + len(mine)


@given(cases())
def test_each_share_is_its_fraction_but_for_less_than_one(case: Any) -> None:
    terms, weights, rules = case
    found = shares(terms, weights, rules, PAYEE)
    platform = Fraction(WHOLE_SHARE * rules.platform_ppm, WHOLE)
    if PLATFORM not in {one.owner for one in (terms.base, *terms.adapters)}:
        assert abs(found.get(account(PLATFORM), 0) - platform) < 1


def test_equal_adapters_earn_the_same() -> None:
    one, other = model("aa" * 32, PEOPLE[0]), model("bb" * 32, PEOPLE[1])
    found = shares_of(model(BASE, BASE_OWNER), (one, 500_000), (other, -500_000))
    assert found[account(PEOPLE[0])] == found[account(PEOPLE[1])] == 250_000_000


def test_parts_by_hand() -> None:
    french = model(FRENCH, PEOPLE[0], datasets=[dataset("news", WHOLE, alice=250_000, bob=750_000)])
    legal = model("1e" * 32, PEOPLE[1])
    found = shares_of(model(BASE, BASE_OWNER), (french, 700_000), (legal, -300_000))
    assert found == {
        account(PLATFORM): 50_000_000,
        account(PAYEE): 250_000_000,
        account(BASE_OWNER): 200_000_000,
        account(PEOPLE[0]): 210_000_000,
        account(PEOPLE[1]): 90_000_000 + 60_000_000,
        account(address_of("alice")): 35_000_000,
        account(address_of("bob")): 105_000_000,
    }


@pytest.mark.parametrize("adapters", [[], [(model(FRENCH, PEOPLE[0]), 0)]], ids=["no adapter", "weights of zero"])
def test_without_weights_the_base_earns_the_adapters_part(adapters: list[Any]) -> None:
    base = model(BASE, BASE_OWNER, datasets=[dataset("news", WHOLE, alice=WHOLE)])
    found = shares_of(base, *adapters)
    assert found[account(BASE_OWNER)] == 500_000_000
    assert found[account(address_of("alice"))] == 200_000_000
    assert shares_of(model(BASE, BASE_OWNER), *adapters)[account(BASE_OWNER)] == 700_000_000


def test_at_equal_remainders_the_lower_address_gets_one_more() -> None:
    thirds = {bytes([number]) * 20: Fraction(1, 3) for number in (9, 1, 5)}
    assert largest_remainder(thirds) == {
        b"\1" * 20: 333_333_334,
        b"\5" * 20: 333_333_333,
        b"\t" * 20: 333_333_333,
    }


def test_the_largest_remainder_comes_first() -> None:
    low, high = b"\1" * 20, b"\2" * 20
    parts_ = {low: Fraction(1, 4 * 10**9), high: 1 - Fraction(1, 4 * 10**9)}
    assert largest_remainder(parts_) == {high: WHOLE_SHARE}


def test_one_account_in_several_roles_is_added_up_first() -> None:
    mixed = "".join(one.upper() if place % 2 else one for place, one in enumerate(PEOPLE[0][2:].lower()))
    found = shares(blob(model(BASE, PEOPLE[0]), [model(FRENCH, "0x" + mixed)]), [1], DEFAULT, PEOPLE[0].lower())
    assert found == {account(PLATFORM): 50_000_000, account(PEOPLE[0]): 950_000_000}
