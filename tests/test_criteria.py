"""Criteria: hand-worked orders, balance of signs, and draws that depend on (seed, step, name) alone."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import drawn, folds, generator, grid, initial_mask, seeds
from torch import Tensor

from dstlib import ScoreError, SettingError, Site
from dstlib.masking import (
    Drawn,
    Element,
    Granularity,
    Kernel,
    NormalFanIn,
    WeightAndGradient,
    gradient,
    magnitude,
    magnitude_l2,
    momentum,
    moved,
    plain_gradient,
    random,
    relative_importance,
    saliency,
    sign_balanced,
    site_generator,
    stored,
    traced,
    traced_magnitude,
    uniform_fan_in,
    uniform_fan_out,
    update_mask,
    zeros,
)


def site(
    weight: Tensor,
    mask: Tensor | None = None,
    grad: Tensor | None = None,
    first_moment: Tensor | None = None,
    step: int = 7,
    seed: int = 0,
    trace: Tensor | None = None,
) -> Site:
    return Site(
        name="encoder.fc",
        weight=weight,
        mask=weight != 0 if mask is None else mask,
        grad=grad,
        momentum=first_moment,
        step=step,
        generator=site_generator(seed, step, "encoder.fc"),
        trace=trace,
    )


def normal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


# Magnitude, gradient, momentum

# Two kernels: the L1 norms are 5 and 6, the L2 norms 5 and √18 = 4.24
KERNELS = torch.tensor([[[5.0, 0.0], [3.0, -3.0]]])


def test_magnitudes_order_kernels_by_different_norms() -> None:
    one = {"granularity": Kernel(), "num_target": 1}
    assert drawn(initial_mask(magnitude(site(KERNELS)), **one)[0]) == ".. xx"
    assert drawn(initial_mask(magnitude_l2(site(KERNELS)), **one)[0]) == "xx .."


def test_means_over_a_kernel_are_its_norms() -> None:
    assert (magnitude(site(KERNELS)).mean(dim=2) * 2).tolist() == [[5.0, 6.0]]
    assert (magnitude_l2(site(KERNELS)).mean(dim=2) * 2).tolist() == [[25.0, 18.0]]


def test_gradient_and_momentum_forget_the_sign() -> None:
    given_tensor = torch.tensor([[-3.0, 1.0], [0.0, 2.0]])
    weight = torch.ones(2, 2)
    assert gradient(site(weight, grad=given_tensor)).tolist() == [[3.0, 1.0], [0.0, 2.0]]
    assert momentum(site(weight, first_moment=given_tensor)).tolist() == [[3.0, 1.0], [0.0, 2.0]]


def test_the_gradient_of_inactive_weights_counts() -> None:
    """It is what growth is about."""
    there = site(torch.tensor([[1.0, 0.0]]), grad=torch.tensor([[1.0, -2.0]]))
    assert gradient(there).tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(
    ("criterion", "what"),
    [
        *((c, "gradient") for c in (gradient, plain_gradient, saliency, moved, WeightAndGradient(0.01))),
        (momentum, "momentum"),
        (traced, "trace"),
        (traced_magnitude, "trace"),
    ],
)
def test_what_is_missing_is_named_with_its_site(criterion, what) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ScoreError, match=rf"^{what} of encoder\.fc at step 7: expected a tensor, got None\."):
        criterion(site(torch.ones(2, 2)))


SIGNED = [plain_gradient, moved, traced, Drawn(normal)]
UNSIGNED = [
    *(magnitude, magnitude_l2, random, sign_balanced, gradient, momentum),
    *(saliency, WeightAndGradient(0.5), relative_importance, traced_magnitude),
]


@pytest.mark.parametrize("criterion", UNSIGNED + SIGNED)
@given(case=folds(), seed=seeds)
def test_a_score_per_weight_and_nothing_changed(criterion, case, seed) -> None:  # type: ignore[no-untyped-def]
    _, shape = case
    tensors = tuple(torch.randn(shape, generator=generator(seed + i)) for i in range(4))
    before = tuple(x.clone() for x in tensors)
    weight, grad, moment, trace = tensors
    scores = criterion(site(weight, weight > 0, grad, moment, trace=trace))
    assert scores.shape == shape
    assert bool(scores.isfinite().all())
    assert bool((scores >= 0).all()) or criterion in SIGNED
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


# Weight times gradient, and what a trace gathers

# Descent takes the first and the last away from zero, the second and third towards it
WEIGHT, GRAD = torch.tensor([[2.0, 2.0, -3.0, -3.0, 0.0]]), torch.tensor([[-0.5, 0.5, -1.0, 1.0, 4.0]])


def test_saliency_movement_and_both_by_hand() -> None:
    there = site(WEIGHT, grid("xxxxx"), GRAD)
    assert saliency(there).tolist() == [[1.0, 1.0, 3.0, 3.0, 0.0]]
    assert moved(there).tolist() == [[1.0, -1.0, -3.0, 3.0, 0.0]]
    assert WeightAndGradient(0.5)(there).tolist() == [[2.25, 2.25, 3.5, 3.5, 2.0]]
    assert plain_gradient(there) is GRAD


@given(seeds)
def test_what_moved_moves_away_from_zero(seed: int) -> None:
    """A small step of descent: |w| grows where the score is positive, and only there."""
    w, g = (torch.randn(4, 5, generator=generator(seed + i), dtype=torch.float64) for i in range(2))
    grows = (w - 1e-9 * g).abs() > w.abs()
    assert torch.equal(moved(site(w, grad=g)) > 0, grows)


@given(seeds)
def test_saliency_is_the_first_order_change_of_the_loss(seed: int) -> None:
    """Of a loss that is linear, it is all of the change: with one weight at zero, |w·g|."""
    w, g = (torch.randn(3, 2, generator=generator(seed + i), dtype=torch.float64) for i in range(2))
    loss = (w * g).sum()
    without = torch.stack([loss - (w * g).flatten()[i] for i in range(6)]).view(3, 2)
    torch.testing.assert_close(saliency(site(w, grad=g)), (loss - without).abs(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("criterion", [saliency, moved, WeightAndGradient(1e4)])
def test_products_do_not_leave_half_precision(criterion) -> None:  # type: ignore[no-untyped-def]
    """300 · 300 is above 65504, and 1e-5 · 1e-5 below 6e-8."""
    half = torch.tensor([[300.0, 1e-5]], dtype=torch.float16)
    score = criterion(site(half, grad=half))
    assert score.dtype == torch.float32
    assert bool(score.isfinite().all())
    assert bool((score != 0).all())


def test_factor_0_is_magnitude() -> None:
    assert torch.equal(WeightAndGradient(0)(site(WEIGHT, grad=GRAD)), magnitude(site(WEIGHT)))


@pytest.mark.parametrize("factor", [-0.1, math.inf, math.nan])
def test_factors_out_of_range_are_refused(factor: float) -> None:
    with pytest.raises(SettingError, match=r"^factor of WeightAndGradient: expected a number, 0 or more"):
        WeightAndGradient(factor)


def test_what_was_traced_is_handed_on() -> None:
    trace = torch.tensor([[-3.0, 1.0]])
    there = site(torch.ones(1, 2), trace=trace)
    assert traced(there) is trace
    assert traced_magnitude(there).tolist() == [[3.0, 1.0]]


# Relative importance


def test_relative_importance_by_hand() -> None:
    """Rows sum to 4, 3, 0; columns to 2, 1, 4. The 9 is not active, as under a dense storage."""
    weight = torch.tensor([[1.0, 0.0, -3.0], [-1.0, 1.0, 1.0], [9.0, 0.0, 0.0]])
    score = relative_importance(site(weight, grid("xxx xxx .xx")))
    expected = [[1 / 4 + 1 / 2, 0, 3 / 4 + 3 / 4], [1 / 3 + 1 / 2, 1 / 3 + 1 / 1, 1 / 3 + 1 / 4], [0, 0, 0]]
    torch.testing.assert_close(score, torch.tensor(expected), rtol=1.2e-7, atol=0)


@given(folds(), seeds)
def test_relative_importance_sums_to_the_number_of_rows_and_columns(
    case: tuple[Granularity, torch.Size], seed: int
) -> None:
    """Each row that is not empty shares out 1, and each column; taps are columns of their own."""
    weight = torch.randn(case[1], generator=generator(seed), dtype=torch.float64)
    mask = torch.rand(case[1], generator=generator(seed + 1)) < 0.5
    score = relative_importance(site(weight, mask))
    assert not bool(score[~mask].any())
    active = mask.flatten(1)
    num_shared = int(active.any(dim=0).sum() + active.any(dim=1).sum())
    assert float(score.sum()) == pytest.approx(num_shared, rel=1e-12)


@given(folds(), seeds, st.sampled_from([1e-30, 1e-3, 1e30]))
def test_relative_importance_knows_no_scale(case: tuple[Granularity, torch.Size], seed: int, scale: float) -> None:
    weight = torch.randn(case[1], generator=generator(seed))
    score, scaled = (relative_importance(site(weight * s)) for s in (1.0, scale))
    torch.testing.assert_close(scaled, score, rtol=1e-5, atol=0)


# Balance of signs


def dropped_by_sign(weight: Tensor, mask: Tensor, fraction: float) -> Tensor:
    return update_mask(
        mask,
        sign_balanced(site(weight, mask)),
        torch.zeros(weight.shape),
        granularity=Element(),
        num_target=int(mask.sum()) - math.floor(fraction * int(mask.sum()) * (1 + 1e-12)),  # 0.29 · 100 is 29
        drop_fraction=0.0,
    ).dropped


@pytest.mark.parametrize(
    ("weights", "scores"),
    [
        ([4, 2, 3, 1], [1, 2 / 4, 3 / 4, 1 / 4]),
        ([-4, 2, -3, 1], [1, 1, 1 / 2, 1 / 2]),
        ([9, -1, 8, 7], [1, 1, 2 / 3, 1 / 3]),  # a lonely sign scores 1
        ([0, 5, -5, 0], [0, 1, 1, 0]),
        ([2, 2, 2, -1], [1, 2 / 3, 1 / 3, 1]),  # ties: the higher index is lower
        ([0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_places_among_the_same_sign(weights: list[float], scores: list[float]) -> None:
    score = sign_balanced(site(torch.tensor([weights]).float(), grid("xxxx")))
    # 1 - place/n in single precision: two roundings of 6e-8
    assert score[0].tolist() == pytest.approx(scores, rel=0, abs=1.2e-7)


def test_inactive_weights_have_no_place() -> None:
    """Their value, if any, must not push the active ones down."""
    score = sign_balanced(site(torch.tensor([[5.0, 1.0, 2.0, -1.0]]), grid(".xxx")))
    assert score.tolist() == [[0.0, 0.5, 1.0, 1.0]]


def test_large_positive_weights_do_not_shield_small_negative_ones() -> None:
    weight = torch.tensor([[10.0, 11.0, 12.0, 13.0, -1.0, -2.0, -3.0, -4.0]])
    dropped = dropped_by_sign(weight, weight != 0, 0.5)
    assert drawn(dropped) == "xx..xx.."  # by magnitude alone, all negative ones would go


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 10), st.integers(0, 100), seeds)
def test_both_signs_lose_the_same_share(positive: int, negative: int, zero: int, percent: int, seed: int) -> None:
    """To within one weight; zeros go first; within a sign the smallest go."""
    signs = torch.tensor([1.0] * positive + [-1.0] * negative + [0.0] * zero + [0.0])[
        torch.randperm(positive + negative + zero + 1, generator=generator(seed))
    ]
    weight = (signs * (1 + torch.randperm(len(signs), generator=generator(seed + 1))))[None]
    mask = torch.ones_like(weight, dtype=torch.bool)
    dropped = dropped_by_sign(weight, mask, percent / 100)
    num_dropped = percent * mask.numel() // 100
    num_zero = int((weight == 0).sum())
    assert int(dropped.sum()) == num_dropped
    assert int((dropped & (weight == 0)).sum()) == min(num_dropped, num_zero)
    share = max(num_dropped - num_zero, 0) / max(positive + negative, 1)
    for of_sign, num in ((weight > 0, positive), (weight < 0, negative)):
        gone, stay = weight[dropped & of_sign].abs(), weight[~dropped & of_sign].abs()
        # of p and q, D go: the share D/(p + q) of each, rounded one way or the other
        assert abs(len(gone) - share * num) <= 1 + 1e-9  # 1e-9: the share itself is rounded
        assert not len(gone) or not len(stay) or bool(gone.max() < stay.min())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_places_are_told_apart_in_every_precision(dtype: torch.dtype) -> None:
    """Every positive value of 16 bits, thousands of them: bfloat16 counts to 256 only, float16 to 2048."""
    bits = torch.arange(1, 0x7B00, dtype=torch.int16)
    half = torch.float16 if dtype not in (torch.float16, torch.bfloat16) else dtype
    weight = bits.view(half).to(dtype)[None]
    assert bool((weight.diff() > 0).all())
    score = sign_balanced(site(weight))
    assert bool((score.diff() > 0).all())


def test_more_weights_than_half_precision_has_numbers() -> None:
    """float16 ends at 65504."""
    score = sign_balanced(site(torch.ones(1, 70_000, dtype=torch.float16)))
    assert bool(score.isfinite().all())


# Random


def test_random_is_uniform() -> None:
    draws = random(site(torch.ones(100, 100)))
    assert float(draws.min()) >= 0
    assert float(draws.max()) < 1
    in_tenths = torch.histc(draws, bins=10, min=0, max=1)
    # 1000 of 10,000 in each tenth, with a standard deviation of 30; the seed is fixed
    assert in_tenths.tolist() == pytest.approx([1000] * 10, rel=0, abs=150)


def test_random_growth_is_fair_to_every_kernel() -> None:
    """1000 times one of five kernels: 200 each, with a standard deviation of 13; the steps, thus draws, are fixed."""
    grown = torch.zeros(1, 5)
    for step in range(1000):
        scores = random(site(torch.ones(1, 5, 2), step=step))
        grown += initial_mask(scores, granularity=Kernel(), num_target=1)[..., 0]
    assert grown[0].tolist() == pytest.approx([200] * 5, rel=0, abs=5 * 13)


def test_drawn_is_what_the_function_draws() -> None:
    """From the site's generator, on the CPU and in single precision whatever the defaults are."""
    expected = torch.randn(3, 4, generator=site_generator(0, 7, "encoder.fc"))
    there = site(torch.ones(3, 4, dtype=torch.float64))
    with torch.device("meta"):
        scores = Drawn(normal)(there)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, expected)


def test_drawn_and_random_draw_alike_from_the_same_distribution() -> None:
    uniform = Drawn(lambda shape, generator: torch.rand(shape, generator=generator))
    assert torch.equal(uniform(site(torch.ones(3, 4))), random(site(torch.ones(3, 4))))


@given(seeds, st.integers(0, 10**9), st.text("fc.:01", max_size=9))
def test_trap_9_the_same_site_draws_the_same(seed: int, step: int, name: str) -> None:
    first, second = (torch.rand(8, generator=site_generator(seed, step, name)) for _ in range(2))
    torch.rand(3)  # nor does the global generator matter
    assert torch.equal(first, second)
    assert torch.equal(first, torch.rand(8, generator=site_generator(seed, step, name)))


def test_trap_9_another_seed_step_or_name_draws_otherwise() -> None:
    """Also where their digits, run together, would read alike."""
    keys = list(itertools.product((0, 1, 11, -1), (0, 1, 11, 111), ("", "1", "fc", "fc.0", "1:fc", "é")))
    draws = {tuple(torch.rand(2, generator=site_generator(*key)).tolist()) for key in keys}
    assert len(draws) == len(keys)


def test_trap_9_draws_leave_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    random(site(torch.ones(5, 5)))
    assert torch.equal(torch.rand(4), expected)


def test_trap_9_known_seed() -> None:
    """Golden: another number here would change every seeded run of every user."""
    assert site_generator(0, 7, "fc").initial_seed() == 5_740_155_203_374_326


# What grown weights start from


@given(folds(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_grown_weights_start_at_zero_or_in_the_range_of_set(
    case: tuple[Granularity, torch.Size], dtype: torch.dtype
) -> None:
    there = site(torch.ones(case[1], dtype=dtype))
    assert not bool(zeros(there).any())
    values = uniform_fan_out(there)
    assert zeros(there).dtype == values.dtype == dtype
    assert values.shape == case[1]
    bound = torch.tensor((6 / case[1][0]) ** 0.5, dtype=torch.float32).to(dtype)
    assert bool((values.abs() <= bound).all())


def test_the_range_of_set_is_filled() -> None:
    values = uniform_fan_out(site(torch.ones(6, 1000)))  # ±√(6/6) = ±1
    assert float(values.min()) < -0.99
    assert float(values.max()) > 0.99
    assert abs(float(values.mean())) < 0.04  # 6000 draws of deviation 1/√3: five times 0.0075


# Fan-ins of 1, 2 and, counted as 1, 0; of two taps each
FAN_INS = torch.tensor([[[True, False]], [[True, True]], [[False, False]]])


def many(mask: Tensor) -> Site:
    """The same outputs ten thousand times; more inputs would add to the fan-in."""
    return site(torch.zeros(10_000 * len(mask), *mask.shape[1:]), mask.repeat(10_000, 1, 1))


def test_the_fan_in_is_that_of_the_new_mask() -> None:
    """U(±1), U(±1/√2), U(±1): the ranges are filled, each output's its own, active or not."""
    values = uniform_fan_in(many(FAN_INS)).view(-1, *FAN_INS.shape)
    for o, bound in ((0, 1.0), (1, 0.5**0.5), (2, 1.0)):
        assert bound * 0.999 < float(values[:, o].abs().max()) <= bound
        # 20,000 draws of deviation bound/√3: five times that over √20,000
        assert abs(float(values[:, o].mean())) < 5 * bound / 3**0.5 / 20_000**0.5


@pytest.mark.parametrize("gain", [1.0, 2**0.5, 0.0])
def test_the_variance_is_that_of_the_fan_in(gain: float) -> None:
    values = NormalFanIn(gain)(many(FAN_INS)).view(-1, *FAN_INS.shape)
    for o, fan_in in ((0, 1), (1, 2), (2, 1)):
        # the standard deviation of a standard deviation, of 20,000 draws, is 0.5 % of it
        assert float(values[:, o].std()) == pytest.approx(gain / fan_in**0.5, rel=5 * 0.005)


def test_the_gain_of_he_is_the_default() -> None:
    assert NormalFanIn() == NormalFanIn(math.sqrt(2))


@pytest.mark.parametrize("gain", [-1.0, math.inf, math.nan])
def test_gains_out_of_range_are_refused(gain: float) -> None:
    with pytest.raises(SettingError, match=r"^gain of NormalFanIn: expected a number, 0 or more"):
        NormalFanIn(gain)


@given(folds(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), seeds)
def test_grown_weights_have_the_weights_shape_and_precision(
    case: tuple[Granularity, torch.Size], dtype: torch.dtype, seed: int
) -> None:
    weight = torch.randn(case[1], generator=generator(seed)).to(dtype)
    for grown_init in (uniform_fan_in, NormalFanIn(), uniform_fan_out, zeros, stored):
        first, second = (grown_init(site(weight, seed=seed)) for _ in range(2))
        assert first.shape == case[1]
        assert first.dtype == dtype
        assert bool(first.isfinite().all())
        assert torch.equal(first, second)


def test_stored_weights_resume() -> None:
    weight = torch.tensor([[1.0, -2.0]])
    assert stored(site(weight, grid("x."))) is weight
