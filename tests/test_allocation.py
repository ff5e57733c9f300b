"""Allocators: hand-worked shares, plain-Python oracles of each, and the laws that all of them keep.

Shapes: O out, I in, K kernel taps; G groups, U units per group.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import folds, generator, kernel_taps, percents, seeds
from test_counts import split
from torch import Tensor

from dstlib.errors import SettingError
from dstlib.masking import (
    NM,
    Account,
    AdaptiveThreshold,
    Allocation,
    Allocator,
    Block,
    Budget,
    Channel,
    Element,
    FanIn,
    GlobalRank,
    Kernel,
    NeuronAblation,
    Terms,
    exchange,
    global_units,
    lamp,
    momentum_share,
    share_out,
    unit_score,
)
from dstlib.masking.allocation import lamp_scores

may_empty = GlobalRank(may_empty=True)
SPARING: dict[str, Allocator] = {
    "global": global_units,
    "lamp": lamp,
    "momentum": momentum_share,
    "threshold": AdaptiveThreshold(),
}
EVERY = {**SPARING, "may_empty": may_empty, "lamp_may_empty": GlobalRank(lamp_scores, may_empty=True)}
every = pytest.mark.parametrize("allocate", EVERY.values(), ids=EVERY)
any_allocator = st.sampled_from(list(EVERY.values()))
never_empty = pytest.mark.parametrize("allocate", SPARING.values(), ids=SPARING)


def account(name: str, drop: Sequence[float | None], grow: Sequence[float] | None = None, **rest: object) -> Account:
    """One group; None where a unit is not active."""
    active = torch.tensor([[x is not None for x in drop]])
    drop_GU = torch.tensor([[0.0 if x is None else x for x in drop]])
    grow_GU = drop_GU if grow is None else torch.tensor([grow])
    return Account(name=name, active_GU=active, drop_GU=drop_GU, grow_GU=grow_GU, num_planned=int(active.sum()), **rest)


def kept(allocation: Allocation) -> list[list[int]]:
    return [budget.num_kept_G.tolist() for budget in allocation.budgets]


def targets(allocation: Allocation) -> list[list[int]]:
    return [budget.num_target_G.tolist() for budget in allocation.budgets]


def num_active(accounts: Sequence[Account]) -> int:
    return sum(int(a.active_GU.sum()) for a in accounts)


def carried_out(a: Account, budget: Budget) -> Tensor:
    """The active units (G, U) after the update. A group of the account is an output of a weight."""
    update = exchange(a.active_GU, a.drop_GU, a.grow_GU, granularity=FanIn(), budget=budget)
    assert torch.equal(update.mask.sum(dim=1), budget.num_target_G)
    return update.mask


def evenly_active(num_groups: int, num_units: int, per_group: int, seed: int) -> Tensor:
    order_GU = torch.rand(num_groups, num_units, generator=generator(seed)).argsort(dim=1).argsort(dim=1)
    return order_GU < per_group


def scores_like(active_GU: Tensor, kind: str, seed: int, offset: int = 0) -> Tensor:
    """(G, U) scores. Distinct ones are whole numbers that differ by 100 at least, and within ``offset`` < 100."""
    if kind == "distinct":
        order = torch.randperm(active_GU.numel(), generator=generator(seed)) + 1
        return (100.0 * order + offset).view(active_GU.shape)
    low, high = {"zero": (0, 1), "tied": (0, 3), "negative": (-5, 0), "signed": (-5, 5)}[kind]
    return torch.randint(low, high, active_GU.shape, generator=generator(seed)).float()


KINDS = ["distinct", "zero", "tied", "negative", "signed"]
GRAINS = {"Element": Element(), "Kernel": Kernel(), "Channel": Channel(), "Block": Block(2, 3), "FanIn": FanIn()}


@st.composite
def models(draw: st.DrawFn, granularities: Sequence[str] = (), kinds: Sequence[str] = KINDS) -> list[Account]:
    """Accounts of one granularity: each weight of its own shape, count, dtype and scores."""
    name = draw(st.sampled_from(granularities or list(GRAINS)))
    kind = draw(st.sampled_from(kinds))
    found: list[Account] = []
    num_accounts = draw(st.integers(1, 5))
    for i in range(num_accounts):
        out, into, taps = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(kernel_taps)
        grain = GRAINS[name]
        shape = torch.Size((2 * out, 3 * into, *taps) if name == "Block" else (out, into, *taps))
        num_groups, num_units, _ = grain.fold(torch.zeros(shape)).shape
        active_GU = evenly_active(num_groups, num_units, draw(st.integers(1, num_units)), draw(seeds))
        drop_GU, grow_GU = (scores_like(active_GU, kind, draw(seeds), i) for _ in range(2))
        dtype = draw(st.sampled_from([torch.float32, torch.float64]))
        found.append(
            Account(
                name=f"layer{i}",
                active_GU=active_GU,
                drop_GU=drop_GU.to(dtype),
                grow_GU=grow_GU.to(dtype),
                num_planned=int(active_GU.sum()),
                is_output=i == num_accounts - 1,
            )
        )
    return found


@st.composite
def problems(
    draw: st.DrawFn, granularities: Sequence[str] = (), kinds: Sequence[str] = KINDS
) -> tuple[list[Account], Terms]:
    """A total between one unit per group and all there are: often the present one, or either end."""
    accounts = draw(models(granularities, kinds))
    least, most = sum(len(a.active_GU) for a in accounts), sum(a.num_units for a in accounts)
    total = draw(st.sampled_from([num_active(accounts), least, most]) | st.integers(least, most))
    return accounts, Terms(num_total=total, drop_fraction=draw(percents) / 100)


# Laws of every allocator


@every
@given(problems())
def test_budgets_can_be_met_and_meet_the_total(allocate: Allocator, problem: tuple[list[Account], Terms]) -> None:
    """Exactly, with a single group; with several, quotas are equal and less than one unit per group is unspent."""
    accounts, terms = problem
    budgets = allocate(accounts, terms).budgets
    assert len(budgets) == len(accounts)
    for a, budget in zip(accounts, budgets, strict=True):
        assert bool((budget.num_kept_G >= 0).all())
        assert bool((budget.num_kept_G <= a.active_GU.sum(dim=1)).all())
        assert bool((budget.num_kept_G <= budget.num_target_G).all())
        assert bool((budget.num_target_G <= a.active_GU.shape[1]).all())
        assert len(budget.num_target_G) == len(a.active_GU)
        assert len(budget.num_target_G.unique()) == 1
    num_after = sum(int(carried_out(a, b).sum()) for a, b in zip(accounts, budgets, strict=True))
    slack = sum(len(a.active_GU) - 1 for a in accounts)
    assert terms.num_total - slack <= num_after <= terms.num_total


@never_empty
@given(problems())
def test_no_group_is_left_empty(allocate: Allocator, problem: tuple[list[Account], Terms]) -> None:
    accounts, terms = problem
    assert min(int(budget.num_target_G.min()) for budget in allocate(accounts, terms).budgets) >= 1


@given(st.sampled_from(list(SPARING.values())), models(), percents)
def test_one_unit_per_group_is_the_least(allocate: Allocator, accounts: list[Account], percent: int) -> None:
    """With elements: as many units as layers, so each has one."""
    terms = Terms(num_total=sum(len(a.active_GU) for a in accounts), drop_fraction=percent / 100)
    assert targets(allocate(accounts, terms)) == [[1] * len(a.active_GU) for a in accounts]


@given(any_allocator, models(), percents)
def test_all_units_are_the_most(allocate: Allocator, accounts: list[Account], percent: int) -> None:
    """Decompression, as in AC/DC: all that is inactive grows."""
    terms = Terms(num_total=sum(a.num_units for a in accounts), drop_fraction=percent / 100)
    for a, budget in zip(accounts, allocate(accounts, terms).budgets, strict=True):
        assert bool(carried_out(a, budget).all())


@given(any_allocator, problems(["Element", "Kernel", "Channel", "Block"]))
def test_one_account_has_the_whole_total(allocate: Allocator, problem: tuple[list[Account], Terms]) -> None:
    a, terms = problem[0][0], problem[1]
    total = min(terms.num_total, a.num_units)
    assert targets(allocate([a], replace(terms, num_total=total))) == [[total]]


@given(st.sampled_from([global_units, lamp, may_empty, momentum_share]), models())
def test_a_fixed_point(allocate: Allocator, accounts: list[Account]) -> None:
    """The present total and f = 0 change nothing."""
    terms = Terms(num_total=num_active(accounts), drop_fraction=0.0)
    for a, budget in zip(accounts, allocate(accounts, terms).budgets, strict=True):
        assert torch.equal(carried_out(a, budget), a.active_GU)


@given(any_allocator, problems(["Element", "Kernel"], kinds=["distinct"]), st.randoms(use_true_random=False))
def test_the_order_of_layers_matters_for_ties_only(
    allocate: Allocator, problem: tuple[list[Account], Terms], rng: object
) -> None:
    """Global scores without ties choose the same in any order; the best of all layers tie in LAMP, at 1, and remainders
    of shares may, which moves one unit."""
    accounts, terms = problem
    order = list(range(len(accounts)))
    rng.shuffle(order)  # type: ignore[attr-defined]
    before, after = (targets(allocate(x, terms)) for x in (accounts, [accounts[i] for i in order]))
    moved = [abs(before[i][0] - found[0]) for i, found in zip(order, after, strict=True)]
    assert max(moved) <= (0 if allocate in (global_units, may_empty) else 1)


@given(any_allocator, problems())
def test_asked_twice_it_answers_the_same_and_changes_nothing_given(
    allocate: Allocator, problem: tuple[list[Account], Terms]
) -> None:
    accounts, terms = problem
    before = [[x.clone() for x in (a.active_GU, a.drop_GU, a.grow_GU)] for a in accounts]
    first, second = (allocate(accounts, terms) for _ in range(2))
    assert (targets(first), kept(first), first.memory) == (targets(second), kept(second), second.memory)
    for a, copies in zip(accounts, before, strict=True):
        assert all(torch.equal(x, y) for x, y in zip((a.active_GU, a.drop_GU, a.grow_GU), copies, strict=True))


@given(any_allocator, problems(), st.integers(-20, 20))
def test_a_common_factor_of_all_scores_changes_nothing(
    allocate: Allocator, problem: tuple[list[Account], Terms], exponent: int
) -> None:
    """Powers of two, as these scale without rounding; a threshold scales with them."""
    accounts, terms = problem
    factor = 2.0**exponent
    if isinstance(allocate, AdaptiveThreshold):
        terms = replace(terms, memory=0.5)
    scaled = [replace(a, drop_GU=a.drop_GU * factor, grow_GU=a.grow_GU * factor) for a in accounts]
    one, other = allocate(accounts, terms), allocate(scaled, replace(terms, memory=terms.memory * factor))
    assert (targets(one), kept(one), one.memory * factor) == (targets(other), kept(other), other.memory)


@given(problems(["Element", "FanIn"]), st.sampled_from([global_units, lamp, may_empty]))
def test_pruning_alone_is_monotone(problem: tuple[list[Account], Terms], allocate: Allocator) -> None:
    """Along a falling total and with f = 0, as in GMP, what is gone stays gone, though scores change meanwhile."""
    accounts, _ = problem
    least = sum(len(a.active_GU) for a in accounts)
    for step in range(4):
        total = least + (num_active(accounts) - least) * 2 // 3
        found = allocate(accounts, Terms(num_total=total, drop_fraction=0.0))
        after = [carried_out(a, b) for a, b in zip(accounts, found.budgets, strict=True)]
        for a, active_GU in zip(accounts, after, strict=True):
            assert not bool((active_GU & ~a.active_GU).any())
        accounts = [
            replace(a, active_GU=active_GU, drop_GU=scores_like(active_GU, "tied", step + i))
            for i, (a, active_GU) in enumerate(zip(accounts, after, strict=True))
        ]


def test_units_of_every_kind_are_counted_alike() -> None:
    """Two weights of 4 × 4, one with all magnitudes above the other's: 3 of 4 blocks, 6 of 8 kernels or channels."""
    high, low = 2 + torch.rand(4, 4, generator=generator(0)), torch.rand(4, 4, generator=generator(1))
    for grain, num_units in ((Element(), 16), (Kernel(), 16), (Channel(), 4), (Block(2, 2), 4), (FanIn(), 16)):
        accounts = []
        for name, weight in (("high", high), ("low", low)):
            score_GU = unit_score(weight, weight.shape, grain)
            active_GU = torch.ones_like(score_GU, dtype=torch.bool)
            accounts.append(
                Account(name=name, active_GU=active_GU, drop_GU=score_GU, grow_GU=score_GU, num_planned=num_units)
            )
        budgets = global_units(accounts, Terms(num_total=3 * num_units // 2, drop_fraction=0.0)).budgets
        assert [int(b.num_target_G.sum()) for b in budgets] == [num_units, num_units // 2], grain


# Weights without a reason to grow


@st.composite
def half_idle(draw: st.DrawFn) -> tuple[list[Account], Terms]:
    """Problems in which some of the accounts, or all, have equal growth scores."""
    accounts, terms = draw(problems())
    idle = draw(st.lists(st.booleans(), min_size=len(accounts), max_size=len(accounts)))
    value = draw(st.sampled_from([0.0, 3.0, -1.0]))
    changed = []
    for a, is_idle in zip(accounts, idle, strict=True):
        grow_GU = torch.full_like(a.grow_GU, value) if is_idle else a.grow_GU
        before = draw(st.sampled_from([a.num_planned, a.num_units]))  # plans that stay, or fall from dense
        changed.append(replace(a, grow_GU=grow_GU, num_planned_before=before))
    return changed, terms


def test_an_idle_weight_keeps_what_others_would_take() -> None:
    reached, idle = (
        account("reached", [4.0, 3.0, None, None], [4, 3, 2, 1]),
        account("idle", [2.0, 1.0, None], [0, 0, 0]),
    )
    for allocate, alone in (
        (momentum_share, [[3], [1]]),
        (AdaptiveThreshold(initial=2.5), [[3], [1]]),
        (lamp, [[2], [2]]),
    ):
        terms = Terms(num_total=4, drop_fraction=0.5)
        assert targets(allocate([reached, idle], terms)) == alone
        found = share_out(allocate, [reached, idle], terms)
        assert targets(found) == [[2], [2]]
        assert kept(found)[1] == [2], "nothing is exchanged"


@pytest.mark.parametrize(
    ("total", "planned", "before", "expected"),
    [
        (9, 3, None, [[6], [3]]),  # as it is
        (8, 3, 3, [[5], [3]]),  # the others give up what the total falls by, unless its own plan falls
        (6, 2, 3, [[4], [2]]),
        (7, 4, 5, [[5], [2]]),  # 3 · 4 / 5 = 2.4
        (7, 5, 6, [[4], [3]]),  # 3 · 5 / 6 = 2.5, and halves go up
        (3, 3, 3, [[1], [2]]),  # one unit is left to the others
        (2, 3, 3, [[1], [1]]),
        (11, 3, 3, [[8], [3]]),  # who has a reason takes what the total rises by,
        (12, 3, 3, [[8], [4]]),  # and it takes what the others have no room for
        (14, 3, 3, [[8], [6]]),
        (9, 4, 2, [[3], [6]]),
    ],
)
def test_idle_weights_by_hand(total: int, planned: int, before: int | None, expected: list[list[int]]) -> None:
    reached = account("reached", [6.0, 5, 4, 3, 2, 1, None, None], [1, 2, 3, 4, 5, 6, 7, 8])
    idle = account("idle", [9.0, 9, 9, None, None, None], [0] * 6)
    idle = replace(idle, num_planned=planned, num_planned_before=before)
    for allocate in EVERY.values():
        assert targets(share_out(allocate, [reached, idle], Terms(num_total=total, drop_fraction=0.0))) == expected


@given(any_allocator, half_idle())
def test_the_total_holds_whoever_is_idle(allocate: Allocator, problem: tuple[list[Account], Terms]) -> None:
    accounts, terms = problem
    found = share_out(allocate, accounts, terms)
    for a, budget in zip(accounts, found.budgets, strict=True):
        assert bool((budget.num_kept_G >= 0).all())
        assert bool((budget.num_kept_G <= torch.minimum(a.active_GU.sum(dim=1), budget.num_target_G)).all())
        assert bool((budget.num_target_G <= a.active_GU.shape[1]).all())
    num_after = sum(int(carried_out(a, b).sum()) for a, b in zip(accounts, found.budgets, strict=True))
    slack = sum(len(a.active_GU) - 1 for a in accounts)
    assert terms.num_total - slack <= num_after <= terms.num_total
    if not any(a.is_idle for a in accounts):
        assert (targets(found), kept(found)) == (targets(allocate(accounts, terms)), kept(allocate(accounts, terms)))


@given(any_allocator, half_idle())
def test_idle_weights_exchange_nothing_and_follow_their_own_plan(
    allocate: Allocator, problem: tuple[list[Account], Terms]
) -> None:
    accounts, terms = problem
    wanted, room, least = 0, 0, 0
    for a in accounts:
        if a.is_idle:
            wanted += round_half_up(Fraction(int(a.active_GU.sum()) * a.num_planned, a.num_planned_before))
        else:
            room, least = room + a.num_units, least + len(a.active_GU)
    can_follow = terms.num_total - room <= wanted <= terms.num_total - least
    for a, budget in zip(accounts, share_out(allocate, accounts, terms).budgets, strict=True):
        if not a.is_idle:
            continue
        num_before, num_after = int(a.active_GU.sum()), int(budget.num_target_G.sum())
        stays_GU = carried_out(a, budget)
        assert not bool((stays_GU & ~a.active_GU).any() & (a.active_GU & ~stays_GU).any())
        expected = round_half_up(Fraction(num_before * a.num_planned, a.num_planned_before))
        if can_follow:  # what does not divide into groups is left
            assert expected - len(a.active_GU) < num_after <= expected
            assert num_after == expected or len(a.active_GU) > 1


def round_half_up(x: Fraction) -> int:
    return math.floor(x + Fraction(1, 2))


@given(any_allocator, half_idle())
def test_of_idle_weights_an_allocator_hears_nothing(allocate: Allocator, problem: tuple[list[Account], Terms]) -> None:
    """Where all are idle it is not asked, and what it remembers stays."""
    accounts, terms = problem
    heard: list[str] = []

    def listening(accounts: Sequence[Account], terms: Terms) -> Allocation:
        heard.extend(a.name for a in accounts)
        return allocate(accounts, terms)

    found = share_out(listening, accounts, replace(terms, memory=0.25))
    assert heard == [a.name for a in accounts if not a.is_idle]
    assert heard or found.memory == 0.25


# One order over all: by hand


STRONG, WEAK = [9.0, 8.0, 1.0, None], [7.0, 2.0, 0.5, None]


@pytest.mark.parametrize(
    ("total", "fraction", "target", "keep"),
    [
        (6, 0.0, [3, 3], [3, 3]),
        (5, 0.0, [3, 2], [3, 2]),  # 9 8 7 2 1 stay
        (4, 0.0, [2, 2], [2, 2]),
        (3, 0.0, [2, 1], [2, 1]),
        (2, 0.0, [1, 1], [1, 1]),  # one each, though 9 and 8 are the best
        (4, 0.5, [2, 2], [1, 1]),  # of what is left, half is exchanged within each
        (3, 0.5, [2, 1], [1, 1]),
        (6, 0.5, [3, 3], [2, 2]),
        (4, 1.0, [2, 2], [0, 0]),
        (7, 0.0, [3, 4], [3, 3]),  # the weak one's growth score is the higher
        (8, 0.5, [4, 4], [2, 2]),
    ],
)
def test_global_rank_by_hand(total: int, fraction: float, target: list[int], keep: list[int]) -> None:
    accounts = [account("strong", STRONG, [0, 0, 0, 3]), account("weak", WEAK, [9, 9, 9, 4])]
    found = global_units(accounts, Terms(num_total=total, drop_fraction=fraction))
    assert targets(found) == [[n] for n in target]
    assert kept(found) == [[n] for n in keep]


def test_a_weak_layer_is_spared_unless_it_may_be_emptied() -> None:
    accounts = [account("strong", [9.0, 8.0, 7.0]), account("weak", [3.0, 2.0, 1.0])]
    terms = Terms(num_total=3, drop_fraction=0.0)
    assert targets(global_units(accounts, terms)) == [[2], [1]]
    assert targets(may_empty(accounts, terms)) == [[3], [0]]


def test_ties_go_to_the_earlier_layer() -> None:
    accounts = [account(name, [1.0] * 4) for name in "abc"]
    assert targets(may_empty(accounts, Terms(num_total=6, drop_fraction=0.0))) == [[4], [2], [0]]
    assert targets(global_units(accounts, Terms(num_total=6, drop_fraction=0.0))) == [[4], [1], [1]]


def test_an_emptied_layer_may_grow_again() -> None:
    accounts = [account("a", [5.0, None], [0, 1]), account("b", [None, None], [8, 9])]
    found = may_empty(accounts, Terms(num_total=3, drop_fraction=0.0))
    assert (targets(found), kept(found)) == ([[1], [2]], [[1], [0]])


def test_doubles_are_not_ranked_as_singles() -> None:
    """1 + 1e-12 is above 1 in double precision only; the other account is single."""
    accounts = [account("single", [1.0, 1.0]), account("double", [1.0, 1.0])]
    fine = accounts[1].drop_GU.double() + 1e-12
    accounts[1] = replace(accounts[1], drop_GU=fine)
    assert targets(may_empty(accounts, Terms(num_total=2, drop_fraction=0.0))) == [[0], [2]]


def test_what_does_not_divide_goes_to_another_layer_or_is_unspent() -> None:
    """Layers of 4 and 3 outputs. Of 11 by score 6 and 5: quotas 1 and 1, and the 4 spare lift one more layer."""
    layers = {"a": [[9.0] * 6 + [0.0] * 6, 4], "b": [[8.0] * 5 + [0.0] * 4, 3]}
    accounts = []
    for name, (scores, num_groups) in layers.items():
        score_GU = torch.tensor(scores).view(3, num_groups).T.contiguous()
        accounts.append(
            Account(
                name=name, active_GU=score_GU > -1, drop_GU=score_GU, grow_GU=score_GU, num_planned=score_GU.numel()
            )
        )
    # remainders: 2 of 4 and 2 of 3; the larger share is b's, and 1 unit is left, too few for a's 4 outputs
    assert targets(global_units(accounts, Terms(num_total=11, drop_fraction=0.0))) == [[1] * 4, [2] * 3]


def test_two_layers_share_one_row_that_does_not_divide() -> None:
    """Of 6 by score 3 and 3, over 2 outputs each: the first has 2 per output and the second 1, and none is unspent."""
    score_GU = torch.tensor([[9.0, 7, 5, 3], [8, 0, 0, 0]])
    accounts = [
        Account(
            name=name, active_GU=score_GU > -1, drop_GU=score_GU + less, grow_GU=score_GU, num_planned=score_GU.numel()
        )
        for name, less in (("a", 0.5), ("b", 0.4))
    ]
    assert targets(global_units(accounts, Terms(num_total=6, drop_fraction=0.0))) == [[2, 2], [1, 1]]


# One order over all: oracles


def global_reference(scores: list[list[Fraction]], accounts: list[Account], num: int, empty: bool) -> list[int]:
    """How many of the ``num`` best active units lie in each weight; the best of each group first of all."""
    best_first = []
    for i, (layer, a) in enumerate(zip(scores, accounts, strict=True)):
        num_units = a.active_GU.shape[1]
        for g, row in enumerate(a.active_GU.tolist()):
            alive = sorted((u for u, on in enumerate(row) if on), key=lambda u, g=g: (-layer[g * num_units + u], u))
            for place, u in enumerate(alive):
                first = place == 0 and not empty
                best_first.append((not first, 0 if first else -layer[g * num_units + u], i, g * num_units + u))
    best_first.sort()
    return [sum(entry[2] == i for entry in best_first[:num]) for i in range(len(accounts))]


def lamp_reference(a: Account) -> list[Fraction]:
    """s² over the sum of it and of all that come after it in the order from the smallest to the largest."""
    pairs = zip(_flat(a.drop_GU), _flat(a.active_GU), strict=True)
    square = [Fraction(s) ** 2 if on else Fraction(0) for s, on in pairs]
    order = sorted(range(len(square)), key=lambda u: (square[u], -u))  # of equals the lower index is the larger
    lamp_of = [Fraction(0)] * len(square)
    for position, u in enumerate(order):
        rest = sum(square[v] for v in order[position:])
        lamp_of[u] = square[u] / rest if rest else Fraction(0)
    return lamp_of


def _flat(x: Tensor) -> list:  # type: ignore[type-arg]
    return x.flatten().tolist()


@given(problems(["Element", "Kernel", "Channel"]), st.booleans())
def test_global_rank_equals_plain_python(problem: tuple[list[Account], Terms], empty: bool) -> None:
    accounts, terms = problem
    now = num_active(accounts)
    scores = [[Fraction(s) for s in _flat(a.drop_GU)] for a in accounts]
    expected = global_reference(scores, accounts, min(terms.num_total, now), empty)
    if terms.num_total > now:
        inactive = [replace(a, active_GU=~a.active_GU) for a in accounts]
        scores = [[Fraction(s) for s in _flat(a.grow_GU)] for a in accounts]
        more = global_reference(scores, inactive, terms.num_total - now, empty=True)
        expected = [n + m for n, m in zip(expected, more, strict=True)]
    found = GlobalRank(may_empty=empty)(accounts, terms)
    assert targets(found) == [[n] for n in expected]
    percent = round(100 * terms.drop_fraction)
    stay = [min(int(a.active_GU.sum()), n) for a, n in zip(accounts, expected, strict=True)]
    assert kept(found) == [[n - n * percent // 100] for n in stay]


@given(problems(["FanIn"]))
def test_quotas_are_those_of_the_rank_rounded(problem: tuple[list[Account], Terms]) -> None:
    """With several groups, a weight has its count by score over its number of groups, rounded down or up."""
    accounts, terms = problem
    total = min(terms.num_total, num_active(accounts))
    scores = [[Fraction(s) for s in _flat(a.drop_GU)] for a in accounts]
    expected = global_reference(scores, accounts, total, empty=False)
    found = targets(global_units(accounts, replace(terms, num_total=total)))
    for a, num, quotas in zip(accounts, expected, found, strict=True):
        assert quotas[0] in (num // len(a.active_GU), -(-num // len(a.active_GU)))


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([3.0, 1.0, 2.0], [1.0, 1 / 14, 4 / 13]),
        ([1.0, 1.0, 1.0], [1.0, 1 / 2, 1 / 3]),  # of equals, the lower index counts as the larger
        ([5.0], [1.0]),
        ([2.0, None, 1.0], [1.0, 0.0, 1 / 5]),  # what is not active has no part in it
        ([3.0, 0.0, 0.0], [1.0, 0.0, 0.0]),
        ([0.0, 0.0], [0.0, 0.0]),
        ([-3.0, 1.0], [1.0, 1 / 10]),  # the square decides
    ],
)
def test_lamp_scores_by_hand(scores: list[float | None], expected: list[float]) -> None:
    a = account("w", scores)
    # one division of whole numbers, which is rounded once
    assert _flat(lamp_scores(a.drop_GU, a.active_GU)) == pytest.approx(expected, rel=1e-15, abs=0)
    assert [float(x) for x in lamp_reference(a)] == pytest.approx(expected, rel=1e-15, abs=0)


def test_lamp_by_hand() -> None:
    """Of 4 3 2 1 the scores are 1, 9/25, 4/29 and 1/30; of four equals 1, 1/2, 1/3 and 1/4, a hundredfold or not."""
    accounts = [account("a", [4.0, 3.0, 2.0, 1.0]), account("b", [400.0] * 4)]
    for total, expected in [(2, [1, 1]), (3, [1, 2]), (4, [2, 2]), (5, [2, 3]), (6, [2, 4]), (7, [3, 4])]:
        assert targets(lamp(accounts, Terms(num_total=total, drop_fraction=0.0))) == [[n] for n in expected]
    # by plain magnitude the hundredfold layer would stay whole from 5 on
    assert targets(global_units(accounts, Terms(num_total=5, drop_fraction=0.0))) == [[1], [4]]


@given(models(["Element"]))
def test_lamp_scores_equal_the_definition(accounts: list[Account]) -> None:
    for a in accounts:
        found = _flat(lamp_scores(a.drop_GU, a.active_GU))
        # whole numbers: squares and their sums are exact in double precision, so one division is rounded
        assert found == pytest.approx([float(x) for x in lamp_reference(a)], rel=1e-15, abs=0)


@given(problems(["Element", "Kernel"]))
def test_lamp_equals_plain_python(problem: tuple[list[Account], Terms]) -> None:
    accounts, terms = problem
    total = min(terms.num_total, num_active(accounts))
    # pruning compares active units only, and by their score among the active of their own layer
    expected = global_reference([lamp_reference(a) for a in accounts], accounts, total, empty=False)
    assert targets(lamp(accounts, replace(terms, num_total=total))) == [[n] for n in expected]


@given(models(["Element"]), st.lists(st.integers(-60, 60), min_size=5, max_size=5), st.data())
def test_lamp_knows_no_scale_of_a_layer(accounts: list[Account], exponents: list[int], data: st.DataObject) -> None:
    """Powers of two, each layer by its own; their squares are far from the ends of double precision."""
    total = data.draw(st.integers(len(accounts), num_active(accounts)))
    terms = Terms(num_total=total, drop_fraction=0.0)
    scaled = [replace(a, drop_GU=a.drop_GU * 2.0**k) for a, k in zip(accounts, exponents, strict=False)]
    assert targets(lamp(scaled, terms)) == targets(lamp(accounts, terms))


@given(models(["Element"], kinds=["distinct"]))
def test_lamp_prunes_each_layer_by_magnitude(accounts: list[Account]) -> None:
    """Within a layer its order is that of magnitudes, and the best of each is 1."""
    for a in accounts:
        active = a.active_GU[0]
        scores = lamp_scores(a.drop_GU, a.active_GU)[0][active]
        assert torch.equal(scores.argsort(), a.drop_GU[0][active].argsort())
        assert float(scores.max()) == 1.0


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e20, 1e38])
def test_lamp_stands_single_precision_to_its_ends(scale: float) -> None:
    """Squares of 1e±38 are 1e±76, which double precision holds and single does not."""
    active_GU = torch.ones(1, 3, dtype=torch.bool)
    scores = lamp_scores(torch.tensor([[3.0, 1.0, 2.0]]) * scale, active_GU)
    # the scores were rounded to single precision, 6e-8 of each; below 1.2e-38 it has fewer digits
    assert _flat(scores) == pytest.approx([1, 1 / 14, 4 / 13], rel=1e-6)


# Momentum shares


@pytest.mark.parametrize(
    ("fraction", "total", "target", "keep"),
    [
        # a and b have 4 of 8 and 4 of 10 active, with mean momentum 3 and 1
        (0.5, 8, [5, 3], [2, 2]),  # 2 + 2 dropped, grown as 3 : 1
        (0.25, 8, [5, 3], [3, 3]),  # 1 + 1 dropped: 1.5 and 0.5, the tie goes to a
        (0.0, 8, [4, 4], [4, 4]),
        (1.0, 8, [6, 2], [0, 0]),
        # more than there is room for: a has 6 free of 12 · 3/4, the other 6 go to b
        (0.5, 16, [8, 8], [2, 2]),
        (1.0, 18, [8, 10], [0, 0]),
        # a falling total takes from both what they keep, in proportion
        (0.0, 6, [3, 3], [3, 3]),
        (0.5, 2, [1, 1], [1, 1]),
    ],
)
def test_momentum_share_by_hand(fraction: float, total: int, target: list[int], keep: list[int]) -> None:
    a = account("a", [1.0] * 4 + [None] * 4, [5, 1, 4, 2, 99, 99, 99, 99])  # what is inactive has no say
    b = account("b", [1.0] * 4 + [None] * 6, [1, 1, 1, 1] + [99] * 6)
    found = momentum_share([a, b], Terms(num_total=total, drop_fraction=fraction))
    assert targets(found) == [[n] for n in target]
    assert kept(found) == [[n] for n in keep]


def test_the_last_weight_of_a_layer_is_part_of_its_share_not_on_top_of_it() -> None:
    """Rounded up, 1 of 1 and 2 of 3 are dropped; of the 3, by 16 : 35, the first layer has 0.94 and the other 2.06."""
    accounts = [account("a", [1.0] + [None] * 9, [16] * 10), account("b", [1.0] * 3 + [None] * 7, [35] * 10)]
    found = momentum_share(accounts, Terms(num_total=4, drop_fraction=0.47, round_up=True))
    assert (targets(found), kept(found)) == ([[1], [3]], [[0], [1]])


@pytest.mark.parametrize("fraction", [0.0, 0.01])
def test_a_total_below_what_is_kept_is_still_met(fraction: float) -> None:
    """As where weights that wait for a gradient hold more units than planned, near the end of a cosine."""
    accounts = [account("a", [1.0] * 9 + [None]), account("b", [2.0] * 3 + [None])]
    for allocate in (momentum_share, AdaptiveThreshold()):
        # 12 are active and 8 remain, by 9 : 3
        found = allocate(accounts, Terms(num_total=8, drop_fraction=fraction))
        assert targets(found) == [[6], [2]]


def momentum_reference(accounts: list[Account], terms: Terms) -> tuple[list[int], list[int]]:
    """Targets and kept of single groups."""
    percent = round(100 * terms.drop_fraction)
    active = [int(a.active_GU.sum()) for a in accounts]
    means = []
    for a, n in zip(accounts, active, strict=True):
        total = sum(g for g, on in zip(_flat(a.grow_GU), _flat(a.active_GU), strict=True) if on)
        means.append(total / n)
    keep = []
    for a, n, mean in zip(accounts, active, means, strict=True):
        share = Fraction(percent, 100)
        if 10 * (a.num_units - n) < 2 * a.num_units and mean > sum(means) / len(means):  # nearly full, and growing
            share = min(share, Fraction(a.num_units - n, a.num_units))
        keep.append(n - int(share * n))
    names = [a.name for a in accounts]
    if sum(max(n, 1) for n in keep) > terms.num_total:
        stays, sure = (dict(zip(names, x, strict=True)) for x in (keep, [max(n, 1) for n in keep]))
        target = list(split(terms.num_total, stays, sure, dict.fromkeys(names, 1)).values())
    else:
        caps = {a.name: a.num_units - n for a, n in zip(accounts, keep, strict=True)}
        floors = {name: max(1 - n, 0) for name, n in zip(names, keep, strict=True)}
        grown = split(terms.num_total - sum(keep), dict(zip(names, means, strict=True)), caps, floors)
        target = [n + grown[name] for n, name in zip(keep, names, strict=True)]
    return target, [min(n, t) for n, t in zip(keep, target, strict=True)]


@given(problems(["Element", "Kernel", "Channel"]))
def test_momentum_share_equals_plain_python(problem: tuple[list[Account], Terms]) -> None:
    accounts, terms = problem
    found = momentum_share(accounts, terms)
    expected = momentum_reference(accounts, terms)
    assert (targets(found), kept(found)) == tuple([[n] for n in part] for part in expected)


def test_one_enormous_momentum_takes_what_fits() -> None:
    accounts = [account(n, [1.0] * 2 + [None] * 4, [s] * 6) for n, s in (("a", 1.0), ("b", 3e38), ("c", 1e-38))]
    assert targets(momentum_share(accounts, Terms(num_total=6, drop_fraction=0.5))) == [[1], [4], [1]]
    assert targets(momentum_share(accounts, Terms(num_total=10, drop_fraction=0.5))) == [[3], [6], [1]]


def test_no_momentum_at_all_is_shared_by_room() -> None:
    """Of 6 to grow, by the 4 and 8 that the layers have free."""
    accounts = [account("a", [1.0] * 2 + [None] * 3, [0] * 5), account("b", [1.0] * 2 + [None] * 7, [0] * 9)]
    assert targets(momentum_share(accounts, Terms(num_total=8, drop_fraction=0.5))) == [[3], [5]]


# An adaptive threshold


@pytest.mark.parametrize(
    ("fraction", "memory", "keep", "after"),
    [
        # active: 1 2 3 4 and 3 4 5 6 7 8; the threshold is 3, so 2 of 10 go
        (0.2, 3.0, [2, 6], 3.0),  # as wanted
        (0.4, 3.0, [2, 6], 6.0),  # 4 wanted, and fewer than 3.6 went
        (0.1, 3.0, [2, 6], 1.5),  # 1 wanted, and more than 1.1 went
        (0.22, 3.0, [2, 6], 3.0),  # 2.2 wanted: within a tenth
        (0.0, 3.0, [2, 6], 1.5),
        (0.0, 1.0, [4, 6], 1.0),  # a score equal to the threshold stays
        (0.5, 5.0, [1, 4], 5.0),  # 4 + 2 would go, but one stays: 5 do, as wanted
        (0.9, 8.0, [1, 1], 16.0),  # 9 wanted; 8 went, as one of each stays, and that is fewer than 8.1
        (1.0, 99.0, [1, 1], 99.0),  # nothing reaches it, so doubling it would change nothing
    ],
)
def test_adaptive_threshold_by_hand(fraction: float, memory: float, keep: list[int], after: float) -> None:
    accounts = [
        account("a", [1.0, 2.0, 3.0, 4.0] + [None] * 6),
        account("b", [3.0, 4.0, 5.0, 6.0, 7.0, 8.0] + [None] * 4),
    ]
    found = AdaptiveThreshold()(accounts, Terms(num_total=10, drop_fraction=fraction, memory=memory))
    assert kept(found) == [[n] for n in keep]
    assert found.memory == after


def test_survivors_say_where_it_regrows() -> None:
    """2 of 4 and 6 of 6 survive, so of 4 to grow, 1 and 3; with room for 1 in the second, 3 and 1."""
    a, b = account("a", [1.0, 2.0, 3.0, 4.0] + [None] * 6), [3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    terms = Terms(num_total=12, drop_fraction=0.2, memory=3.0)
    allocate = AdaptiveThreshold()
    assert targets(allocate([a, account("b", b + [None] * 4)], terms)) == [[3], [9]]
    assert targets(allocate([a, account("b", [*b, None])], terms)) == [[5], [7]]


def test_the_threshold_starts_and_moves_as_told() -> None:
    accounts = [account("a", [0.5, 1.5, 2.5, 3.5])]
    allocate = AdaptiveThreshold(initial=1.0, tolerance=0.0, factor=3.0)
    found = allocate(accounts, Terms(num_total=4, drop_fraction=0.5))
    assert (kept(found), found.memory) == ([[3]], 3.0)
    found = allocate(accounts, Terms(num_total=4, drop_fraction=0.5, memory=found.memory))
    assert (kept(found), found.memory) == ([[1]], 1.0)
    found = allocate(accounts, Terms(num_total=4, drop_fraction=0.25, memory=found.memory))
    assert (kept(found), found.memory) == ([[3]], 1.0)


@given(problems(["Element", "FanIn"]), st.sampled_from([0.0, 0.5, 1.0, 150.0, 1e6]))
def test_adaptive_threshold_equals_plain_python(problem: tuple[list[Account], Terms], memory: float) -> None:
    accounts, terms = problem
    found = AdaptiveThreshold()(accounts, replace(terms, memory=memory))
    threshold = memory or 1e-3
    num_kept, num_above, survivors = 0, 0, []
    for a in accounts:
        above = [
            sum(on and s >= threshold for s, on in zip(scores, row, strict=True))
            for scores, row in zip(a.drop_GU.tolist(), a.active_GU.tolist(), strict=True)
        ]
        survivors.append([max(n, 1) for n in above])
        num_kept, num_above = num_kept + sum(survivors[-1]), num_above + sum(above)
    gone, wanted = num_active(accounts) - num_kept, terms.drop_fraction * num_active(accounts)
    factor = (2 if num_above else 1) if gone < 0.9 * wanted else 0.5 if gone > 1.1 * wanted else 1
    assert found.memory == threshold * factor
    for layer, budget in zip(survivors, found.budgets, strict=True):
        quota = int(budget.num_target_G[0])
        assert budget.num_kept_G.tolist() == [min(n, quota) for n in layer]
    if num_kept <= terms.num_total and all(len(a.active_GU) == 1 for a in accounts):
        shares = {a.name: sum(n) for a, n in zip(accounts, survivors, strict=True)}
        caps = {a.name: a.num_units - sum(n) for a, n in zip(accounts, survivors, strict=True)}
        grown = split(terms.num_total - num_kept, shares, caps)
        assert targets(found) == [[sum(n) + grown[a.name]] for a, n in zip(accounts, survivors, strict=True)]


def test_the_threshold_settles_where_the_fraction_is_met() -> None:
    """Magnitudes are spread evenly in their logarithm, so a doubling moves the share by a twentieth of all."""
    magnitudes = (2.0 ** (torch.arange(2000) / 100)).tolist()
    accounts = [account("a", magnitudes[::2]), account("b", magnitudes[1::2])]
    terms, history = Terms(num_total=2000, drop_fraction=0.3), []
    for _ in range(40):
        found = AdaptiveThreshold()(accounts, terms)
        terms = replace(terms, memory=found.memory)
        history.append(2000 - sum(n for (n,) in kept(found)))
    assert 0.27 * 2000 <= history[-1] <= 0.33 * 2000
    assert len(set(history[-10:])) == 1


def test_a_threshold_that_cannot_drop_enough_stays_finite() -> None:
    """One input per output, each of which must stay: for a thousand updates it never drops what is wanted."""
    score_GU = torch.rand(5, 4, generator=generator(0))
    a = Account(
        name="w",
        active_GU=evenly_active(5, 4, 1, 0),
        drop_GU=score_GU,
        grow_GU=score_GU,
        num_planned=5,
    )
    terms = Terms(num_total=5, drop_fraction=0.5)
    for _ in range(1200):
        terms = replace(terms, memory=AdaptiveThreshold()([a], terms).memory)
    assert terms.memory <= 2.0  # the highest score is below 1


# Neuron ablation


def ablation_reference(
    a: Account, percent: int, share: Fraction, *, all_gradients: bool
) -> tuple[list[int], list[int]]:
    """Targets and kept per neuron, in whole numbers and fractions, from the definition."""
    active, drop, grow = a.active_GU.tolist(), a.drop_GU.tolist(), a.grow_GU.tolist()
    num_neurons, num_inputs = len(active), len(active[0])
    everywhere = [(g, u) for g in range(num_neurons) for u in range(num_inputs)]
    largest_first = sorted((at for at in everywhere if active[at[0]][at[1]]), key=lambda at: (-drop[at[0]][at[1]], at))
    num_moved = len(largest_first) * percent // 100
    num_kept = len(largest_first) - num_moved
    would_grow = [(g, u) for g, u in everywhere if all_gradients or not active[g][u]]
    would_grow = sorted(would_grow, key=lambda at: (-grow[at[0]][at[1]], at))[:num_moved]
    salient = [sum(h == g for h, _ in {*largest_first[:num_kept], *would_grow}) for g in range(num_neurons)]
    alive = list(range(num_neurons))
    if not a.is_output:
        least = max(1, math.floor(share * (a.num_planned // num_neurons)))
        beyond = math.ceil(Fraction(a.num_planned, num_inputs))  # the neurons that are needed, and one more
        alive = [g for g in alive if salient[g] >= min(least, sorted(salient)[::-1][min(beyond, num_neurons - 1)])]
    alive = sorted(alive, key=lambda g: (-salient[g], g))[: a.num_planned]  # one weight each, if there are so few
    fan_in = a.num_planned // len(alive)
    target = [fan_in if g in alive else 0 for g in range(num_neurons)]
    kept = [at for at in largest_first if at[0] in alive][:num_kept]
    return target, [min(sum(h == g for h, _ in kept), n) for g, n in enumerate(target)]


@st.composite
def layers(draw: st.DrawFn, constant: bool = True) -> Account:
    """A constant fan-in over the neurons that are left, and as many units planned as they hold, and a remainder.

    Unless the density is to be ``constant``, any number may be planned, from one per neuron up.
    """
    num_neurons, num_inputs = draw(st.integers(1, 7)), draw(st.integers(1, 8))
    num_alive = draw(st.integers(1, num_neurons))
    fan_in = draw(st.integers(1, num_inputs))
    alive_G = torch.randperm(num_neurons, generator=generator(draw(seeds))) < num_alive
    active_GU = evenly_active(num_neurons, num_inputs, fan_in, draw(seeds)) & alive_G[:, None]
    rest = draw(st.integers(0, num_alive - 1)) if fan_in < num_inputs else 0
    num_planned = fan_in * num_alive + rest
    if not constant:
        num_planned = draw(st.integers(num_neurons, num_neurons * num_inputs))
    kind = draw(st.sampled_from(KINDS))
    return Account(
        name="w",
        active_GU=active_GU,
        drop_GU=scores_like(active_GU, kind, draw(seeds)),
        grow_GU=scores_like(active_GU, kind, draw(seeds)),
        num_planned=num_planned,
        is_output=draw(st.sampled_from([False, False, True])),
    )


#         weights                 gradients
#      9  8  .  .  .  .       0  0  0  1  0  0
#      7  1  .  .  .  .       0  0  5  0  0  0
#      2  3  .  .  .  .       6  0  0  0  0  4
ABLATED = Account(
    name="w",
    active_GU=torch.tensor([[True, True, False, False, False, False]] * 3),
    drop_GU=torch.tensor([[9.0, 8, 0, 0, 0, 0], [7, 1, 0, 0, 0, 0], [2, 3, 0, 0, 0, 0]]),
    grow_GU=torch.tensor([[0.0, 0, 0, 1, 0, 0], [0, 0, 5, 0, 0, 0], [6, 0, 0, 0, 0, 4]]),
    num_planned=6,
)


@pytest.mark.parametrize(
    ("fraction", "share", "is_output", "target", "keep"),
    [
        (0.0, 0.95, False, [2, 2, 2], [2, 2, 2]),  # all are salient
        (0.34, 1.0, False, [2, 2, 2], [2, 1, 1]),  # 1 and 2 go, 5 and 4 would come: 2, 2 and 2 salient
        (0.5, 0.99, False, [2, 2, 2], [2, 1, 0]),  # 9 8 7 stay, 5 4 1 would come: 3, 2 and 1, and floor(1.98) is 1
        (0.5, 1.0, False, [3, 3, 0], [2, 1, 0]),  # 2 are needed, so the third goes and the others take 3
        (0.5, 1.0, True, [2, 2, 2], [2, 1, 0]),  # an output layer keeps its neurons
        (0.67, 1.0, False, [2, 2, 2], [2, 0, 0]),  # 9 8 stay; 5 4 1 and a 0, the first, would come: 4, 1, 1, and a tie
        (1.0, 0.3, False, [2, 2, 2], [0, 0, 0]),  # 5 4 1 0 0 0 would come, the zeros to the first: 4, 1, 1
    ],
)
def test_ablation_by_hand(fraction: float, share: float, is_output: bool, target: list[int], keep: list[int]) -> None:
    a = replace(ABLATED, is_output=is_output)
    found = NeuronAblation(share)([a], Terms(num_total=6, drop_fraction=fraction))
    assert (targets(found), kept(found)) == ([target], [keep])
    given, exact_share = round(100 * fraction), Fraction(repr(share))
    assert ablation_reference(a, given, exact_share, all_gradients=False) == (target, keep)


def test_what_ablated_neurons_lose_is_part_of_what_is_dropped() -> None:
    """The third neuron's two weights are the 2 of floor(0.34·6): none of the others goes on top."""
    a = replace(ABLATED, grow_GU=torch.tensor([[0.0, 0, 3, 0, 0, 0], [0, 0, 2, 0, 0, 0], [0, 0, 1, 0, 0, 0]]))
    found = NeuronAblation(1.0)([a], Terms(num_total=6, drop_fraction=0.34))
    assert (targets(found), kept(found)) == ([[3, 3, 0]], [[2, 2, 0]])


def test_gradients_of_active_weights_count_on_request_and_once() -> None:
    """9, 8 and 7 would stay, and of the 3 largest gradients 6, 5 and 4 the last neuron has two: 2, 2 and 2 salient."""
    terms = Terms(num_total=6, drop_fraction=0.5)
    program = NeuronAblation(1.0, ranks_active_gradients=True)
    assert targets(program([ABLATED], terms)) == [[2, 2, 2]]
    a = replace(ABLATED, grow_GU=torch.tensor([[0.0, 0, 0, 1, 0, 0], [6, 0, 0, 0, 0, 0], [0, 0, 5, 4, 0, 0]]))
    assert targets(program([a], terms)) == [[3, 0, 3]]  # 7 and 6 are one weight: 2, 1 and 2
    assert targets(NeuronAblation(1.0)([ABLATED], terms)) == [[3, 3, 0]]  # 5, 4 and 1 would come: 3, 2 and 1


@pytest.mark.parametrize(
    ("share", "fan_in", "least"), [(0.95, 19, 18), (0.95, 1, 1), (0.3, 4, 1), (0.3, 6, 1), (0.3, 7, 2)]
)
def test_the_least_number_of_salient_weights_is_rounded_down(share: float, fan_in: int, least: int) -> None:
    """The last of three neurons has as many as it takes, or one fewer; the others have all."""
    active_GU = torch.arange(3 * fan_in)[None].expand(3, -1) < fan_in
    for num_salient in (least, least - 1):
        drop_GU = active_GU * 2.0
        drop_GU[2, num_salient:] *= 0.5
        grow_GU = torch.zeros(3, 3 * fan_in)
        grow_GU[0, fan_in:] = 1.0
        num_moved = fan_in - num_salient
        a = Account(name="w", active_GU=active_GU, drop_GU=drop_GU, grow_GU=grow_GU, num_planned=3 * fan_in)
        found = NeuronAblation(share)([a], Terms(num_total=3 * fan_in, drop_fraction=num_moved / (3 * fan_in)))
        assert bool(found.budgets[0].num_target_G[2]) == (num_salient == least)


def test_more_neurons_stay_than_hold_the_weights_without_room() -> None:
    """Three neurons of 2 of 3 inputs, two of them with less than a salient share: 2 hold 6, so all 3 stay."""
    a = Account(
        name="w",
        active_GU=torch.tensor([[True, True, False]] * 3),
        drop_GU=torch.tensor([[1.0, 1, 0], [2, 2, 0], [9, 9, 0]]),
        grow_GU=torch.tensor([[0.0, 0, 0], [0, 0, 0], [0, 0, 1]]),
        num_planned=6,
    )
    assert targets(NeuronAblation(1.0)([a], Terms(num_total=6, drop_fraction=0.67))) == [[2, 2, 2]]


def test_neurons_come_back_by_their_gradients() -> None:
    """Two of three neurons are left; the third has the largest of the gradients that count."""
    active_GU = torch.tensor([[False] * 4, [True, True, False, False], [True, True, False, False]])
    grow_GU = torch.tensor([[0.0, 5, 0, 0], [0, 0, 3, 0], [0, 0, 1, 0]])
    a = Account(name="w", active_GU=active_GU, drop_GU=active_GU.float(), grow_GU=grow_GU, num_planned=4)
    terms = Terms(num_total=4, drop_fraction=0.25)
    assert targets(NeuronAblation()([a], terms)) == [[1, 1, 1]]
    assert targets(NeuronAblation()([a], replace(terms, drop_fraction=0.0))) == [[0, 2, 2]]
    with_outputs = NeuronAblation()([replace(a, is_output=True)], replace(terms, drop_fraction=0.0))
    assert targets(with_outputs) == [[1, 1, 1]]


def test_a_decimal_share_of_the_fan_in_is_what_its_digits_say() -> None:
    """0.29 · 100 is 28.999999999999996, and 28 salient weights of 100 are too few."""
    active_GU = torch.arange(300)[None].expand(3, -1) < 100
    drop_GU, grow_GU = torch.zeros(3, 300), torch.zeros(3, 300)
    drop_GU[:2, :100], drop_GU[2, :28] = 2.0, 2.0
    grow_GU[0, 100:] = 1.0  # the 72 that would grow are the first neuron's
    a = Account(name="w", active_GU=active_GU, drop_GU=drop_GU, grow_GU=grow_GU, num_planned=300)
    terms = Terms(num_total=300, drop_fraction=0.24)
    assert targets(NeuronAblation(0.29)([a], terms)) == [[150, 150, 0]]
    assert targets(NeuronAblation(0.28)([a], terms)) == [[100, 100, 100]]


@given(layers() | layers(constant=False), percents, st.sampled_from([0.0, 0.3, 0.5, 0.55, 0.95, 1.0]), st.booleans())
def test_ablation_equals_plain_python(a: Account, percent: int, share: float, everywhere: bool) -> None:
    terms = Terms(num_total=a.num_planned, drop_fraction=percent / 100)
    found = NeuronAblation(share, ranks_active_gradients=everywhere)([a], terms)
    expected = ablation_reference(a, percent, Fraction(repr(share)), all_gradients=everywhere)
    assert (targets(found), kept(found)) == tuple([part] for part in expected)


@pytest.mark.parametrize("is_output", [False, True])
def test_fewer_weights_than_neurons_are_one_each(is_output: bool) -> None:
    """Of three neurons with 0, 1 and 2 salient weights, those with most stay; the layer keeps all that is planned."""
    for num_planned, expected in ((1, [0, 0, 1]), (2, [0, 1, 1]), (3, [1, 1, 1])):
        active_GU = torch.tensor([[False, False], [True, False], [True, True]])
        a = Account(
            name="w",
            active_GU=active_GU,
            drop_GU=active_GU.float(),
            grow_GU=torch.zeros(3, 2),
            num_planned=num_planned,
            is_output=is_output,
        )
        assert targets(NeuronAblation()([a], Terms(num_total=num_planned, drop_fraction=0.0))) == [expected]


@given(layers() | layers(constant=False), percents, st.sampled_from([0.3, 0.95, 1.0]))
def test_ablation_laws(a: Account, percent: int, share: float) -> None:
    """Where the density falls or rises, too, to less than one unit per neuron."""
    (budget,) = NeuronAblation(share)([a], Terms(num_total=a.num_planned, drop_fraction=percent / 100)).budgets
    after_G = carried_out(a, budget).sum(dim=1)
    num_alive, num_neurons = int((after_G > 0).sum()), len(after_G)
    assert bool((budget.num_kept_G <= a.active_GU.sum(dim=1)).all())
    assert bool((budget.num_kept_G <= budget.num_target_G).all())
    assert len(after_G[after_G > 0].unique()) == 1  # a constant fan-in
    assert a.num_planned - num_alive < int(after_G.sum()) <= a.num_planned
    assert num_alive >= min(a.num_planned // a.active_GU.shape[1] + 1, num_neurons, a.num_planned)
    if a.is_output:
        assert num_alive == min(num_neurons, a.num_planned)
    # those of ablated neurons are among the weights that go: beside them, those beyond the new fan-in alone
    num_active = int(a.active_GU.sum())
    num_left = int(a.active_GU[after_G > 0].sum())
    cut = bool((budget.num_kept_G == budget.num_target_G).any())
    assert cut or int(budget.num_kept_G.sum()) == min(num_active - num_active * percent // 100, num_left)


@given(st.integers(1, 6), st.integers(1, 6), seeds, percents)
def test_a_dense_layer_keeps_its_neurons(num_neurons: int, num_inputs: int, seed: int, percent: int) -> None:
    active_GU = torch.ones(num_neurons, num_inputs, dtype=torch.bool)
    drop_GU, grow_GU = (scores_like(active_GU, "distinct", seed + i) for i in range(2))
    a = Account(name="w", active_GU=active_GU, drop_GU=drop_GU, grow_GU=grow_GU, num_planned=active_GU.numel())
    (budget,) = NeuronAblation(1.0)([a], Terms(num_total=a.num_planned, drop_fraction=percent / 100)).budgets
    assert bool(carried_out(a, budget).all())


@given(layers(), seeds, st.integers(0, 60))
def test_over_many_updates_no_layer_dies_out(a: Account, seed: int, percent: int) -> None:
    """Scores are random at each, and the share is the strictest; what is planned stays, at a constant density."""
    for step in range(8):
        (budget,) = NeuronAblation(1.0)([a], Terms(num_total=a.num_planned, drop_fraction=percent / 100)).budgets
        after_GU = carried_out(a, budget)
        num_alive = int(after_GU.any(dim=1).sum())
        assert num_alive >= min(2, len(after_GU), a.num_planned)
        assert a.num_planned - num_alive < int(after_GU.sum()) <= a.num_planned
        drop_GU, grow_GU = (scores_like(after_GU, "signed", seed + 2 * step + i) for i in range(2))
        a = replace(a, active_GU=after_GU, drop_GU=drop_GU, grow_GU=grow_GU)


@given(st.lists(layers(), min_size=1, max_size=4), percents)
def test_each_layer_is_ablated_by_itself(found: list[Account], percent: int) -> None:
    terms = Terms(num_total=sum(a.num_planned for a in found), drop_fraction=percent / 100)
    together = NeuronAblation(0.5)(found, terms)
    alone = [NeuronAblation(0.5)([a], terms) for a in found]
    assert targets(together) == [targets(one)[0] for one in alone]
    assert kept(together) == [kept(one)[0] for one in alone]
    assert together.memory == 0.0


@given(folds(), seeds)
def test_any_granularity_gives_accounts(fold: tuple[object, torch.Size], seed: int) -> None:
    """N:M too, though its quotas are fixed: the scores of a weight are those of its units."""
    grain, shape = fold
    score_GU = unit_score(torch.rand(shape, generator=generator(seed)), shape, grain)  # type: ignore[arg-type]
    active_GU = torch.ones_like(score_GU, dtype=torch.bool)
    a = Account(name="w", active_GU=active_GU, drop_GU=score_GU, grow_GU=score_GU, num_planned=score_GU.numel())
    total = len(score_GU) if isinstance(grain, NM) else a.num_units
    for allocate in (global_units, momentum_share):
        (budget,) = allocate([a], Terms(num_total=total, drop_fraction=0.0)).budgets
        assert int(budget.num_target_G.sum()) == total


@pytest.mark.parametrize(
    "make",
    [
        lambda: AdaptiveThreshold(initial=0.0),
        lambda: AdaptiveThreshold(tolerance=-0.1),
        lambda: AdaptiveThreshold(factor=1.0),
        lambda: NeuronAblation(-0.1),
        lambda: NeuronAblation(1.1),
    ],
)
def test_settings_out_of_range_are_refused(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SettingError, match=r"(settings of AdaptiveThreshold|min_share of NeuronAblation): expected"):
        make()
