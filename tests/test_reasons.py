"""Growth without a reason: where growth scores tie for the lowest, what is active stays where it is.

Shapes: G groups, U units per group.
"""

import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import assert_zero_outside
from strategies import distinct_scores, drawn, folds, generator, grid, percents, random_mask, seeds, tied_scores, units
from torch import Tensor, nn

import dstlib
from dstlib.masking import (
    NM,
    Block,
    Budget,
    Channel,
    Element,
    FanIn,
    Granularity,
    Kernel,
    MaskUpdate,
    Site,
    exchange,
    random,
    spend,
    unit_score,
)
from dstlib.schedules import Constant


@dataclass(frozen=True)
class Problem:
    """A mask with its unit scores, what is kept and what is to be active then."""

    granularity: Granularity
    mask: Tensor
    drop_GU: Tensor
    grow_GU: Tensor
    budget: Budget
    regrow: bool = True

    @property
    def active(self) -> Tensor:
        """(G, U)."""
        return units(self.granularity, self.mask)

    def solve(self) -> MaskUpdate:
        return exchange(
            self.mask,
            self.drop_GU,
            self.grow_GU,
            granularity=self.granularity,
            budget=self.budget,
            regrow=self.regrow,
        )


@st.composite
def problems(draw: st.DrawFn, grow: str = "tied") -> Problem:
    """Masks of any counts, targets that stay, fall or rise, growth scores that tie or are ``equal``."""
    granularity, shape = draw(folds())
    seed = draw(seeds)
    mask = random_mask(granularity, shape, seed, draw(st.sampled_from([0.1, 0.5, 0.9, 1.0])))
    drop = unit_score(distinct_scores(granularity, shape, seed + 1), shape, granularity)
    score = tied_scores(shape, seed + 2, draw(st.sampled_from([2, 3, 9])))
    if grow == "equal":
        score = torch.full(shape, draw(st.sampled_from([0.0, -1.5, 7.0])))
    active_GU = units(granularity, mask)
    target_G = active_GU.sum(dim=1)
    if not draw(st.booleans()):
        target_G = torch.randint(0, active_GU.shape[1] + 1, target_G.shape, generator=generator(seed + 3))
    budget = spend(active_GU.sum(dim=1), num_target=target_G, drop_fraction=draw(percents) / 100)
    return Problem(granularity, mask, drop, unit_score(score, shape, granularity), budget, draw(st.booleans()))


@pytest.mark.parametrize(
    ("grow", "target", "with_regrowth", "without", "num_idle"),
    [
        # xxxx.... with drop scores 9 2 1 8: two are kept, 9 and 8
        ([0, 0, 0, 0, 0, 0, 0, 0], 4, "xxxx....", "xxxx....", 1),  # no gradient
        ([3, 3, 3, 3, 3, 3, 3, 3], 4, "xxxx....", "xxxx....", 1),
        ([9, 0, 0, 9, 0, 0, 0, 0], 4, "xxxx....", "xxxx....", 1),  # what is kept is no candidate
        ([0, 0, 0, 0, 0, 0, 0, 5], 4, "xx.x...x", "xx.x...x", 0),  # one has a reason; the better of the dropped stays
        ([0, 0, 0, 0, 0, 7, 0, 5], 4, "x..x.x.x", "x..x.x.x", 0),
        ([0, 0, 1, 0, 0, 0, 0, 5], 4, "x.xx...x", "x.xx...x", 0),  # growth decides first
        ([0, 1, 1, 0, 0, 0, 0, 0], 4, "xxxx....", "xxxx....", 0),
        ([0, 0, 0, 0, 0, 0, 0, -1], 4, "xxxx....", "x..xxx..", 0),  # all but the last score more than the last
        ([0, 0, 0, 0, 0, 0, 0, 0], 3, "xx.x....", "xx.x....", 1),  # a falling target takes the worst
        ([0, 0, 0, 0, 0, 0, 0, 0], 2, "x..x....", "x..x....", 0),  # no exchange was asked for
        ([0, 0, 0, 0, 0, 0, 0, 0], 6, "xxxxxx..", "xxxxxx..", 1),  # a rising target is met
        ([0, 0, 0, 0, 0, 0, 0, 0], 8, "xxxxxxxx", "xxxxxxxx", 0),
    ],
)
def test_by_hand(grow: list[float], target: int, with_regrowth: str, without: str, num_idle: int) -> None:
    drop_GU = torch.tensor([[9.0, 2, 1, 8, 0, 0, 0, 0]])
    budget = Budget(torch.tensor([2]), torch.tensor([target]))
    problem = Problem(Element(), grid("xxxx...."), drop_GU, torch.tensor([grow]).float(), budget)
    for regrow, expected in ((True, with_regrowth), (False, without)):
        update = replace(problem, regrow=regrow).solve()
        assert (drawn(update.mask), update.num_idle) == (expected, num_idle)


def test_groups_stand_still_one_by_one() -> None:
    grow_GU = torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 1], [2, 2, 2, 2]])
    drop_GU = torch.tensor([[4.0, 3, 2, 1]]).expand(3, -1)
    budget = Budget(torch.tensor([1, 1, 1]), torch.tensor([2, 2, 2]))
    update = exchange(grid("xx.. xx.. xx.."), drop_GU, grow_GU, granularity=FanIn(), budget=budget)
    assert drawn(update.mask) == "xx.. x..x xx.."
    assert update.idle_G.tolist() == [True, False, True]
    assert repr(update) == "MaskUpdate(6 of 12 active, 1 dropped, 1 grown, 2 groups without a reason to grow)"


@given(problems("equal"))
def test_where_all_growth_scores_are_equal_nothing_is_exchanged(problem: Problem) -> None:
    """What is active stays, the best by the drop score as far as the target goes; all of it where the target rises."""
    update, active_GU, target_G = problem.solve(), problem.active, problem.budget.num_target_G
    new_GU = units(problem.granularity, update.mask)
    assert torch.equal(new_GU.sum(dim=1), target_G)
    num_active_G = active_GU.sum(dim=1)
    place_GU = problem.drop_GU.masked_fill(~active_GU, -torch.inf).argsort(dim=1, descending=True).argsort(dim=1)
    stays_GU = active_GU & (place_GU < target_G[:, None])
    assert torch.equal(new_GU & active_GU, stays_GU)
    is_asked_G = (problem.budget.num_kept_G < torch.minimum(num_active_G, target_G)) & (target_G < active_GU.shape[1])
    assert torch.equal(update.idle_G, is_asked_G)


@given(problems())
def test_nobody_goes_for_one_without_a_reason(problem: Problem) -> None:
    """In a group where one that ties for the lowest growth score has grown, nobody was dropped."""
    update, active_GU = problem.solve(), problem.active
    kept_GU = torch.zeros_like(active_GU)
    for g, num in enumerate(problem.budget.num_kept_G.tolist()):
        best = problem.drop_GU[g].masked_fill(~active_GU[g], -torch.inf).argsort(descending=True)
        kept_GU[g, best[:num]] = True
    dropped_GU, grown_GU = (units(problem.granularity, x) for x in (update.dropped, update.grown))
    lowest_GU = problem.grow_GU == problem.grow_GU.masked_fill(kept_GU, torch.inf).amin(dim=1, keepdim=True)
    tied_GU = lowest_GU & ~kept_GU & ((lowest_GU & ~kept_GU).sum(dim=1, keepdim=True) > 1)
    has_grown_G = (grown_GU & tied_GU).any(dim=1)
    assert not bool(dropped_GU[has_grown_G].any())
    is_falling_G = problem.budget.num_target_G < active_GU.sum(dim=1)
    assert not bool((dropped_GU.any(dim=1) & update.idle_G & ~is_falling_G).any())


@given(problems(), seeds)
def test_where_growth_scores_differ_the_highest_grow(problem: Problem, seed: int) -> None:
    """A group's scores are distinct: kept, then the best of the others, whatever else there is to say of ties."""
    score = distinct_scores(problem.granularity, problem.mask.shape, seed)
    grow_GU = unit_score(score, problem.mask.shape, problem.granularity)
    update = replace(problem, grow_GU=grow_GU, regrow=True).solve()
    new_GU, active_GU = units(problem.granularity, update.mask), problem.active
    for g, (num_kept, num_target) in enumerate(zip(*_numbers(problem.budget), strict=True)):
        kept = problem.drop_GU[g].masked_fill(~active_GU[g], -torch.inf).argsort(descending=True)[:num_kept]
        expected = torch.zeros_like(active_GU[g])
        expected[kept] = True
        grown = grow_GU[g].masked_fill(expected, -torch.inf).argsort(descending=True)[: num_target - num_kept]
        expected[grown] = True
        assert torch.equal(new_GU[g], expected)
    assert update.num_idle == 0


def _numbers(budget: Budget) -> tuple[list[int], list[int]]:
    return budget.num_kept_G.tolist(), budget.num_target_G.tolist()


# In training


class Experts(nn.Module):
    """Four experts of which some are reached, (B, 8) → (B, 8), as one weight or one each."""

    def __init__(self, joint: bool, reached: tuple[int, ...] = (2,)) -> None:
        super().__init__()
        self.reached = reached
        self.joint = nn.Parameter(torch.randn(4, 8, 8)) if joint else None
        self.apart = None if joint else nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.cat([w.weight[None] for w in self.apart]) if self.joint is None else self.joint
        each = torch.einsum("bi, eoi -> beo", x, weight)
        return sum((1 + i) * each[:, i] for i in self.reached)


GRAINS = [Element(), Kernel(), Channel(), Block(2, 4), FanIn(), NM(2, 4)]


@pytest.mark.parametrize("regrow", [True, False])
@pytest.mark.parametrize("granularity", GRAINS, ids=str)
def test_experts_that_no_token_reaches_stay_as_they_are(granularity: Granularity, regrow: bool) -> None:
    """Their gradient is zero; the one that is reached goes on."""
    torch.manual_seed(0)
    model = Experts(joint=False)
    method = replace(
        dstlib.RIGL, granularity=granularity, interval=2, regrow=regrow, drop_fraction=Constant(0.5),
        distribution=dstlib.uniform,
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"sparsity": 0.5, "method": method, "total_steps": 40}
    sparsifier = dstlib.sparsify(model, optimizer, **options, keep_neurons=())  # a bare output of a head is filled
    before = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    seen: dict[str, list[int]] = {name: [] for name in before}
    grown = dict.fromkeys(before, 0)

    def observe(site: Site, update: MaskUpdate) -> None:
        seen[site.name].append(update.num_idle)
        grown[site.name] += int(update.grown.sum())

    sparsifier.observers.append(observe)
    _train(model, optimizer, 20)
    num_groups = granularity.fold(before["apart.0.weight"]).shape[0]
    for name, mask in before.items():
        if name != "apart.2.weight":
            assert torch.equal(sparsifier.masks[name], mask)
            assert seen[name] == [num_groups] * 10
    assert grown["apart.2.weight"] > 0
    assert sum(seen["apart.2.weight"]) == 0


@pytest.mark.parametrize(("granularity", "num_fills"), [(Channel(), 0), (Block(2, 4), 1)], ids=str)
def test_experts_are_told_of_as_filled_only_where_a_unit_moves(granularity: Granularity, num_fills: int) -> None:
    """All are a head. Half the rows cannot fill the others; blocks can, once, and then have no reason to move."""
    torch.manual_seed(0)
    model = Experts(joint=False)
    method = replace(
        dstlib.RIGL, granularity=granularity, interval=2, drop_fraction=Constant(0.5), distribution=dstlib.uniform
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.5, method=method, total_steps=40)
    name = "apart.0.weight"  # that no token reaches
    assert not bool(sparsifier.masks[name].any(dim=1).all())  # there is something to fill
    updates: list[MaskUpdate] = []
    sparsifier.observers.append(lambda site, update: updates.append(update) if site.name == name else None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Fewer active units than outputs")
        _train(model, optimizer, 20)
    assert bool(sparsifier.masks[name].any(dim=1).all()) == (num_fills > 0)
    moved = [update for update in updates if bool(update.grown.any())]
    assert len(moved) == num_fills
    assert len(updates) == 10 + num_fills
    assert sum(update.num_idle for update in updates) == 10  # each update finds no reason, the filling has its own


def test_experts_in_one_group_give_what_the_one_that_is_reached_has_room_for() -> None:
    """They compete there, and lose; but nothing moves to the lowest indices once that expert is full."""
    torch.manual_seed(0)
    model = Experts(joint=True)
    method = replace(dstlib.RIGL, interval=2, drop_fraction=Constant(0.5), distribution=dstlib.uniform)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = dstlib.sparsify(
        model, optimizer, sparsity=0.5, method=method, total_steps=40, include="joint", split={"joint": 1}
    )
    before = sparsifier.masks["joint"].clone()
    _train(model, optimizer, 20)
    mask = sparsifier.masks["joint"]
    assert bool(mask[2].all())
    assert not bool((mask & ~before)[[0, 1, 3]].any())
    assert int(mask.sum()) == int(before.sum())
    assert_zero_outside(model, sparsifier.masks)


def test_chance_is_a_reason() -> None:
    torch.manual_seed(0)
    model = Experts(joint=False)
    method = replace(dstlib.RIGL, grow=random, interval=2, drop_fraction=Constant(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.5, method=method, total_steps=40)
    before = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    _train(model, optimizer, 20)
    assert not any(torch.equal(mask, before[name]) for name, mask in sparsifier.masks.items())


@pytest.mark.parametrize("name", ["snfs", "granet", "granet_sparse"])
def test_experts_that_no_token_reaches_keep_their_budget(name: str) -> None:
    """Of a total that stays they keep all their units, of one that falls their share, rounded at each update."""
    torch.manual_seed(0)
    model = Experts(joint=False, reached=(1, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, weight_decay=0.05)
    method = replace(dstlib.METHODS[name], interval=2, distribution=dstlib.uniform)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.75, method=method, total_steps=40)
    seen: list[list[int]] = []
    for step in range(40):
        _train(model, optimizer, 1, step)
        seen.append([int(mask.sum()) for mask in sparsifier.masks.values()])
        assert_zero_outside(model, sparsifier.masks, optimizer)
    for counts in seen:
        assert all(abs(counts[i] - sum(counts) / 4) <= (0 if name == "snfs" else 2) for i in (0, 3))
    assert sum(seen[-1]) == 64
    assert len({tuple(counts[1:3]) for counts in seen}) > 1, "else nothing moves between those that are reached"


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        optimizer.zero_grad()
        x = torch.randn(16, 8, generator=generator(step))
        (model(x) - x).square().mean().backward()
        optimizer.step()
