"""What every allocator keeps to: budgets that can be met, and that meet the total.

Shapes: G groups, U units per group.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from numbers import Real

import torch
from torch import Tensor

from dstlib.masking import Account, Allocation, Allocator, Budget, Terms, num_units
from dstlib.testing.laws import BreachError, Law, Rules, attempt, expect, global_state, hold, laws, world

# (G, U) of each weight: without groups, and outputs that compete within themselves
MODELS = {"elements": ((1, 40), (1, 9), (1, 120)), "fan-in": ((4, 10), (3, 3), (8, 15)), "one weight": ((1, 30),)}


@dataclass(frozen=True)
class Problem:
    """Accounts and terms, with words for them."""

    what: str
    accounts: tuple[Account, ...]
    terms: Terms

    def __str__(self) -> str:
        t = self.terms
        return f"{self.what}: {t.num_total} units, drop fraction {t.drop_fraction:g}, memory {t.memory:g}"

    @property
    def slack(self) -> int:
        """What may stay unspent, as it does not divide into groups."""
        return sum(len(account.active_GU) - 1 for account in self.accounts)


def check_allocator(allocator: Allocator) -> None:
    """Holds an allocator to its laws: a third of the units active, and a total that stays, falls or rises.

    - *an allocation*: a budget for each account, in their order, of whole numbers (G,), and a finite memory.
    - *changes nothing*: the accounts stay as they were.
    - *feasible*: in each group, 0 ≤ kept ≤ active and kept ≤ target ≤ all.
    - *total*: the targets add up to ``num_total``; with several groups, to less than one unit per group below it.
    - *repeatable*: the same accounts and terms, memory included, give the same budgets, under any global seed,
      whose generators it leaves where they stand.

    Raises:
        LawError: The first law that is broken.

    >>> from dstlib.masking import AdaptiveThreshold, lamp
    >>> check_allocator(lamp)
    >>> check_allocator(AdaptiveThreshold(tolerance=0.2))
    """
    hold(allocator_laws(allocator))


def allocator_laws(allocator: Allocator) -> tuple[Law, ...]:
    """Returns the laws of :func:`check_allocator`, one by one."""
    return laws("allocator", allocator, LAWS, allocator)


def _an_allocation(allocator: Allocator, problem: Problem) -> None:
    _allocate(allocator, problem)


def _changes_nothing(allocator: Allocator, problem: Problem) -> None:
    given = copy.deepcopy(problem)
    _allocate(allocator, given)
    for before, after in zip(problem.accounts, given.accounts, strict=True):
        for name in ("active_GU", "drop_GU", "grow_GU"):
            is_same = torch.equal(getattr(before, name), getattr(after, name))
            remedy = "An allocator only looks: the exchange of units is the library's."
            expect(is_same, f"{name} of {before.name} as it was", got="other values", remedy=remedy)


def _feasible(allocator: Allocator, problem: Problem) -> None:
    for account, budget in zip(problem.accounts, _allocate(allocator, problem).budgets, strict=True):
        kept_G, target_G = budget.num_kept_G, budget.num_target_G
        active_G, num_all = account.active_GU.sum(dim=1), account.active_GU.shape[1]
        is_met = (kept_G >= 0) & (kept_G <= active_G) & (kept_G <= target_G) & (target_G <= num_all)
        expected = f"0 ≤ kept ≤ active and kept ≤ target ≤ all in {account.name}"
        got = f"kept {kept_G.tolist()}, active {active_G.tolist()}, target {target_G.tolist()}, all {num_all}"
        remedy = "Take torch.minimum of kept and target; what does not fit into one weight goes to another."
        expect(is_met.all(), expected, got=got, remedy=remedy)


def _total(allocator: Allocator, problem: Problem) -> None:
    num_given = sum(int(budget.num_target_G.sum()) for budget in _allocate(allocator, problem).budgets)
    num_total, slack = problem.terms.num_total, problem.slack
    expected = f"targets that add up to {num_total}" + f", or up to {slack} below" * bool(slack)
    remedy = "Round last: dstlib.masking.counts.apportion splits a total into whole numbers that add up."
    expect(num_total - slack <= num_given <= num_total, expected, got=num_given, remedy=remedy)


def _repeatable(allocator: Allocator, problem: Problem) -> None:
    first = _allocate(allocator, problem)
    with world(1):
        before = global_state()
        again = allocator(problem.accounts, problem.terms)
        has_moved = global_state() != before
    is_same = again.memory == first.memory and all(
        torch.equal(x.num_kept_G, y.num_kept_G) and torch.equal(x.num_target_G, y.num_target_G)
        for x, y in zip(first.budgets, again.budgets, strict=True)
    )
    got = "draws from a global generator" if has_moved else "others"
    remedy = "What it is to remember goes into Allocation.memory, a number that is saved and handed back."
    expect(is_same and not has_moved, "the same budgets again", got=got, remedy=remedy)


def _problems(allocator: Allocator) -> Iterator[Problem]:
    ways = (("stays", 1 / 3), ("falls", 0.2), ("rises", 0.7), ("is one per group", 0.0), ("is all", 1.0))
    terms = (("distinct", 0.0, 0.0), ("distinct", 0.3, 0.25), ("distinct", 1.0, 0.0), ("zero", 0.3, 0.0))
    for (model, shapes), (way, density), (scores, share, memory) in product(MODELS.items(), ways, terms):
        accounts = _accounts(shapes, scores, density)
        num_total = sum(account.num_planned for account in accounts)
        what = f"{model}, {scores} scores, the total {way}"
        yield Problem(what, accounts, Terms(num_total=num_total, drop_fraction=share, memory=memory))


LAWS: Rules[Allocator] = dict.fromkeys((_an_allocation, _changes_nothing, _feasible, _total, _repeatable), _problems)


def _accounts(shapes: Sequence[tuple[int, int]], scores: str, density: float) -> tuple[Account, ...]:
    accounts = []
    for i, (num_groups, num_all) in enumerate(shapes):
        order_GU, drop_GU, grow_GU = (_noise(num_groups, num_all, 3 * i + k) for k in range(3))
        if scores == "zero":
            drop_GU, grow_GU = torch.zeros_like(drop_GU), torch.zeros_like(grow_GU)
        accounts.append(
            Account(
                name=f"layer{i}",
                active_GU=order_GU.argsort(dim=1).argsort(dim=1) < num_units(num_all, 1 / 3),
                drop_GU=drop_GU.abs(),
                grow_GU=grow_GU.abs(),
                num_planned=num_groups * num_units(num_all, density),
                is_output=i == len(shapes) - 1,
            )
        )
    return tuple(accounts)


def _noise(num_groups: int, num_all: int, seed: int) -> Tensor:
    return torch.randn(num_groups, num_all, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")


def _allocate(allocator: Allocator, problem: Problem) -> Allocation:
    """What an allocator returns, once it is known to be an allocation."""
    law, remedy = "an allocation", "Return Allocation(tuple of Budget(num_kept_G, num_target_G)), int64 tensors each."
    expected = f"an Allocation with {len(problem.accounts)} budgets of whole numbers per group"
    with world(0):
        call = partial(allocator, problem.accounts, problem.terms)
        found = attempt(call, expected, remedy=remedy, law=law)
    fits = (
        isinstance(found, Allocation)
        and len(found.budgets) == len(problem.accounts)
        and all(
            isinstance(budget, Budget) and all(_is_whole(x, a) for x in (budget.num_kept_G, budget.num_target_G))
            for budget, a in zip(found.budgets, problem.accounts, strict=True)
        )
    )
    if not fits or not isinstance(found.memory, Real) or not math.isfinite(found.memory):
        raise BreachError(expected, got=repr(found), remedy=remedy, law=law)
    return found


def _is_whole(num_G: Tensor, account: Account) -> bool:
    is_tensor = isinstance(num_G, Tensor) and num_G.shape == account.active_GU.shape[:1]
    return is_tensor and num_G.dtype in (torch.int32, torch.int64)
