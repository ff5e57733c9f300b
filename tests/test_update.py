"""Drop then grow: hand-worked updates, then laws for every granularity, then equality with plain Python.

Shapes: O out, I in, K kernel taps; G groups, U units per group, E elements per unit.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import (
    densities,
    distinct_scores,
    drawn,
    exact,
    folds,
    generator,
    grid,
    in_order_of_growth,
    initial_mask,
    percents,
    random_mask,
    seeds,
    tied_scores,
    units,
)
from torch import Tensor

from dstlib import ScoreError, SettingError
from dstlib.masking import (
    NM,
    Block,
    Channel,
    Element,
    FanIn,
    Granularity,
    Kernel,
    MaskUpdate,
    num_units,
    update_mask,
)
from dstlib.masking.update import count_outside, zero_outside_


@dataclass(frozen=True)
class Problem:
    """All that an update is given: the target per group (G), and the drop fraction in percent to count exactly."""

    granularity: Granularity
    mask: Tensor
    drop: Tensor
    grow: Tensor
    target: Tensor
    percent: int

    def solve(self) -> MaskUpdate:
        return update_mask(
            self.mask,
            self.drop,
            self.grow,
            granularity=self.granularity,
            num_target=self.target,
            drop_fraction=self.percent / 100,
        )

    @property
    def active(self) -> Tensor:
        """(G, U)."""
        return units(self.granularity, self.mask)

    @property
    def num_kept(self) -> Tensor:
        """(G): min(A - floor(f·A), target), in whole numbers."""
        num_active_G = self.active.sum(dim=1)
        return torch.minimum(num_active_G - num_active_G * self.percent // 100, self.target)


@st.composite
def problems(draw: st.DrawFn, distinct: bool | None = None) -> Problem:
    """Old masks of arbitrary counts, targets from none to all units, scores from all tied to tie-free."""
    granularity, shape = draw(folds())
    seed = draw(seeds)
    num_groups, num_units_, _ = granularity.fold(torch.zeros(shape)).shape
    if distinct if distinct is not None else draw(st.booleans()):
        drop, grow = (distinct_scores(granularity, shape, seed + i) for i in (10, 20))
    else:
        drop, grow = (tied_scores(shape, seed + i, draw(st.sampled_from([1, 2, 4]))) for i in (10, 20))
    mask = random_mask(granularity, shape, seed, draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])))
    target_G = torch.randint(0, num_units_ + 1, (num_groups,), generator=generator(seed + 30))
    if draw(st.booleans()):  # most often in practice: the count stays what it is
        target_G = units(granularity, mask).sum(dim=1)
    return Problem(granularity, mask, drop, grow, target_G, draw(percents))


def reference(problem: Problem) -> Tensor:
    """The new mask (G, U) by sorting lists; a unit's score is the sum over its elements, which orders alike."""
    drop_GU, grow_GU = (problem.granularity.fold(s).double().sum(dim=-1).tolist() for s in (problem.drop, problem.grow))
    new_GU = torch.zeros_like(problem.active)
    for g, active in enumerate(problem.active.tolist()):
        best_first = sorted((u for u, on in enumerate(active) if on), key=lambda u, g=g: (-drop_GU[g][u], u))
        kept = best_first[: int(problem.num_kept[g])]
        others = in_order_of_growth(active, kept, drop_GU[g], grow_GU[g])
        new_GU[g, kept + others[: int(problem.target[g]) - len(kept)]] = True
    return new_GU


# Tables. A weight of 2 outputs and 4 inputs, of which half is active:
#
#            |weight|          mask          |gradient|
#           4  1  2  0         xxx.          0  5  0  1
#           0  0  0  3         ...x          6  0  2  0
WEIGHT = torch.tensor([[4.0, -1.0, 2.0, 0.0], [0.0, 0.0, 0.0, -3.0]])
MASK = grid("xxx. ...x")
GRADIENT = torch.tensor([[0.0, 5.0, 0.0, 1.0], [6.0, 0.0, 2.0, 0.0]])


@pytest.mark.parametrize(
    ("granularity", "target", "fraction", "mask", "dropped", "grown"),
    [
        # constant number: floor(f·4) go, as many come
        (Element(), 4, 0.0, "xxx. ...x", ".... ....", ".... ...."),
        (Element(), 4, 0.24, "xxx. ...x", ".... ....", ".... ...."),  # floor(0.96) = 0
        (Element(), 4, 0.25, "x.x. x..x", ".x.. ....", ".... x..."),  # weight 1 goes, gradient 6 comes
        (Element(), 4, 0.5, "xx.. x..x", "..x. ....", ".... x..."),  # 1 and 2 go; 6 comes, and 5 is back at once
        (Element(), 4, 1.0, ".x.x x.x.", "x.x. ...x", "...x x.x."),  # everything anew: gradients 6, 5, 2, 1
        # a shrinking target, as in pruning: the lowest weights go
        (Element(), 3, 0.0, "x.x. ...x", ".x.. ....", ".... ...."),
        (Element(), 1, 0.0, "x... ....", ".xx. ...x", ".... ...."),
        (Element(), 0, 0.0, ".... ....", "xxx. ...x", ".... ...."),
        (Element(), 3, 0.5, "x... x..x", ".xx. ....", ".... x..."),  # both: two kept, one grown
        # a growing target
        (Element(), 5, 0.0, "xxx. x..x", ".... ....", ".... x..."),
        (Element(), 6, 0.25, "xxx. x.xx", ".... ....", ".... x.x."),  # 1 goes; 6, 5 (back) and 2 come
        (Element(), 8, 0.5, "xxxx xxxx", ".... ....", "...x xxx."),
        # per output: A = 3 and 1, floor(f·A) = 1 and 0
        (FanIn(), 2, 0.34, "x.x. x..x", ".x.. ....", ".... x..."),
        # one of two neighbours each: (4, 1), (2, 0), (0, 0), (0, 3)
        (NM(1, 2), 1, 0.0, "x.x. x..x", ".x.. ....", ".... x..."),
        (NM(1, 2), 1, 1.0, ".x.x x.x.", "x.x. ...x", "...x x.x."),
    ],
)
def test_small_updates(
    granularity: Granularity, target: int, fraction: float, mask: str, dropped: str, grown: str
) -> None:
    update = update_mask(
        MASK, WEIGHT.abs(), GRADIENT, granularity=granularity, num_target=target, drop_fraction=fraction
    )
    assert (drawn(update.mask), drawn(update.dropped), drawn(update.grown)) == (mask, dropped, grown)


def test_kernels_live_and_die_whole() -> None:
    """Four kernels of two taps, the third inactive; the mean over the taps decides, dead taps included."""
    weight = torch.tensor([[[2.0, -2.0], [3.0, 0.0], [0.0, 0.0], [1.0, 1.0]]])
    gradient = torch.tensor([[[0.0, 0.0], [0.0, 0.0], [4.0, 1.0], [3.0, 3.0]]])
    mask = grid("xx xx .. xx")[None]
    update = update_mask(mask, weight.abs(), gradient, granularity=Kernel(), num_target=3, drop_fraction=0.34)
    assert drawn(update.mask[0]) == "xx xx .. xx"  # L1 norms 4, 3, 2: the last goes, and 6 > 5 brings it back
    update = update_mask(mask, weight.abs(), gradient, granularity=Kernel(), num_target=3, drop_fraction=0.67)
    assert drawn(update.mask[0]) == "xx .. xx xx"  # only the first is kept, then 6 and 5 come
    assert drawn(update.dropped[0]) == ".. xx .. .."
    assert drawn(update.grown[0]) == ".. .. xx .."


def test_channels_and_blocks_live_and_die_whole() -> None:
    weight = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 2.0, 2.0]])
    gradient = torch.tensor([[0.0, 0.0, 5.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    ones = torch.ones(2, 4, dtype=torch.bool)
    update = update_mask(ones, weight, gradient, granularity=Channel(), num_target=1, drop_fraction=0.0)
    assert drawn(update.mask) == ".... xxxx"
    update = update_mask(ones, weight, gradient, granularity=Channel(), num_target=1, drop_fraction=1.0)
    assert drawn(update.mask) == "xxxx ...."
    pair = grid("xx.. ..xx")
    update = update_mask(pair, weight, gradient, granularity=Block(1, 2), num_target=2, drop_fraction=0.5)
    assert (drawn(update.dropped), drawn(update.grown)) == ("xx.. ....", "..xx ....")


# Laws


@given(problems())
def test_equals_plain_python(problem: Problem) -> None:
    assert torch.equal(units(problem.granularity, problem.solve().mask), reference(problem))


@given(problems())
def test_counts_are_exact_in_every_group(problem: Problem) -> None:
    """Units are all on or all off, too: ``units`` raises otherwise."""
    assert torch.equal(units(problem.granularity, problem.solve().mask).sum(dim=1), problem.target)


@given(problems())
def test_new_is_old_without_dropped_and_with_grown(problem: Problem) -> None:
    old, update = problem.mask, problem.solve()
    assert not bool((update.dropped & ~old).any())
    assert not bool((update.grown & old).any())
    assert torch.equal(update.mask, (old & ~update.dropped) | update.grown)


@given(problems())
def test_no_more_leave_than_the_fraction_and_the_target_ask_for(problem: Problem) -> None:
    dropped_G = units(problem.granularity, problem.solve().dropped).sum(dim=1)
    num_active_G = problem.active.sum(dim=1)
    assert bool((dropped_G <= num_active_G - problem.num_kept).all())  # fewer, where some grew back
    assert bool((dropped_G >= num_active_G - problem.target).all())


@given(problems(distinct=True))
def test_who_leaves_scored_below_all_that_are_kept(problem: Problem) -> None:
    """A unit that stays but scored low has been dropped and grown back: it is among the highest to grow."""
    fold, update = problem.granularity.fold, problem.solve()
    drop_GU, grow_GU = (fold(score).double().mean(dim=-1) for score in (problem.drop, problem.grow))
    active_GU, new_GU = problem.active, units(problem.granularity, update.mask)
    for g, num_kept in enumerate(problem.num_kept.tolist()):
        place_U = drop_GU[g].masked_fill(~active_GU[g], -torch.inf).argsort(descending=True).argsort()
        kept_U = active_GU[g] & (place_U < num_kept)
        assert bool(new_GU[g][kept_U].all())
        came_U, left_out_U = new_GU[g] & ~kept_U, ~new_GU[g]
        if came_U.any() and left_out_U.any():
            assert grow_GU[g][came_U].min() > grow_GU[g][left_out_U].max()


@given(problems())
def test_a_fixed_point(problem: Problem) -> None:
    """f = 0 at the present count changes nothing, whatever the scores."""
    update = update_mask(
        problem.mask,
        problem.drop,
        problem.grow,
        granularity=problem.granularity,
        num_target=problem.active.sum(dim=1),
        drop_fraction=0.0,
    )
    assert torch.equal(update.mask, problem.mask)
    assert not bool(update.dropped.any() | update.grown.any())


@given(problems(distinct=True))
def test_at_fraction_one_growth_alone_decides(problem: Problem) -> None:
    one = {"granularity": problem.granularity, "num_target": problem.target}
    update = update_mask(problem.mask, problem.drop, problem.grow, drop_fraction=1.0, **one)
    assert torch.equal(update.mask, initial_mask(problem.grow, **one))


@given(problems())
def test_shrinking_without_a_fraction_is_pruning(problem: Problem) -> None:
    """Nothing grows, and growth is never asked."""
    target_G = torch.minimum(problem.target, problem.active.sum(dim=1))
    setting = {"granularity": problem.granularity, "num_target": target_G, "drop_fraction": 0.0}
    update = update_mask(problem.mask, problem.drop, problem.grow, **setting)
    assert not bool(update.grown.any())
    assert torch.equal(update.mask, update_mask(problem.mask, problem.drop, -problem.grow, **setting).mask)


@given(problems(distinct=True), seeds)
def test_renumbering_the_units_renumbers_the_update(problem: Problem, seed: int) -> None:
    granularity, shape = problem.granularity, problem.mask.shape
    order = torch.randperm(problem.active.shape[1], generator=generator(seed))

    def renumber(x: Tensor) -> Tensor:
        return granularity.unfold(granularity.fold(x)[:, order], shape)

    other = Problem(
        granularity,
        *(renumber(x) for x in (problem.mask, problem.drop, problem.grow)),
        target=problem.target,
        percent=problem.percent,
    )
    assert torch.equal(other.solve().mask, renumber(problem.solve().mask))


@given(problems(), st.integers(-30, 30), st.integers(-30, 30))
def test_only_the_order_of_scores_matters(problem: Problem, drop_exponent: int, grow_exponent: int) -> None:
    """Powers of two, as these scale without rounding."""
    scaled = update_mask(
        problem.mask,
        problem.drop * 2.0**drop_exponent,
        problem.grow * 2.0**grow_exponent,
        granularity=problem.granularity,
        num_target=problem.target,
        drop_fraction=problem.percent / 100,
    )
    assert torch.equal(scaled.mask, problem.solve().mask)


@given(problems())
def test_asked_twice_it_answers_the_same_and_changes_nothing_given(problem: Problem) -> None:
    given_tensors = (problem.mask, problem.drop, problem.grow, problem.target)
    before = [x.clone() for x in given_tensors]
    assert torch.equal(problem.solve().mask, problem.solve().mask)
    assert all(torch.equal(x, y) for x, y in zip(given_tensors, before, strict=True))


@given(problems(), st.sampled_from([torch.float16, torch.bfloat16, torch.float64]))
def test_precision_does_not_matter_where_scores_are_exact(problem: Problem, dtype: torch.dtype) -> None:
    """Small whole numbers are, in every type; their means are taken in single precision at least."""
    assume(bool((problem.drop.to(dtype) == problem.drop).all() and (problem.grow.to(dtype) == problem.grow).all()))
    update = update_mask(
        problem.mask,
        problem.drop.to(dtype),
        problem.grow.to(dtype),
        granularity=problem.granularity,
        num_target=problem.target,
        drop_fraction=problem.percent / 100,
    )
    assert torch.equal(update.mask, problem.solve().mask)


def test_means_of_half_precision_scores_are_not_taken_in_half_precision() -> None:
    """In bfloat16 the sums 512 and 513 are equal, and in float16 40 · 60000 is infinite."""
    score = torch.ones(2, 1, 512, dtype=torch.bfloat16)
    score[1, 0, 0] = 2
    assert drawn(initial_mask(score, granularity=Kernel(), num_target=1)[..., 0]) == ". x"
    score = torch.full((2, 1, 40), 60000.0, dtype=torch.float16)
    score[0, 0, 0] = 0
    assert drawn(initial_mask(score, granularity=Kernel(), num_target=1)[..., 0]) == ". x"


def test_double_precision_scores_are_not_rounded() -> None:
    score = 1 + torch.tensor([[0.0, 2e-12, 1e-12]], dtype=torch.float64)
    assert drawn(initial_mask(score, granularity=Element(), num_target=1)) == ".x."


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 9, 25, 27, 64, 125, 1000]), seeds)
def test_equal_kernels_tie_whatever_their_size(out: int, into: int, taps: int, seed: int) -> None:
    """The mean must not depend on where in memory a unit lies."""
    score = torch.rand(taps, generator=generator(seed)).expand(out, into, -1).contiguous()
    for num in range(1, out * into + 1):
        mask = initial_mask(score, granularity=Kernel(), num_target=num)
        assert mask[..., 0].flatten().tolist() == [True] * num + [False] * (out * into - num)


@given(problems())
def test_masks_own_their_memory(problem: Problem) -> None:
    """Whoever edits an entry of a result edits this entry only."""
    for mask in (problem.solve().mask, initial_mask(problem.drop, granularity=problem.granularity, num_target=0)):
        before, first = mask.clone(), (0,) * mask.ndim
        mask[first] = ~mask[first]
        assert int((mask != before).sum()) == 1


# Traps


@given(st.integers(1, 60), st.integers(0, 60), percents)
def test_trap_1_ties_do_not_change_the_density(num_total: int, num_active: int, percent: int) -> None:
    """All scores equal: a threshold would keep all or none."""
    assume(num_active <= num_total)
    mask = torch.arange(num_total)[None] < num_active
    ones = torch.ones(1, num_total)
    update = update_mask(mask, ones, ones, granularity=Element(), num_target=num_active, drop_fraction=percent / 100)
    assert int(update.mask.sum()) == num_active


def test_trap_1_at_the_size_of_a_real_layer() -> None:
    mask = torch.zeros(512, 512, 3, 3, dtype=torch.bool)
    mask.view(-1)[::10] = True
    num = int(mask.sum())
    zero = torch.zeros(mask.shape)
    update = update_mask(mask, zero, zero, granularity=Element(), num_target=num, drop_fraction=0.3)
    assert int(update.mask.sum()) == num
    assert int(update.dropped.sum()) <= math.floor(0.3 * num)


def test_trap_2_a_live_zero_is_alive() -> None:
    """Active weights of value 0 count as active, and are the first to be dropped but not dead beforehand."""
    weight = torch.tensor([[0.0, 2.0, 0.0, 0.0, 1.0]])
    mask = grid("xx..x")
    setting = {"granularity": Element(), "num_target": 3}
    still = update_mask(mask, weight.abs(), weight.abs(), drop_fraction=0.0, **setting)
    assert drawn(still.mask) == "xx..x"
    gradient = torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0]])
    moved = update_mask(mask, weight.abs(), gradient, drop_fraction=0.34, **setting)
    assert (drawn(moved.mask), drawn(moved.dropped), drawn(moved.grown)) == (".x.xx", "x....", "...x.")


# Counts


@pytest.mark.parametrize(
    ("num_total", "density", "num"),
    [
        (10, 0.3, 3),
        (10, 0.25, 3),  # halves go up
        (10, 0.35, 4),  # 0.35 · 10 is 3.5, though 0.35 lies below itself in binary
        (10, 0.24, 2),
        (10, 1 - 0.85, 2),  # 1.5000000000000002
        (10, 1 - 0.95, 1),
        (15, 1 - 0.9, 2),  # 1.4999999999999996
        (100, 0.29, 29),
        (10, 0.0, 1),  # never none
        (10, 0.001, 1),
        (1, 0.001, 1),
        (1, 1.0, 1),
        (10, 1.0, 10),
        (4608, 0.1, 461),
        (25_502_912, 0.1, 2_550_291),
    ],
)
def test_number_of_units(num_total: int, density: float, num: int) -> None:
    assert num_units(num_total, density) == num


@given(st.integers(1, 10**8), densities)
def test_number_of_units_is_the_nearest(num_total: int, density: float) -> None:
    num = num_units(num_total, density)
    assert 1 <= num <= num_total
    # the products are nudged up by 1e-12 of themselves, and rounded by 1e-16 (test of the nudge: 0.29 below)
    assert abs(num - num_total * exact(density)) <= 0.5 + 2e-12 * num_total or num == 1


@given(st.integers(1, 10**8), st.integers(1, 10**8))
def test_a_density_of_whole_units_gives_them_back(a: int, b: int) -> None:
    num, num_total = sorted((a, b))
    assert num_units(num_total, num / num_total) == num


@given(st.integers(1, 10**6), st.integers(1, 999))
def test_sparsity_and_density_give_one_count(num_total: int, thousandths: int) -> None:
    """1 - 0.9 is not 0.1, but must count alike, halves included."""
    num = max((2 * num_total * thousandths + 1000) // 2000, 1)
    assert num_units(num_total, thousandths / 1000) == num
    assert num_units(num_total, 1 - (1 - thousandths / 1000)) == num
    assert num_units(num_total, 1 - (1000 - thousandths) / 1000) == num


@pytest.mark.parametrize(("percent", "num_active"), [(29, 100), (57, 100), (58, 100), (29, 200), (7, 100), (14, 50)])
def test_a_decimal_fraction_drops_what_its_digits_say(percent: int, num_active: int) -> None:
    """0.29 · 100 is 28.999999999999996 in floating point."""
    mask = torch.arange(1000)[None] < num_active
    score = torch.arange(1000.0)[None]  # what grows lies beyond, so all that is dropped stays away
    update = update_mask(mask, score, score, granularity=Element(), num_target=num_active, drop_fraction=percent / 100)
    assert int(update.dropped.sum()) == int(update.grown.sum()) == percent * num_active // 100


@given(st.integers(1, 3000), st.integers(0, 1000))
def test_drop_counts_are_floors(num_active: int, thousandths: int) -> None:
    mask = torch.arange(2 * num_active)[None] < num_active
    score = torch.arange(2.0 * num_active)[None]  # as above, nothing that is dropped comes back
    setting = {"granularity": Element(), "num_target": num_active, "drop_fraction": thousandths / 1000}
    assert int(update_mask(mask, score, score, **setting).dropped.sum()) == num_active * thousandths // 1000


def test_targets_may_differ_between_groups() -> None:
    mask, score = grid("xxx. ...x xxxx"), torch.tensor([[4.0, 3, 2, 1]] * 3)
    target_G = torch.tensor([1, 4, 3])
    update = update_mask(mask, score, score, granularity=FanIn(), num_target=target_G, drop_fraction=0.0)
    assert drawn(update.mask) == "x... xxxx xxx."


# The first mask


@pytest.mark.parametrize(
    ("granularity", "target", "mask"),
    [
        (Element(), 3, "...x xx.."),
        (Channel(), 1, ".... xxxx"),
        (Block(2, 2), 1, "xx.. xx.."),
        (FanIn(), 2, "..xx xx.."),
        (NM(1, 2), 1, ".x.x x..x"),
    ],
)
def test_first_mask(granularity: Granularity, target: int, mask: str) -> None:
    score = torch.tensor([[0.0, 1.0, 2.0, 4.0], [6.0, 5.0, 0.0, 3.0]])
    assert drawn(initial_mask(score, granularity=granularity, num_target=target)) == mask


@given(problems())
def test_first_mask_takes_the_highest(problem: Problem) -> None:
    mask = initial_mask(problem.grow, granularity=problem.granularity, num_target=problem.target)
    nothing = Problem(
        problem.granularity, torch.zeros_like(problem.mask), problem.drop, problem.grow, problem.target, 0
    )
    assert torch.equal(units(problem.granularity, mask), reference(nothing))


# What is refused


def _update(**changes: object) -> MaskUpdate:
    setting = {
        "mask": MASK,
        "drop_score": WEIGHT.abs(),
        "grow_score": GRADIENT,
        "granularity": Element(),
        "num_target": 4,
        "drop_fraction": 0.5,
        **changes,
    }
    return update_mask(**setting)  # type: ignore[arg-type]


@pytest.mark.parametrize("fraction", [-0.1, 1.0001, math.nan, math.inf])
def test_a_fraction_outside_the_unit_interval_is_refused(fraction: float) -> None:
    with pytest.raises(SettingError, match=rf"drop fraction .* in \[0, 1\], got {fraction}"):
        _update(drop_fraction=fraction)


@pytest.mark.parametrize("which", ["drop_score", "grow_score"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(which: str, bad: float) -> None:
    score = torch.ones(2, 4)
    score[1, 1] = bad
    with pytest.raises(ScoreError, match="finite numbers, got 1 that"):
        _update(**{which: score})


@pytest.mark.parametrize("which", ["drop_score", "grow_score"])
@pytest.mark.parametrize("shape", [(2,), (4, 2), (2, 4, 1), (1, 4)])
def test_scores_of_another_shape_are_refused(which: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ScoreError, match=r"expected a tensor of shape \(2, 4\), got"):
        _update(**{which: torch.ones(shape)})


def test_a_mean_that_cannot_be_told_never_changes_the_count() -> None:
    """Finite scores may have a mean that is none: half of these lanes add up to +inf and half to -inf."""
    score = torch.full((2, 2, 4, 4), 3e38)
    score[..., 1::2] = -3e38
    try:
        mask = initial_mask(score, granularity=Kernel(), num_target=2)
    except ScoreError:
        return
    assert int(units(Kernel(), mask).sum()) == 2


def test_more_units_than_there_are_is_our_own_bug() -> None:
    with pytest.raises(AssertionError):
        _update(num_target=9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@given(seed=seeds, percent=percents)
def test_what_lies_outside_is_counted_and_nothing_changes(dtype: torch.dtype, seed: int, percent: int) -> None:
    drawn_from = generator(seed)
    x = torch.randn(5, 7, 3, generator=drawn_from).to(dtype).transpose(0, 1)  # not contiguous, as a view may be
    mask = torch.rand(x.shape, generator=drawn_from) < percent / 100
    for value in (0.0, -0.0, math.nan, math.inf):
        x[torch.rand(x.shape, generator=drawn_from) < 0.2] = value
    before = x.clone().nan_to_num(7.0), mask.clone()
    outside = [value for value, active in zip(x.flatten().tolist(), mask.flatten().tolist(), strict=True) if not active]
    assert count_outside(x, mask) == sum(value != 0 for value in outside)
    assert torch.equal(x.nan_to_num(7.0), before[0])
    assert torch.equal(mask, before[1])
    assert count_outside(zero_outside_(x.contiguous(), mask), mask) == 0
