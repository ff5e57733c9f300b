"""Mask updates of weights in training, the first masks among them: sites are made, scored, given budgets, exchanged.

Changes masks and grown weights in place; clearing what fell outside is the caller's.
"""

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dstlib import masking
from dstlib.errors import ScoreError, few, require
from dstlib.masking import NM, Account, AtInit, Budget, InTurn, MaskUpdate, PackedMask, Site, Terms
from dstlib.masking.update import zero_outside_
from dstlib.sparsifier.by_tiles import (
    MOST,
    Matrix,
    goes_by_tiles,
    has_whole_kernels,
    places_of,
    update_by_tiles,
)
from dstlib.sparsifier.plan import Plan
from dstlib.sparsifier.scores import score_units
from dstlib.sparsifier.state import MaskedWeight, SavedWeight, groups_of
from dstlib.targets import MatrixView

Observer = Callable[[Site, MaskUpdate], None]


def update_masks(
    due: Iterable[tuple[MaskedWeight, Tensor | None, Tensor | None]],
    masked: Sequence[MaskedWeight],
    plan: Plan,
    *,
    step: int,
    memory: float,
    observers: Sequence[Observer],
) -> float:
    """Updates the masks of the weights that are due, with one allocation for all; returns the allocator's memory.

    ``due`` are weights with their full gradients, and their momenta where the optimizer keeps any; frozen ones have no
    gradient. ``masked`` are all sparse weights, whether due or not: those that are not keep what they have.

    Raises:
        ScoreError: A criterion returned scores by which units cannot be ordered.
        SettingError: The method's allocator gave budgets that cannot be met.
    """
    method = plan.method
    scored = []
    for m, grad, momentum in due:
        if not observers and _update_by_tiles(m, grad, plan, step):
            continue
        for view in _unsettled(m):
            site = make_site(m, view, plan, step, grad, momentum)
            pruned = _prune(site, plan)
            scored.append((m, view, site, pruned, score_units(pruned, _drop_score(pruned, plan), plan)))
    accounts: list[Account] = []
    known: dict[str, Tensor] = {}  # scores of growth that do not depend on what will be dropped
    for m, _, site, _, drop_GU in scored if method.allocate is not None else ():
        if site.name not in plan.own:
            account, is_final = _account_at_update(m, site, drop_GU, plan)
            accounts.append(account)
            known |= {site.name: account.grow_GU} if is_final else {}
    budgets: dict[str, Budget] = {}
    if method.allocate is not None and accounts:
        num_total = _shared_total(accounts, masked, plan)
        fraction = plan.drop_fraction(step)
        terms = Terms(num_total=num_total, drop_fraction=fraction, memory=memory, round_up=method.round_up)
        allocation = masking.share_out(method.allocate, accounts, terms)
        budgets, memory = _by_name(allocation.budgets, accounts, num_total, method.name), allocation.memory
    for m, view, site, pruned, drop_GU in scored:
        active_GU = method.granularity.fold(pruned.mask)[..., 0]
        budget = budgets.get(site.name) or plan.budget(site.name, active_GU.sum(dim=1), active_GU.shape[1], step)
        kept_GU = masking.keep(active_GU, drop_GU, budget)
        kept = masking.unit_mask(kept_GU, method.granularity, site.mask.shape)
        if (grow_GU := known.get(site.name)) is None:
            grow_GU = score_units(site, _grow_score(replace(site, mask=kept, mask_before=site.mask), plan), plan)
        change = _exchange(m, site, plan, drop_GU, grow_GU, budget, kept_GU)
        if _is_last(change, kept_GU, site, plan):
            _settle(m, view)
        _carry_out(m, view, site, change, plan, observers)
    return memory


def _update_by_tiles(m: MaskedWeight, grad: Tensor | None, plan: Plan, step: int) -> bool:
    """Updates the mask of a weight a few rows at a time, as all at once would; False where that cannot be."""
    if not goes_by_tiles(plan.method) or m.hidden is not None or not m.parameter.is_cpu:
        return False
    if m.parameter.numel() > MOST:
        return False
    mask, weight = m.mask, m.parameter.detach()
    changes: list[tuple[MatrixView, Tensor]] = []
    for view in m.weight.views:
        parts = [view.of(mask), view.of(weight), *([] if grad is None else [view.of(grad)])]
        shape, grain = parts[0].shape, plan.method.granularity
        if not all(part.is_contiguous() for part in parts):
            return False
        if isinstance(grain, masking.Element):  # taps are entries of a row like any other
            parts = [part.flatten(1) for part in parts]
        elif not has_whole_kernels(grain, shape):
            return False
        before, values, *gradient = parts
        places = places_of(before)
        of_rows = None if grad is None else partial(_rows, gradient[0])
        matrix = Matrix(view.name, before.shape, places, values.flatten(0, 1)[places], of_rows)
        now = torch.zeros(before.shape[:2].numel(), dtype=torch.bool)
        now[update_by_tiles(matrix, plan, step)] = True
        size = *before.shape[:2], *(1 for _ in before.shape[2:])
        now = now.view(size).expand(before.shape).reshape(shape)
        if m.is_output and not bool(now.flatten(1).any(dim=1).all()):
            return False
        changes.append((view, now))
    for view, now in changes:
        if grad is not None:
            nothing = weight.new_zeros(()).expand(now.shape)  # where something else may have written
            view.write_where(weight, now & ~view.of(mask), nothing)
        m.write_mask(view, now)
    return True


def _rows(x: Tensor, first: int, last: int) -> Tensor:
    return x[first:last]


def fill_first_masks(m: MaskedWeight, grad: Tensor, plan: Plan, *, step: int, observers: Sequence[Observer]) -> None:
    """Gives each output that the first mask has left without a weight one by chance, for the smallest of others."""
    for view in m.weight.views:
        site = make_site(m, view, plan, step, grad)
        if bool(site.mask.flatten(1).any(dim=1).all()):
            continue
        nothing = torch.zeros_like(site.mask)
        stays = MaskUpdate(site.mask.clone(), nothing, nothing, idle_G=nothing.new_zeros(1))
        drop_GU, grow_GU = (score_units(site, score(site), plan) for score in (masking.magnitude, masking.random))
        change = masking.fill_outputs(stays, drop_GU, grow_GU, granularity=plan.method.granularity)
        if bool(change.grown.any()):  # units may be too few, or too large, to go round: that is no update
            _carry_out(m, view, site, change, plan, observers)


def choose_first_masks(masked: Sequence[MaskedWeight], plan: Plan) -> Plan:
    """Chooses the masks before training; returns the plan with the densities that came of it.

    Raises:
        ScoreError: The method's ``init`` returned scores by which units cannot be ordered.
    """
    init = plan.method.init
    if isinstance(init, AtInit):
        return _prune_together(masked, plan, init)
    if isinstance(init, InTurn):
        return _prune_in_turn(masked, plan, init)
    for m, view in views_of(masked):
        site = make_site(m, view, plan, 0)
        active_GUE = plan.method.granularity.fold(site.mask)
        num_target = _num_planned(plan, view.name, active_GUE[..., 0], 0) * active_GUE.shape[2]
        site = replace(site, num_target=num_target)
        account = _account(m, site, plan, score_units(site, init(site), plan))
        change = _exchange(m, site, plan, account.drop_GU, account.grow_GU, _first_budget(account))
        m.write_mask(view, change.mask)
    return plan


def with_densities(plan: Plan, masked: Sequence[MaskedWeight | SavedWeight]) -> Plan:
    """Returns the plan with the densities that came of a look at the model, and the starts of a ramp if they did."""
    densities = {view.name: d for m in masked for view, d in zip(m.weight.views, m.densities, strict=True)}
    starts = {view.name: d for m in masked if m.starts for view, d in zip(m.weight.views, m.starts, strict=True)}
    return replace(plan, densities={**plan.densities, **densities}, starts={**plan.starts, **starts})


def gather(m: MaskedWeight, plan: Plan, grad: Tensor) -> None:
    """Adds a step's gradient to the trace, if this is one of its steps and some update will read it."""
    trace, step = plan.method.trace, m.step + 1
    assert trace is not None
    horizon = sys.maxsize if trace.steps is None else step + trace.steps - 1
    if m.traced_at == step or plan.clock.latest(horizon) <= m.updated_at:  # done, or no update is to come by then
        return
    if m.trace is None:
        m.trace = torch.zeros_like(m.parameter, dtype=torch.promote_types(m.parameter.dtype, torch.float32))
    for view in m.weight.views:
        site = make_site(m, view, plan, step, grad)
        view.write(m.trace, view.of(m.trace) * trace.decay + trace.of(site))
    m.traced_at = step


def spread_reach(m: MaskedWeight, plan: Plan, step: int) -> None:
    """Marks what learns under dense storage: the active units, and the next best by the growth score."""
    storage = plan.method.storage
    if storage is None or storage.extra is None:
        return
    reach = torch.zeros_like(m.mask)
    for view in m.weight.views:
        site = make_site(m, view, plan, step)
        active_GU = plan.method.granularity.fold(site.mask)[..., 0]
        num_extra_G = (~active_GU).sum(dim=1).clamp(max=masking.num_units(active_GU.shape[1], storage.extra))
        grow_GU = score_units(site, plan.method.grow(site), plan)
        extra_GU = masking.select_top(grow_GU, num_extra_G, among_GU=~active_GU)
        view.write(reach, masking.unit_mask(active_GU | extra_GU, plan.method.granularity, site.mask.shape))
    m.reach = PackedMask.of(reach)


def pull_hidden(m: MaskedWeight, plan: Plan, scale: float) -> None:
    """Adds the pull towards zero of hidden weights to their gradient, which carries this loss scale."""
    storage, grad = plan.method.storage, m.parameter.grad
    assert storage is not None
    assert grad is not None
    assert m.hidden is not None
    hidden = m.hidden if m.soft is None else m.hidden.masked_fill(m.mask, 0.0)
    for view in m.weight.views:
        pull = scale * storage.decay(plan.densities[view.name])
        if pull:
            view.write(grad, view.of(grad).add(view.of(hidden), alpha=pull))


def views_of(masked: Iterable[MaskedWeight]) -> Iterator[tuple[MaskedWeight, MatrixView]]:
    """Yields every matrix view of every weight, in the model's order."""
    return ((m, view) for m in masked for view in m.weight.views)


def make_site(
    m: MaskedWeight, view: MatrixView, plan: Plan, step: int, grad: Tensor | None = None, momentum: Tensor | None = None
) -> Site:
    """Returns one matrix view of a weight at a step, as criteria see it."""

    def part(x: Tensor | None) -> Tensor | None:
        return None if x is None else view.of(x)

    return Site(
        name=view.name,
        weight=view.of(m.parameter.detach()),
        mask=view.of(m.mask),
        grad=part(grad),
        momentum=part(momentum),
        step=step,
        generator=masking.site_generator(plan.seed, step, view.name),
        trace=part(m.trace),
        progress=plan.clock.progress(step),
    )


def _unsettled(m: MaskedWeight) -> list[MatrixView]:
    """Returns the views whose updates the method's ``early_stop`` has not ended."""
    settled = m.settled or (False,) * len(m.weight.views)
    return [view for view, ends in zip(m.weight.views, settled, strict=True) if not ends]


def _settle(m: MaskedWeight, view: MatrixView) -> None:
    """Notes that a view has had its last update."""
    left = _unsettled(m)
    m.settled = tuple(v is view or v not in left for v in m.weight.views)


def _is_last(change: MaskUpdate, kept_GU: Tensor, site: Site, plan: Plan) -> bool:
    """Whether too much of what grew, where there was a reason to grow, had just been dropped."""
    if plan.method.early_stop is None or site.grad is None:
        return False
    new_GU, grown_GU = (plan.method.granularity.fold(mask)[..., 0] for mask in (change.mask, change.grown))
    came_GU = new_GU & ~kept_GU & ~change.idle_G[:, None]
    return float((came_GU & ~grown_GU).sum() / came_GU.sum().clamp(min=1)) > plan.method.early_stop


def _prune(site: Site, plan: Plan) -> Site:
    """Returns a site with what the method's ``prune`` leaves of it, as its density falls."""
    method = plan.method
    if method.prune is None or site.grad is None:
        return site
    active_GU = method.granularity.fold(site.mask)[..., 0]
    num_target = plan.num_target(site.name, active_GU.shape[1], site.step)
    num_left_G = active_GU.sum(dim=1).clamp(max=num_target)
    left_GU = masking.select_top(score_units(site, method.prune(site), plan), num_left_G, among_GU=active_GU)
    return replace(site, mask=masking.unit_mask(left_GU, method.granularity, site.mask.shape))


def _drop_score(site: Site, plan: Plan) -> Tensor:
    """Returns what a site is dropped by; without a gradient, magnitude."""
    return masking.magnitude(site) if site.grad is None else plan.method.drop(site)


def _grow_score(site: Site, plan: Plan) -> Tensor:
    """Returns what a site is grown by; without a gradient, no reason at all."""
    return torch.zeros_like(site.weight) if site.grad is None else plan.method.grow(site)


def _account_at_update(m: MaskedWeight, site: Site, drop_GU: Tensor, plan: Plan) -> tuple[Account, bool]:
    """Returns a site as allocators see it, before anything is dropped, and whether its scores of growth are final.

    Those of a criterion that looks at the mask are not, as what is left depends on what allocators say: it scores
    again then, and draws the same numbers.
    """
    again = torch.Generator("cpu").set_state(site.generator.get_state())
    seen = _Seen(**{**vars(site), "generator": again})
    grow_GU = score_units(site, _grow_score(seen, plan), plan)
    if is_final := not seen.reads:
        site.generator.set_state(again.get_state())
    account = _account(m, site, plan, drop_GU, grow_GU)
    return replace(account, num_planned_before=_num_planned(plan, site.name, account.active_GU, m.updated_at)), is_final


class _Seen(Site):
    """A site that notes whether anybody looks at its mask, which is then in ``reads``."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("mask", "mask_before"):
            vars(self).setdefault("_reads", set()).add(name)
        return super().__getattribute__(name)

    @property
    def reads(self) -> frozenset[str]:
        return frozenset(vars(self).get("_reads", ()))


def _account(m: MaskedWeight, site: Site, plan: Plan, drop_GU: Tensor, grow_GU: Tensor | None = None) -> Account:
    """Returns a site as allocators see it; a single score says what is kept and what is grown."""
    active_GU = plan.method.granularity.fold(site.mask)[..., 0]
    return Account(
        name=site.name,
        active_GU=active_GU,
        drop_GU=drop_GU,
        grow_GU=drop_GU if grow_GU is None else grow_GU,
        num_planned=_num_planned(plan, site.name, active_GU, site.step),
        is_output=m.is_output is not False,
        num_outputs=masking.num_outputs(plan.method.granularity, site.mask.shape) if m.is_output else 0,
    )


def _exchange(
    m: MaskedWeight,
    site: Site,
    plan: Plan,
    drop_GU: Tensor,
    grow_GU: Tensor,
    budget: Budget,
    kept_GU: Tensor | None = None,
) -> MaskUpdate:
    """Returns the mask of a site changed as its scores and budget say; no output of the model loses all its weights."""
    grain, regrow = plan.method.granularity, plan.method.regrow
    change = masking.exchange(
        site.mask, drop_GU, grow_GU, granularity=grain, budget=budget, regrow=regrow, kept_GU=kept_GU
    )
    if not m.is_output:
        return change
    may_grow = site.grad is not None or site.step == 0  # nothing grows in a frozen weight
    return masking.fill_outputs(change, drop_GU, grow_GU, granularity=grain, may_grow=may_grow)


def _carry_out(
    m: MaskedWeight, view: MatrixView, site: Site, change: MaskUpdate, plan: Plan, observers: Sequence[Observer]
) -> None:
    """Changes the mask of a site, starts what has grown, and lets observers see it."""
    m.write_mask(view, change.mask)
    if site.grad is not None:
        grown = plan.method.grown_init(replace(site, mask=change.mask))
        view.write_where(m.parameter.detach(), change.grown, grown)
    for observe in observers:
        observe(replace(site, weight=view.of(m.parameter.detach()), mask=view.of(m.mask)), change)


def _shared_total(accounts: Sequence[Account], masked: Iterable[MaskedWeight], plan: Plan) -> int:
    """Counts the active units that the accounts have together after the update.

    Weights that still wait for a gradient may hold more or fewer units than they were planned to: so many
    fewer or more are left for the others, but at least one per group.
    """
    num_total = sum(account.num_planned for account in accounts)
    here = {account.name for account in accounts}
    for m, view in views_of(masked):
        if view.name not in here | plan.own:
            active_GU = plan.method.granularity.fold(view.of(m.mask))[..., 0]
            num_missing = _num_planned(plan, view.name, active_GU, m.updated_at) - int(active_GU.sum())
            num_total += int(num_missing / len(active_GU)) * len(active_GU)  # the rest did not divide, and lies idle
    least, most = (sum(len(a.active_GU) for a in accounts), sum(a.num_units for a in accounts))
    return min(max(num_total, least), most)


def _num_planned(plan: Plan, name: str, active_GU: Tensor, step: int) -> int:
    return plan.num_target(name, active_GU.shape[1], step) * len(active_GU)


def _by_name(budgets: Sequence[Budget], accounts: Sequence[Account], num_total: int, method: str) -> dict[str, Budget]:
    """Returns the budgets by name, if they can be met and miss the total by less than a whole group."""
    fit = len(budgets) == len(accounts) and all(
        bool(((b.num_kept_G >= 0) & (b.num_kept_G <= b.num_target_G)).all())
        and bool((b.num_kept_G <= a.active_GU.sum(dim=1)).all())
        and int(b.num_target_G.max()) <= a.active_GU.shape[1]
        for b, a in zip(budgets, accounts, strict=False)
    )
    num_given = sum(int(b.num_target_G.sum()) for b in budgets)
    slack = sum(len(a.active_GU) - 1 for a in accounts)
    require(
        fit and num_total - slack <= num_given <= num_total,
        "allocation",
        f"method {method}",
        allowed=f"a budget for each of {len(accounts)} weights, kept ≤ active, kept ≤ target ≤ all, and "
        f"{num_total:,} active units in sum",
        given=f"{len(budgets)} budgets with {num_given:,} units" + ("" if fit else " that cannot be met"),
        remedy="Look at the method's allocate.",
    )
    return {account.name: budget for account, budget in zip(accounts, budgets, strict=True)}


def _prune_together(masked: Sequence[MaskedWeight], plan: Plan, init: AtInit) -> Plan:
    """Scores and prunes in rounds, from dense, the budgets shared; then the densities are those of the masks."""
    fold = plan.method.granularity.fold
    groups = groups_of(masked, plan.method.granularity)
    fixed = set(groups) if isinstance(plan.method.granularity, NM) else plan.own  # N:M leaves nothing to share
    shared = [name for name in groups if name not in fixed]
    num_last = sum(masking.num_units(groups[n][1], plan.densities[n]) * groups[n][0] for n in shared)
    num_all = sum(groups[n].numel() for n in shared)
    for num_total in masking.falling(num_all, num_last, init.rounds) if shared else [0]:
        scored = _score_together(masked, plan, init)
        accounts = [account for *_, account in scored if account.name not in fixed]
        terms = Terms(num_total=max(num_total, sum(groups[n][0] for n in shared)), drop_fraction=0.0)
        given = masking.leave_for_outputs(init.allocate(accounts, terms), accounts).budgets if accounts else ()
        budgets = _by_name(given, accounts, terms.num_total, init.name)
        for m, view, site, account in scored:
            budget = budgets.get(site.name) or _first_budget(account)
            change = _exchange(m, site, plan, account.drop_GU, account.grow_GU, budget)
            m.write_mask(view, change.mask)
        for m in masked:
            zero_outside_(m.parameter, m.mask)
    for m in masked:
        mask = m.mask
        m.densities = tuple(float(fold(view.of(mask))[0, :, 0].double().mean()) for view in m.weight.views)
    method = replace(plan.method, init=masking.random)  # lets go of the model
    return with_densities(replace(plan, densities_from="look", method=method), masked)


def _prune_in_turn(masked: Sequence[MaskedWeight], plan: Plan, init: InTurn) -> Plan:
    """Prunes one weight after the other, each as it is once those before it are pruned."""
    by_name, grain, unseen = {m.weight.name: m for m in masked}, plan.method.granularity, []
    matrices = {n: {v.name: v.parts(m.parameter.detach()) for v in m.weight.views} for n, m in by_name.items()}
    for name, known in init.looks(matrices):
        m = by_name[name]
        for view in m.weight.views:
            weight, inputs = view.of(m.parameter.detach()), known[view.name]
            num_kept = plan.num_target(view.name, masking.folded_shape(grain, weight.shape)[1], 0)
            if inputs is None:  # those of the weights before it were reached as long as these were dense
                unseen.append(view.name)
                m.write_mask(view, masking.best_units(weight.abs(), grain, num_kept))
                continue
            mask, weight = init.prune(weight, inputs, grain, num_kept)
            m.write_mask(view, mask)
            view.write(m.parameter, weight)
        zero_outside_(m.parameter, m.mask)
    if unseen:
        warnings.warn(
            f"{few(unseen, most=3)}: no inputs reach it any more, as weights before it are pruned by {init.name}, so "
            "magnitude alone decided. Pass more batches.",
            stacklevel=2,
        )
    return replace(plan, method=replace(plan.method, init=masking.random))  # lets go of the model


def _score_together(
    masked: Sequence[MaskedWeight], plan: Plan, init: AtInit
) -> list[tuple[MaskedWeight, MatrixView, Site, Account]]:
    scores = init.scores([m.parameter for m in masked])
    scored = []
    for m, score in zip(masked, scores, strict=True):
        if score is None:
            raise ScoreError.of(
                f"{init.name} scores",
                m.weight.name,
                allowed="a loss or output that depends on it",
                given="one that does not",
                remedy="Run all of the model in it, or leave this weight out by exclude=.",
            )
        for view in m.weight.views:
            site = make_site(m, view, plan, 0)
            scored.append((m, view, site, _account(m, site, plan, score_units(site, view.of(score), plan))))
    return scored


def _first_budget(account: Account) -> Budget:
    num_target = account.num_planned // len(account.active_GU)
    return masking.spend(account.active_GU.sum(dim=1), num_target=num_target, drop_fraction=0.0)
