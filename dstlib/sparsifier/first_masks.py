"""The first masks: each weight by itself, or all together from one look at the model."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from dstlib.errors import ScoreError
from dstlib.masking import NM, AtInit, Budget, Terms, falling, num_units, random, spend
from dstlib.masking.update import zero_outside_
from dstlib.sparsifier.masked import Masked
from dstlib.sparsifier.plan import Plan
from dstlib.sparsifier.update import Scored, accounts_of, check_budgets, exchange_site, make_site, rank, views_of


def choose_first_masks(masked: Sequence[Masked], plan: Plan) -> Plan:
    """Chooses the masks before training; returns the plan with the densities that came of it.

    Errors: ScoreError for scores that cannot be ranked.
    """
    init = plan.method.init
    if isinstance(init, AtInit):
        return _ranked_together(masked, plan, init)
    for m, view in views_of(masked):
        site = make_site(m, view, plan, 0)
        score_GU = rank(site, init(site), plan)
        site.mask.zero_()
        scored = Scored(site, torch.zeros_like(score_GU, dtype=torch.bool), score_GU, score_GU)
        exchange_site(scored, _own_budget(scored, plan), plan)
    return plan


def _ranked_together(masked: Sequence[Masked], plan: Plan, init: AtInit) -> Plan:
    """Rounds of scores and pruning from dense, the budgets shared; then the densities are those of the masks."""
    fold = plan.method.granularity.fold
    groups = {view.name: fold(view.of(m.mask)).shape[:2] for m, view in views_of(masked)}
    fixed = set(groups) if isinstance(plan.method.granularity, NM) else plan.own  # N:M leaves nothing to share
    shared = [name for name in groups if name not in fixed]
    num_last = sum(num_units(groups[n][1], plan.densities[n]) * groups[n][0] for n in shared)
    num_all = sum(groups[n].numel() for n in shared)
    for num_total in falling(num_all, num_last, init.rounds) if shared else [0]:
        scored = _scores(masked, plan, init)
        accounts = accounts_of(scored, masked, plan, fixed=fixed)
        terms = Terms(num_total=max(num_total, sum(groups[n][0] for n in shared)), drop_fraction=0.0)
        given = init.allocate(accounts, terms).budgets if accounts else ()
        check_budgets(given, accounts, terms.num_total, init.name)
        budgets = {account.name: budget for account, budget in zip(accounts, given, strict=True)}
        for x in scored:
            exchange_site(x, budgets.get(x.site.name) or _own_budget(x, plan), plan)
        for m in masked:
            zero_outside_(m.parameter, m.mask)
    for m in masked:
        m.ranked = tuple(float(fold(view.of(m.mask))[0, :, 0].double().mean()) for view in m.weight.views)
    ranked = replace(plan, is_ranked=True, method=replace(plan.method, init=random))  # lets go of the model
    return with_densities(ranked, masked)


def with_densities(plan: Plan, masked: Sequence[Masked]) -> Plan:
    """The plan with the densities that came of a look at the model."""
    densities = {s.name: d for m in masked for s, d in zip(m.weight.views, m.ranked, strict=True)}
    return replace(plan, densities=densities)


def _scores(masked: Sequence[Masked], plan: Plan, init: AtInit) -> list[Scored]:
    scores = init.scores([m.parameter for m in masked])
    found = []
    for m, score in zip(masked, scores, strict=True):
        if score is None:
            remedy = "Run all of the model in it, or leave this weight out by exclude=."
            allowed = "a loss or output that depends on it"
            raise ScoreError.of(
                f"{init.name} scores", m.weight.name, allowed=allowed, given="one that does not", remedy=remedy
            )
        for view in m.weight.views:
            site = make_site(m, view, plan, 0)
            score_GU = rank(site, view.of(score), plan)
            found.append(Scored(site, plan.method.granularity.fold(site.mask)[..., 0], score_GU, score_GU))
    return found


def _own_budget(x: Scored, plan: Plan) -> Budget:
    num_target = plan.num_target(x.site.name, x.active_GU.shape[1], 0)
    return spend(x.active_GU.sum(dim=1), num_target=num_target, drop_fraction=0.0)
