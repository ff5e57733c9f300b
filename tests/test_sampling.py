"""Draws without replacement, against the probabilities of all their outcomes."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor

from dstlib import ScoreError, SettingError, Site
from dstlib.masking import (
    Element,
    Sampled,
    SampledRemoval,
    link_prediction,
    magnitude,
    site_generator,
    traced,
    update_mask,
)
from dstlib.schedules import Constant, Linear

BOTH = pytest.mark.parametrize("kind", [Sampled, SampledRemoval])


def site(weight: Tensor, *, seed: int = 0, step: int = 7, progress: float = 0.0, trace: Tensor | None = None) -> Site:
    return Site(
        name="fc",
        weight=weight,
        mask=torch.ones_like(weight, dtype=torch.bool),
        grad=None,
        momentum=None,
        step=step,
        generator=site_generator(seed, step, "fc"),
        trace=trace,
        progress=progress,
    )


def probabilities(weights: list[float], num_drawn: int) -> dict[frozenset[int], float]:
    """Of each set, the sum over the orders in which it may be drawn, one by one, by weight among what is left."""
    found: Counter[frozenset[int]] = Counter()
    for order in itertools.permutations(range(len(weights)), num_drawn):
        left, p = sum(weights), 1.0
        for unit in order:
            p *= weights[unit] / left if left > 0 else 0.0
            left = sum(w for i, w in enumerate(weights) if i not in order[: order.index(unit) + 1])
        found[frozenset(order)] += p
    return dict(found)


def test_probabilities_by_hand() -> None:
    """1/4 · 3/3 + 3/4 · 1/1 for two of two; one of two as it stands; {0, 1} of weights 1, 1, 2 in two orders."""
    assert probabilities([1, 3], 1) == {frozenset({0}): 0.25, frozenset({1}): 0.75}
    assert probabilities([1, 3], 2) == {frozenset({0, 1}): 1.0}
    assert probabilities([1, 1, 2], 2)[frozenset({0, 1})] == pytest.approx(2 * 1 / 4 * 1 / 3)


def frequencies(keys: Tensor, num: int, *, highest: bool) -> dict[frozenset[int], float]:
    """Of many rows, how often each set of ``num`` units comes out."""
    drawn = keys.topk(num, dim=1, largest=highest).indices.sort(dim=1).values
    sets, counts = drawn.unique(dim=0, return_counts=True)
    return {frozenset(s): c / len(keys) for s, c in zip(sets.tolist(), counts.tolist(), strict=True)}


ROWS = 40_000
CASES = [
    ([1.0, 2.0, 3.0, 4.0], 1.0, 1),
    ([1.0, 2.0, 3.0, 4.0], 1.0, 2),
    ([1.0, 2.0, 3.0, 4.0], 1.0, 3),
    ([0.1, 1.0, 3.0, 0.5], 2.0, 2),
    ([5.0, 1.0, 1.0], 0.5, 2),
    ([1e-30, 2e-30, 1e-30], 1.0, 1),
]


def check(found: dict[frozenset[int], float], expected: dict[frozenset[int], float]) -> None:
    assert set(found) <= {s for s, p in expected.items() if p > 0}
    for s, p in expected.items():
        # five standard deviations of a share of ROWS independent rows; the seed is fixed
        assert abs(found.get(s, 0.0) - p) <= 5 * math.sqrt(p * (1 - p) / ROWS), (set(s), found.get(s), p)


@pytest.mark.parametrize(("scores", "exponent", "num"), CASES)
def test_the_highest_keys_are_draws_without_replacement(scores: list[float], exponent: float, num: int) -> None:
    keys = Sampled(magnitude, exponent)(site(torch.tensor(scores).repeat(ROWS, 1)))
    scale = max(scores)
    check(frequencies(keys, num, highest=True), probabilities([(s / scale) ** exponent for s in scores], num))


@pytest.mark.parametrize(("scores", "exponent", "num"), CASES)
def test_the_lowest_keys_are_removals_without_replacement(scores: list[float], exponent: float, num: int) -> None:
    keys = SampledRemoval(magnitude, exponent)(site(torch.tensor(scores).repeat(ROWS, 1)))
    scale = max(scores)
    check(frequencies(keys, num, highest=False), probabilities([(s / scale) ** -exponent for s in scores], num))


def test_keeping_by_draws_is_not_removing_by_draws() -> None:
    """Of 1, 1, 4 one goes: kept by draws, the 4 goes when it is not among two draws, 1/6 · 1/5 · 2 = 1/15; removed
    by draws, 1/4 of 9/4, 1/9."""
    weight = torch.tensor([1.0, 1.0, 4.0]).repeat(ROWS, 1)
    kept = frequencies(Sampled(magnitude)(site(weight)), 1, highest=False)
    removed = frequencies(SampledRemoval(magnitude)(site(weight)), 1, highest=False)
    for found, p in ((kept, 1 / 15), (removed, 1 / 9)):
        assert abs(found[frozenset({2})] - p) <= 5 * math.sqrt(p * (1 - p) / ROWS)


def test_any_subset_of_candidates_is_drawn_alike() -> None:
    """As growth draws among what was not kept: unit 0 is out, and of 2, 3, 4 the shares are ninths."""
    keys = Sampled(magnitude)(site(torch.tensor([1.0, 2.0, 3.0, 4.0]).repeat(ROWS, 1)))
    check(frequencies(keys[:, 1:], 1, highest=True), probabilities([2, 3, 4], 1))


@BOTH
def test_exponent_0_is_uniform(kind: type) -> None:
    """0^0 is 1: an inactive pair without a path may grow."""
    keys = kind(magnitude, 0)(site(torch.tensor([0.0, 1e-20, 7.0]).repeat(ROWS, 1)))
    check(frequencies(keys, 1, highest=True), probabilities([1, 1, 1], 1))


@BOTH
def test_zeros_are_last_and_in_any_order(kind: type) -> None:
    keys = kind(magnitude)(site(torch.tensor([0.0, 3.0, 0.0, 1.0, 0.0]).repeat(ROWS, 1)))
    assert bool((keys[:, [1, 3]].amin() > keys[:, [0, 2, 4]].amax()).all())
    check(frequencies(keys[:, [0, 2, 4]], 2, highest=True), probabilities([1, 1, 1], 2))


magnitudes = st.lists(
    st.sampled_from([0.0, 1e-45, 1e-38, 1.0, 3.4e38]) | st.floats(0, 2.0**100, width=32), min_size=1, max_size=30
)
exponents = st.sampled_from([0, 1, 0.5, 9.0, 1e6]) | st.floats(0, 1e6)


@BOTH
@given(scores=magnitudes, exponent=exponents, seed=seeds)
def test_finite_whatever_the_scores(kind: type, scores: list[float], exponent: float, seed: int) -> None:
    """From the smallest number to the largest; and zeros last, unless all are alike."""
    weight = torch.tensor([scores], dtype=torch.float32)
    keys = kind(magnitude, exponent)(site(weight, seed=seed))
    assert keys.shape == weight.shape
    assert bool(keys.isfinite().all())
    zeros, others = keys[weight == 0], keys[weight > 0]
    if exponent > 0 and len(zeros) and len(others):
        assert bool(zeros.max() < others.min())


@BOTH
@given(scores=st.lists(st.integers(1, 1000), min_size=1, max_size=30, unique=True), seed=seeds)
def test_a_high_exponent_is_the_criterion(kind: type, scores: list[int], seed: int) -> None:
    """Neighbours differ by 1e6 · log(1000/999), a thousand: chance, within 41, has no say."""
    weight = torch.tensor([scores], dtype=torch.float32)
    keys = kind(magnitude, 1e6)(site(weight, seed=seed))
    assert torch.equal(keys.argsort(), weight.argsort())


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_keys_of_every_precision(kind: type, dtype: torch.dtype) -> None:
    """A million keys, hardly any two alike: of 53 bits, 1e12 pairs of 1e16; in single precision thousands would be."""
    keys = kind(magnitude)(site(torch.ones(1000, 1000, dtype=dtype)))
    assert keys.dtype == torch.float64
    assert len(keys.unique()) > 999_990


@BOTH
@given(seed=seeds, step=st.integers(0, 10**6))
def test_trap_9_a_function_of_seed_step_and_name(kind: type, seed: int, step: int) -> None:
    weight = torch.arange(12.0).view(3, 4)
    first, second = (kind(magnitude, 2.0)(site(weight, seed=seed, step=step)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, kind(magnitude, 2.0)(site(weight, seed=seed, step=step + 1)))


def test_two_calls_on_one_site_draw_different_numbers() -> None:
    """As drop and grow do, which share a site: otherwise what is dropped would be what grows."""
    there = site(torch.ones(3, 4))
    assert not torch.equal(Sampled(magnitude)(there), Sampled(magnitude)(there))


@BOTH
def test_the_exponent_follows_progress(kind: type) -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0]])
    for progress, exponent in ((0.0, 1.0), (0.5, 2.0), (1.0, 3.0)):
        by_curve = kind(magnitude, Linear(1.0, 3.0))(site(weight, progress=progress))
        assert torch.equal(by_curve, kind(magnitude, exponent)(site(weight)))
    assert torch.equal(kind(magnitude, Constant(2.0))(site(weight)), kind(magnitude, 2)(site(weight)))


@BOTH
def test_values_compare_and_print(kind: type) -> None:
    assert kind(magnitude, Linear(1.0, 3.0)) == kind(magnitude, Linear(1.0, 3.0))
    assert "exponent=2.0" in repr(kind(link_prediction, 2.0))


@given(seeds, st.integers(0, 100), st.integers(1, 12))
def test_an_update_keeps_its_count(seed: int, percent: int, num_active: int) -> None:
    weight = torch.arange(12.0).view(3, 4)
    mask = torch.arange(12).view(3, 4) < num_active
    there = site(weight, seed=seed)
    update = update_mask(
        mask,
        SampledRemoval(magnitude)(there),
        Sampled(magnitude)(there),
        granularity=Element(),
        num_target=num_active,
        drop_fraction=percent / 100,
    )
    assert int(update.mask.sum()) == num_active


@BOTH
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_scores_that_are_no_weights_are_refused(kind: type, value: float) -> None:
    there = site(torch.ones(1, 3), trace=torch.tensor([[1.0, value, 2.0]]))
    with pytest.raises(ScoreError, match=r"^scores to draw by of fc at step 7: .*, got 1 that are not\."):
        kind(traced)(there)


@BOTH
@pytest.mark.parametrize("exponent", [-0.5, math.nan, math.inf, 2e6, Constant(-1.0)])
def test_exponents_out_of_range_are_refused(kind: type, exponent: object) -> None:
    with pytest.raises(SettingError, match=r"^exponent of fc at step 7: expected a number in \[0, 1e\+06\]"):
        kind(magnitude, exponent)(site(torch.ones(1, 3)))
