"""Weights that do not train on: frozen ones follow the plan without a gradient, and what ends elsewhere is told of.

A weight is frozen if it is to have no gradient any more (``requires_grad`` is False), or if an optimizer has taken over
from the one that stepped on it and left it out. Its plan goes on: it is pruned by magnitude to the density planned for
it, and nothing in it grows. A weight that has no gradient at some step is not frozen: its update waits for one.
"""

import sys
import warnings
from collections.abc import Mapping, Sequence

from dstlib.sparsifier.plan import Plan
from dstlib.sparsifier.state import MaskedWeight, groups_of


def following(frozen: Mapping[MaskedWeight, int], plan: Plan) -> dict[MaskedWeight, int]:
    """Returns those of the frozen weights that are due, each with its step, at the updates of the others and after all.

    Where the plan has risen since its last update, as for a dense phase, a weight stays as it is until it falls again.
    """
    last, due = last_update(plan), plan.clock.due
    overdue = {m: step for m, step in frozen.items() if m.updated_at < last and (due(step) or step > last)}
    return {m: step for m, step in overdue.items() if m.updated_at < step and not _rises(m, plan, step)}


def last_update(plan: Plan) -> int:
    """Returns the step of the last mask update; where they never end, one that no training comes to."""
    return plan.clock.latest(sys.maxsize)


def find_behind(masked: Sequence[MaskedWeight], plan: Plan) -> list[MaskedWeight]:
    """Returns the weights that are not at their last density, now that some have taken the step of the last update.

    Not those on which another optimizer steps in the same round, and is about to.
    """
    last = last_update(plan)
    waiting = (m for m in masked if m.updated_at < last and not plan.clock.latest(last - 1) <= m.step < last)
    return [m for m in waiting if _planned(m, plan, last) != _planned(m, plan, m.updated_at)]


def tell_of_end(behind: Sequence[MaskedWeight], plan: Plan) -> None:
    """Warns of weights that are not at their last density, and says why."""
    told = "; ".join(_story(m, plan) for m in behind[:3])
    more = f"; and {len(behind) - 3} more weights" if len(behind) > 3 else ""
    warnings.warn(
        f"the last mask update is at step {last_update(plan)}, and there are weights without the density that was "
        f"planned for them: {told}{more}. One that trains on is updated at its next step with a gradient, by its own "
        "count of steps; one that does not reaches its density if it is frozen, by requires_grad_(False).",
        stacklevel=2,
    )


def tell_of_early_end(masked: Sequence[MaskedWeight], plan: Plan, step: int) -> None:
    """Warns of weights that are fixed at this step at another density than that of their last update."""
    last = last_update(plan)
    early = [m for m in masked if _planned(m, plan, m.updated_at) != _planned(m, plan, last)]
    if early:
        num_active, num_all = sum(m.packed.num_active for m in masked), sum(m.packed.numel for m in masked)
        num_units = sum(size.numel() for size in groups_of(masked, plan.method.granularity).values())
        num_planned = sum(num for m in masked for num in _planned(m, plan, last).values())
        warnings.warn(
            f"freeze() at step {step:,}: the density stays at {num_active / num_all:.4f}, on its way to "
            f"{num_planned / num_units:.4f} by method {plan.method.name}. Call finish() instead to go there first.",
            stacklevel=3,
        )


def _story(m: MaskedWeight, plan: Plan) -> str:
    last, groups = last_update(plan), groups_of([m], plan.method.granularity)
    density = sum(_planned(m, plan, last).values()) / sum(size.numel() for size in groups.values())
    if m.begun == 0:
        why = "no optimizer has stepped on it"
    elif m.step < last:
        why = f"its optimizer has taken {m.step:,} steps only"
    else:
        why = "it had no gradient then" + (f", nor at any update since step {m.updated_at:,}" if m.updated_at else "")
    return f"{m.weight.name} has {float(m.mask.double().mean()):.4f} where the plan has {density:.4f}, as {why}"


def _rises(m: MaskedWeight, plan: Plan, step: int) -> bool:
    before, after = _planned(m, plan, m.updated_at), _planned(m, plan, step)
    return any(after[name] > num for name, num in before.items())


def _planned(m: MaskedWeight, plan: Plan, step: int) -> dict[str, int]:
    """Counts the active units that each matrix view is to have by its own density after an update at ``step``."""
    groups = groups_of([m], plan.method.granularity)
    return {name: num_groups * plan.num_target(name, size, step) for name, (num_groups, size) in groups.items()}
