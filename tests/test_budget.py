"""What a weight keeps and grows: hand-worked budgets, and their execution with and without regrowth.

Shapes: G groups, U units per group.
"""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    distinct_scores,
    drawn,
    exact,
    folds,
    generator,
    grid,
    in_order_of_growth,
    percents,
    random_mask,
    seeds,
    units,
)
from torch import Tensor

from dstlib.masking import Account, Budget, Element, FanIn, Granularity, Kernel, MaskUpdate, exchange, spend
from dstlib.masking.update import unit_score


@pytest.mark.parametrize(
    ("active", "target", "fraction", "ceiling", "kept", "targets"),
    [
        ([10], 10, 0.0, None, [10], [10]),
        ([10], 10, 0.3, None, [7], [10]),
        ([10], 8, 0.3, None, [7], [8]),
        ([10], 8, 0.1, None, [8], [8]),  # 9 would be kept, but 8 is the target
        ([10], 12, 1.0, None, [0], [12]),
        ([0], 3, 0.5, None, [0], [3]),
        ([100], 100, 0.29, None, [71], [100]),  # 0.29 · 100 is 28.999999999999996
        # a lower ceiling: the surplus beyond 6 goes, and is grown anew
        ([10], 10, 0.0, 6, [6], [10]),
        ([10], 10, 0.5, 6, [5], [10]),
        ([3], 10, 0.0, 6, [3], [10]),
        ([10], 4, 0.0, 6, [4], [4]),  # never above the target
        # per group
        ([4, 0, 7], 5, 0.5, None, [2, 0, 4], [5, 5, 5]),
        ([4, 0, 7], [3, 1, 2], 0.5, None, [2, 0, 2], [3, 1, 2]),
        ([4, 0, 7], [3, 1, 2], 0.0, 1, [1, 0, 1], [3, 1, 2]),
    ],
)
def test_spending_by_hand(
    active: list[int],
    target: int | list[int],
    fraction: float,
    ceiling: int | None,
    kept: list[int],
    targets: list[int],
) -> None:
    num_target = target if isinstance(target, int) else torch.tensor(target)
    budget = spend(torch.tensor(active), num_target=num_target, drop_fraction=fraction, num_kept=ceiling)
    assert budget.num_kept_G.tolist() == kept
    assert budget.num_target_G.tolist() == targets


@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=5), st.integers(0, 10**7), percents, st.data())
def test_spending_laws(active: list[int], target: int, percent: int, data: st.DataObject) -> None:
    ceiling = data.draw(st.none() | st.integers(0, 10**7))
    budget = spend(torch.tensor(active), num_target=target, drop_fraction=percent / 100, num_kept=ceiling)
    limit = target if ceiling is None else min(target, ceiling)
    assert budget.num_kept_G.tolist() == [min(a - a * percent // 100, limit) for a in active]
    assert budget.num_target_G.tolist() == [target] * len(active)


@given(st.integers(0, 10**9), st.floats(0, 1))
def test_no_fraction_drops_more_than_there_is(active: int, fraction: float) -> None:
    kept = int(spend(torch.tensor([active]), num_target=active, drop_fraction=fraction).num_kept_G)
    assert 0 <= kept <= active
    # the nudge of 1e-12 may round a product up to the whole number that it lies that near to
    assert active - kept <= exact(fraction) * active * (1 + exact(2e-12))


def test_an_account_counts_its_units() -> None:
    score = torch.zeros(3, 4)
    account = Account(name="w", active_GU=score > 0, drop_GU=score, grow_GU=score, num_planned=6)
    assert account.num_units == 12
    assert not account.is_output


# Exchange


@dataclass(frozen=True)
class Problem:
    """A mask, its unit scores, and any budget that can be met."""

    granularity: Granularity
    mask: Tensor
    drop_GU: Tensor
    grow_GU: Tensor
    budget: Budget

    def solve(self, regrow: bool) -> MaskUpdate:
        return exchange(
            self.mask,
            self.drop_GU,
            self.grow_GU,
            granularity=self.granularity,
            budget=self.budget,
            regrow=regrow,
        )


@st.composite
def problems(draw: st.DrawFn, distinct: bool | None = None) -> Problem:
    granularity, shape = draw(folds())
    seed = draw(seeds)
    mask = random_mask(granularity, shape, seed, draw(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0])))
    active_GU = units(granularity, mask)
    if distinct if distinct is not None else draw(st.booleans()):
        scores = [unit_score(distinct_scores(granularity, shape, seed + i), shape, granularity) for i in (1, 2)]
    else:
        scores = [torch.randint(-1, 2, active_GU.shape, generator=generator(seed + i)).float() for i in (1, 2)]
    target_G = torch.randint(0, active_GU.shape[1] + 1, active_GU.shape[:1], generator=generator(seed + 3))
    most_G = torch.minimum(target_G, active_GU.sum(dim=1))
    kept_G = (torch.rand(most_G.shape, generator=generator(seed + 4)) * (most_G + 1)).long().clamp(max=most_G)
    return Problem(granularity, mask, *scores, Budget(kept_G, target_G))


def reference(problem: Problem, regrow: bool) -> Tensor:
    """The new mask (G, U): the kept, then as many others as the target asks for."""
    active_GU = units(problem.granularity, problem.mask)
    new_GU = torch.zeros_like(active_GU)
    for g, active in enumerate(active_GU.tolist()):
        drop, grow = problem.drop_GU[g].tolist(), problem.grow_GU[g].tolist()
        best_first = sorted((u for u, on in enumerate(active) if on), key=lambda u, s=drop: (-s[u], u))
        kept = best_first[: int(problem.budget.num_kept_G[g])]
        others = in_order_of_growth(active, kept, drop, grow, regrow=regrow)
        new_GU[g, kept + others[: int(problem.budget.num_target_G[g]) - len(kept)]] = True
    return new_GU


@pytest.mark.parametrize(
    ("kept", "target", "with_regrowth", "without"),
    [
        (2, 2, "x..x..", "x..x.."),
        (2, 4, "xx.xx.", "x..xxx"),  # the second has the best growth score, but was dropped just now
        (0, 2, ".x..x.", "....xx"),
        (2, 5, "xx.xxx", "xx.xxx"),  # two others are not enough: the better of the dropped comes back
        (0, 3, ".x..xx", ".x..xx"),
        (4, 6, "xxxxxx", "xxxxxx"),
        (0, 0, "......", "......"),
    ],
)
def test_regrowth_by_hand(kept: int, target: int, with_regrowth: str, without: str) -> None:
    mask = grid("xxxx..")
    drop, grow = torch.tensor([[9.0, 2, 1, 8, 0, 0]]), torch.tensor([[0.0, 9, 1, 0, 5, 4]])
    problem = Problem(Element(), mask, drop, grow, Budget(torch.tensor([kept]), torch.tensor([target])))
    assert drawn(problem.solve(regrow=True).mask) == with_regrowth
    assert drawn(problem.solve(regrow=False).mask) == without


def test_regrowth_is_barred_group_by_group() -> None:
    """The first output has two inactive inputs to grow, the second none: there what was dropped comes back."""
    mask, grow = grid("xx.. xxxx"), torch.tensor([[9.0, 8, 1, 2], [4, 3, 2, 1]])
    budget = Budget(torch.tensor([0, 2]), torch.tensor([2, 4]))
    update = exchange(mask, grow, grow, granularity=FanIn(), budget=budget, regrow=False)
    assert drawn(update.mask) == "..xx xxxx"
    assert (drawn(update.dropped), drawn(update.grown)) == ("xx.. ....", "..xx ....")


def test_kernels_are_barred_whole() -> None:
    mask = grid("xx xx ..")[None]
    score = torch.tensor([[3.0, 9.0, 1.0]])
    budget = Budget(torch.tensor([1]), torch.tensor([2]))
    barred = exchange(mask, -score, score, granularity=Kernel(), budget=budget, regrow=False)
    assert drawn(barred.mask[0]) == "xx .. xx"
    assert drawn(exchange(mask, -score, score, granularity=Kernel(), budget=budget).mask[0]) == "xx xx .."


@given(problems(), st.booleans())
def test_equals_plain_python(problem: Problem, regrow: bool) -> None:
    assert torch.equal(units(problem.granularity, problem.solve(regrow).mask), reference(problem, regrow))


@given(problems(), st.booleans())
def test_counts_are_exact_in_every_group(problem: Problem, regrow: bool) -> None:
    update = problem.solve(regrow)
    assert torch.equal(units(problem.granularity, update.mask).sum(dim=1), problem.budget.num_target_G)
    assert torch.equal(update.mask, (problem.mask & ~update.dropped) | update.grown)
    assert not bool((update.dropped & ~problem.mask).any() | (update.grown & problem.mask).any())


@given(problems(distinct=True))
def test_what_is_dropped_comes_back_only_if_it_must(problem: Problem) -> None:
    """Of the active units, all but the kept are dropped, except so many as the inactive are too few."""
    active_GU = units(problem.granularity, problem.mask)
    dropped_G = units(problem.granularity, problem.solve(regrow=False).dropped).sum(dim=1)
    num_grown_G = problem.budget.num_target_G - problem.budget.num_kept_G
    needed_G = (num_grown_G - (~active_GU).sum(dim=1)).clamp(min=0)
    assert torch.equal(dropped_G, active_GU.sum(dim=1) - problem.budget.num_kept_G - needed_G)


@given(problems())
def test_barring_regrowth_moves_no_fewer_units(problem: Problem) -> None:
    assert int(problem.solve(regrow=False).dropped.sum()) >= int(problem.solve(regrow=True).dropped.sum())


@given(problems(), st.booleans())
def test_where_nothing_is_dropped_the_bar_has_nothing_to_bar(problem: Problem, regrow: bool) -> None:
    num_active_G = units(problem.granularity, problem.mask).sum(dim=1)
    target_G = torch.maximum(problem.budget.num_target_G, num_active_G)
    growing = Problem(
        problem.granularity, problem.mask, problem.drop_GU, problem.grow_GU, Budget(num_active_G, target_G)
    )
    assert torch.equal(growing.solve(regrow).mask, growing.solve(not regrow).mask)
    assert not bool(growing.solve(regrow).dropped.any())
