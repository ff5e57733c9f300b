"""Mask updates of weights in training: sites are made, scored, given budgets, and exchanged in place.

Called by the controller alone. Changes masks and grown weights; clearing what fell outside is the caller's.
"""

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dstlib.errors import ScoreError, SettingError
from dstlib.masking import (
    Account,
    Budget,
    MaskUpdate,
    Site,
    Terms,
    exchange,
    num_units,
    select_top,
    site_generator,
    unit_mask,
    unit_score,
)
from dstlib.sparsifier.masked import Masked
from dstlib.sparsifier.plan import Plan
from dstlib.targets import MatrixView

Observer = Callable[[Site, MaskUpdate], None]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the optimizer's step shows of one weight: its full gradient and momentum, None where there is none."""

    grad: Tensor | None = None
    momentum: Tensor | None = None


class Scored(NamedTuple):
    """A site with its unit scores, (G, U) each."""

    site: Site
    active_GU: Tensor
    drop_GU: Tensor
    grow_GU: Tensor


NOTHING = Seen()


def make_site(m: Masked, view: MatrixView, plan: Plan, step: int, seen: Seen = NOTHING) -> Site:
    """One matrix view of a weight at a step, as criteria see it."""

    def part(x: Tensor | None) -> Tensor | None:
        return None if x is None else view.of(x)

    return Site(
        name=view.name,
        weight=view.of(m.parameter.detach()),
        mask=view.of(m.mask),
        grad=part(seen.grad),
        momentum=part(seen.momentum),
        step=step,
        generator=site_generator(plan.seed, step, view.name),
        trace=part(m.trace),
        progress=plan.clock.progress(step),
    )


def update_each(m: Masked, plan: Plan, step: int, seen: Seen, observers: Sequence[Observer]) -> None:
    """An update of one weight that keeps its own number of active units."""
    for view in m.weight.views:
        scored = score_site(make_site(m, view, plan, step, seen), plan)
        budget = plan.budget(view.name, scored.active_GU, step)
        _apply(scored, budget, plan, observers)


def update_together(
    due: Sequence[tuple[Masked, Seen]], masked: Sequence[Masked], plan: Plan, step: int, memory: float
) -> tuple[list[tuple[Scored, Budget]], float]:
    """Budgets for weights that share one, by the method's allocator; changes nothing yet.

    ``masked`` are all sparse weights, whether due or not: those that are not keep what they have.
    """
    method = plan.method
    assert method.allocate is not None
    sites = [make_site(m, view, plan, step, seen) for m, seen in due for view in m.weight.views]
    scored = [score_site(site, plan) for site in sites]
    budgets = {x.site.name: plan.budget(x.site.name, x.active_GU, step) for x in scored if x.site.name in plan.own}
    accounts = accounts_of(scored, masked, plan, fixed=plan.own)
    if accounts:
        terms = Terms(
            num_total=_shared_total(accounts, masked, plan), drop_fraction=plan.drop_fraction(step), memory=memory
        )
        allocation = method.allocate(accounts, terms)
        memory = allocation.memory
        check_budgets(allocation.budgets, accounts, terms.num_total, method.name)
        budgets |= {account.name: b for account, b in zip(accounts, allocation.budgets, strict=True)}
    return [(x, budgets[x.site.name]) for x in scored], memory


def apply_together(updates: Iterable[tuple[Scored, Budget]], plan: Plan, observers: Sequence[Observer]) -> None:
    """Carries out what ``update_together`` found."""
    for scored, budget in updates:
        _apply(scored, budget, plan, observers)


def gather(m: Masked, plan: Plan, grad: Tensor) -> None:
    """Adds a step's gradient to the trace, if this is one of its steps and some update will read it."""
    trace, step = plan.method.trace, m.step + 1
    assert trace is not None
    horizon = sys.maxsize if trace.steps is None else step + trace.steps - 1
    if m.traced_at == step or plan.clock.latest(horizon) <= m.updated_at:  # done, or no update is to come by then
        return
    if m.trace is None:
        m.trace = torch.zeros_like(m.parameter, dtype=torch.promote_types(m.parameter.dtype, torch.float32))
    for view in m.weight.views:
        site = make_site(m, view, plan, step, Seen(grad=grad))
        view.of(m.trace).mul_(trace.decay).add_(trace.of(site))
    m.traced_at = step


def spread_reach(m: Masked, plan: Plan, step: int) -> None:
    """Under dense storage, marks what learns: the active units, and the next best by the growth score."""
    storage = plan.method.storage
    if storage is None or storage.extra is None:
        return
    m.reach = torch.zeros_like(m.mask)
    for view in m.weight.views:
        site = make_site(m, view, plan, step)
        active_GU = plan.method.granularity.fold(site.mask)[..., 0]
        num_active_G = active_GU.sum(dim=1)
        num_extra_G = (active_GU.shape[1] - num_active_G).clamp(max=num_units(active_GU.shape[1], storage.extra))
        grow_GU = rank(site, plan.method.grow(site), plan)
        extra_GU = select_top(grow_GU, num_extra_G, among_GU=~active_GU)
        view.of(m.reach).copy_(unit_mask(active_GU | extra_GU, plan.method.granularity, site.mask.shape))


def pull_hidden(m: Masked, plan: Plan, scale: float) -> None:
    """Adds the pull towards zero of hidden weights to their gradient, which carries this loss scale."""
    storage, grad = plan.method.storage, m.parameter.grad
    assert storage is not None
    assert grad is not None
    assert m.hidden is not None
    for view in m.weight.views:
        pull = scale * storage.decay(plan.densities[view.name])
        if pull:
            view.of(grad).add_(view.of(m.hidden), alpha=pull)


def views_of(masked: Iterable[Masked]) -> Iterator[tuple[Masked, MatrixView]]:
    """Every view of every weight, in the model's order."""
    return ((m, view) for m in masked for view in m.weight.views)


def check_budgets(budgets: Sequence[Budget], accounts: Sequence[Account], num_total: int, method: str) -> None:
    """A SettingError if an allocator's budgets cannot be met, or miss the total by a whole group or more."""
    fit = len(budgets) == len(accounts) and all(
        bool(((b.num_kept_G >= 0) & (b.num_kept_G <= b.num_target_G)).all())
        and bool((b.num_kept_G <= a.active_GU.sum(dim=1)).all())
        and int(b.num_target_G.max()) <= a.active_GU.shape[1]
        for b, a in zip(budgets, accounts, strict=False)
    )
    num_given = sum(int(b.num_target_G.sum()) for b in budgets)
    slack = sum(len(a.active_GU) - 1 for a in accounts)
    if not fit or not num_total - slack <= num_given <= num_total:
        raise SettingError.of(
            "allocation",
            f"method {method}",
            allowed=f"a budget for each of {len(accounts)} weights, kept ≤ active, kept ≤ target ≤ all, and "
            f"{num_total:,} active units in sum",
            given=f"{len(budgets)} budgets with {num_given:,} units" + ("" if fit else " that cannot be met"),
            remedy="Look at the method's allocate.",
        )


def _shared_total(accounts: Sequence[Account], masked: Iterable[Masked], plan: Plan) -> int:
    """The active units that the accounts have together after the update.

    Weights that still wait for a gradient may hold more or fewer units than they were planned to: so many
    fewer or more are left for the others, but at least one per group.
    """
    num_total = sum(account.num_planned for account in accounts)
    here = {account.name for account in accounts}
    for m, view in views_of(masked):
        if view.name not in here | plan.own:
            active_GU = plan.method.granularity.fold(view.of(m.mask))[..., 0]
            num_missing = _planned(plan, view.name, active_GU, m.updated_at) - int(active_GU.sum())
            num_total += int(num_missing / len(active_GU)) * len(active_GU)  # the rest did not divide, and lies idle
    least, most = (sum(len(a.active_GU) for a in accounts), sum(a.num_units for a in accounts))
    return min(max(num_total, least), most)


def _planned(plan: Plan, name: str, active_GU: Tensor, step: int) -> int:
    return plan.num_target(name, active_GU.shape[1], step) * len(active_GU)


def accounts_of(
    scored: Iterable[Scored], masked: Iterable[Masked], plan: Plan, *, fixed: Collection[str]
) -> list[Account]:
    """What an allocator sees of these sites, but for those whose numbers are ``fixed``."""
    *_, (_, last) = views_of(masked)
    return [
        Account(
            name=x.site.name,
            active_GU=x.active_GU,
            drop_GU=x.drop_GU,
            grow_GU=x.grow_GU,
            num_planned=_planned(plan, x.site.name, x.active_GU, x.site.step),
            is_last=x.site.name == last.name,
        )
        for x in scored
        if x.site.name not in fixed
    ]


def score_site(site: Site, plan: Plan) -> Scored:
    """What the method's criteria say of it."""
    method = plan.method
    active_GU = method.granularity.fold(site.mask)[..., 0]
    return Scored(site, active_GU, rank(site, method.drop(site), plan), rank(site, method.grow(site), plan))


def rank(site: Site, score: Tensor, plan: Plan) -> Tensor:
    """Unit scores; says which weight it was whose scores cannot be ranked."""
    try:
        return unit_score(score, site.mask.shape, plan.method.granularity)
    except ScoreError as error:
        raise ScoreError(f"{site.name} at step {site.step}: {error}") from error


def exchange_site(scored: Scored, budget: Budget, plan: Plan) -> MaskUpdate:
    """Changes the mask of a site as its scores and budget say."""
    method = plan.method
    update = exchange(
        scored.site.mask,
        scored.drop_GU,
        scored.grow_GU,
        granularity=method.granularity,
        budget=budget,
        regrow=method.regrow,
    )
    scored.site.mask.copy_(update.mask)
    return update


def _apply(scored: Scored, budget: Budget, plan: Plan, observers: Iterable[Observer]) -> None:
    update, site = exchange_site(scored, budget, plan), scored.site
    site.weight.copy_(torch.where(update.grown, plan.method.grown_init(site), site.weight))
    for observe in observers:
        observe(site, update)
