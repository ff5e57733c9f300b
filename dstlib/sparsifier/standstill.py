"""Runs in which no mask changes: refused where there is no update, warned of where none is to change a thing, or has.

A share to drop that has nearly faded by the first update, or is of a small weight, rounds to no unit at all. What an
allocator drops by a threshold of its own is known at the end only.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dstlib.errors import SettingError
from dstlib.masking import folded_shape, num_units, round_down
from dstlib.masking.counts import round_up
from dstlib.schedules import Alternating, Constant, Every
from dstlib.sparsifier.plan import Plan

_MOST_INTERVALS = 10  # in the shortest run that is looked for; if ten updates move nothing, the run is not too short


@dataclass(frozen=True)
class _Size:
    """A matrix view: its groups, and the units of each."""

    name: str
    num_groups: int
    num_units: int


def refuse_no_update(plan: Plan) -> None:
    """Refuses a run that ends before its first update, and names a length in which masks change.

    Raises:
        SettingError: There is no update.
    """
    clock, method = plan.clock, plan.method
    if not isinstance(clock, Every) or clock.last != clock.start:
        return
    enough = _enough_steps(plan, _sizes(plan))
    raise SettingError.of(
        "total_steps",
        "sparsify()",
        allowed=f"enough for an update each {clock.interval} steps within the first {method.stop:.0%} of the run"
        + (f", such as {enough}" if enough else ""),
        given=plan.total_steps,
        remedy='Lengthen the run, shorten the interval by replace(method, interval=...), or choose method="static".',
    )


def warn_of_standstill(plan: Plan) -> None:
    """Warns if no update of the whole run would drop or grow a single unit, and says what would."""
    clock, method, sizes = plan.clock, plan.method, _sizes(plan)
    if not isinstance(clock, Every) or _is_dense(plan, sizes) or _moves(plan, sizes):
        return
    most = max(plan.drop_fraction(step) for step in _updates(clock))
    if plan.densities_from == "masks" and method.ramp != Constant(1.0):
        remedy = "It prunes: pass a sparsity= that is higher than that of the masks"
    elif enough := _enough_steps(plan, sizes):
        remedy = f"Give the run more steps, such as total_steps={enough}, or shorten the interval"
    else:
        remedy = "Give replace(method, ...) a higher drop_fraction, or round_up=True"
    length = "without total_steps" if plan.total_steps is None else f"in {plan.total_steps:,} steps"
    warnings.warn(
        f"method {method.name} {length}, with updates each {clock.interval}: no mask will ever change, as density and "
        f"surplus stay as they are, and the drop fraction, {most:.2g} at most at its updates, is not one unit of any "
        f'weight. {remedy}; method="static" is the fixed topology by name.',
        stacklevel=3,
    )


def tell_of_standstill(plan: Plan) -> None:
    """Warns, after the last update, that none has changed a mask though the plan was to, and says where to look."""
    if isinstance(plan.clock, Every) and _moves(plan, _sizes(plan)):
        warnings.warn(
            f"method {plan.method.name}: the last mask update is done, at step {plan.clock.last}, and none of them has "
            "dropped or grown a unit. Its criteria or its allocator found nothing to exchange, as where a threshold "
            "needs more updates to adapt, or gradients are zero: shorten the interval, or look at drop, grow and "
            "allocate.",
            stacklevel=2,
        )


def refuse_skipped_phases(plan: Plan) -> None:
    """Refuses a run with fewer updates than a ramp that alternates has phases: it might be dense until its end.

    Raises:
        SettingError: There are too few.
    """
    clock, ramp = plan.clock, plan.method.ramp
    if not isinstance(ramp, Alternating) or not isinstance(clock, Every) or clock.last is None:
        return
    num_updates = (clock.last - clock.start) // clock.interval
    if num_updates < ramp.num_phases:
        raise SettingError.of(
            "total_steps",
            f"sparsify() with method {plan.method.name}",
            allowed=f"enough for {ramp.num_phases} updates, one for each phase of {ramp.phase:g} of the way, "
            f"{round_up(ramp.num_phases / plan.method.stop)} or more",
            given=plan.total_steps,
            remedy="Lengthen the run, or the phases by replace(method, ramp=dstlib.schedules.Alternating(...)).",
        )


def _sizes(plan: Plan) -> list[_Size]:
    found = []
    for weight in plan.weights:
        if not weight.reason:
            for view in weight.views:
                num_groups, num = folded_shape(plan.method.granularity, weight.shape_of(view))[:2]
                found.append(_Size(view.name, num_groups, num))
    return found


def _updates(clock: Every) -> Iterator[int]:
    """Yields the steps with an update; the first alone where they never end, as all are alike then."""
    first = clock.start + clock.interval
    yield from range(first, (first if clock.last is None else clock.last) + 1, clock.interval)


def _moves(plan: Plan, sizes: Sequence[_Size]) -> bool:
    """Whether any update is to drop or to grow a unit of any weight."""
    assert isinstance(plan.clock, Every)
    before = 0
    for step in _updates(plan.clock):
        if any(_changes(plan, size, before, step) for size in sizes):
            return True
        before = step
    return False


def _changes(plan: Plan, size: _Size, before: int, step: int) -> bool:
    num_active, num_target = (plan.num_target(size.name, size.num_units, at) for at in (before, step))
    num_planned = num_units(size.num_units, plan.density(size.name, step))
    # an allocator may drop from all groups together
    num_together = num_active * size.num_groups if plan.method.allocate is not None else num_active
    drops = round_up if plan.method.round_up else round_down
    exchanges = num_target < size.num_units and drops(num_together * plan.drop_fraction(step)) > 0
    return exchanges or num_target != num_active or num_active > num_planned


def _is_dense(plan: Plan, sizes: Sequence[_Size]) -> bool:
    """Whether all weights are dense from beginning to end, as at sparsity 0, so that there is nothing to change."""
    last = plan.clock.latest(plan.total_steps or 0)
    return all(plan.num_target(s.name, s.num_units, step) == s.num_units for s in sizes for step in (0, last))


def _enough_steps(plan: Plan, sizes: Sequence[_Size]) -> int | None:
    """Finds a number of steps in which masks change, by one more interval each time; None if more steps do not help."""
    assert isinstance(plan.clock, Every)
    for num_intervals in range(1, _MOST_INTERVALS + 1):
        total_steps = round_up(num_intervals * plan.clock.interval / plan.method.stop)
        longer = replace(plan, clock=plan.method.clock(total_steps), total_steps=total_steps)
        if _moves(longer, sizes):
            return total_steps
    return None
