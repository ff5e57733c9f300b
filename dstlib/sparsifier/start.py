"""The start of a sparse training: first masks, chosen or those that are there, and zeros outside of them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from dstlib.masking import INIT_SCALES, random
from dstlib.sparsifier import loaded, update
from dstlib.sparsifier.given import GivenMasks, is_shared_out
from dstlib.sparsifier.optimizer_state import Kept
from dstlib.sparsifier.plan import Plan
from dstlib.sparsifier.state import MaskedWeight, opened


def start_masks(masked: Sequence[MaskedWeight], plan: Plan, kept_of: Callable[[MaskedWeight], Iterable[Kept]]) -> Plan:
    """Chooses the first masks; under dense storage the values beneath them are put aside.

    ``kept_of`` says what optimizers keep for a weight already. Returns the plan with the densities that came of it.
    """
    if plan.method.storage is not None:
        for m in masked:
            m.hidden = m.parameter.detach().clone()
            m.soft = plan.method.granularity if plan.method.storage.soft else None
    kept = {m: kept_of(m) for m in masked}  # as long as no mask is chosen, none is seen in what varies
    is_drawn, given = plan.method.init is random, plan.given
    with opened(masked):
        plan = replace(update.choose_first_masks(masked, plan), given=None)
    if given is None:
        _keep_places(masked, plan, may_cut=is_drawn)
    else:
        _take_given(masked, plan, given)
    if plan.init_scale is not None:
        for m in masked:  # not those that hold these zeros already
            if m.num_outside() and not loaded.is_sparse_already(m):
                m.rescale(kept[m], INIT_SCALES[plan.init_scale])
    for m in masked:
        if m.hidden is not None:
            m.reveal()
            update.spread_reach(m, plan, 0)
            m.hide()
        m.clear(kept[m])
    return plan


def _keep_places(masked: Sequence[MaskedWeight], plan: Plan, *, may_cut: bool) -> None:
    """Lets weights that are sparse already keep their places; masks that ``may_cut`` them keep the largest."""
    loaded.tell_of_regrowth(masked, plan.method.name)
    grain, cut = plan.method.granularity, {}
    for m in masked:
        if m.num_outside():
            is_cut = may_cut and loaded.is_sparse_already(m)
            is_taken = loaded.take_places(m, grain, may_cut=is_cut)
            if not is_taken and is_cut:
                cut[m] = m.num_outside()
            m.is_to_fill = not (is_taken or is_cut) and m.is_output is None and m.hidden is None
    if cut:
        loaded.tell_of_no_room(cut)


def _take_given(masked: Sequence[MaskedWeight], plan: Plan, given: GivenMasks) -> None:
    """Starts from masks that were given; what room the plan has beside them stays with those that were chosen."""
    for m in masked:
        places = given.masks[m.weight.name]
        if is_shared_out(plan.method) and m.weight.views[0].name not in plan.own:
            m.packed.write(places)
        else:
            fits = loaded.take_places(m, plan.method.granularity, places=places)
            assert fits, "the plan has checked it"
        m.densities, m.starts = (
            tuple(of[view.name] for view in m.weight.views) for of in (plan.densities, plan.starts)
        )
    sparse = [m for m in masked if loaded.is_sparse_already(m)]
    if lost := {m: num for m in sparse if (num := m.num_outside())}:
        loaded.tell_of_other_masks(lost, given.where)
