"""The masks that a training was given to start from, and what they say of its densities.

Shapes: G groups, U units per group.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dstlib.errors import SelectionError, require
from dstlib.masking import NM, Distribution, Granularity, NeuronAblation, in_proportion
from dstlib.methods.method import Method
from dstlib.schedules import Constant
from dstlib.targets import MatrixView, Weight


@dataclass(frozen=True)
class GivenMasks:
    """The masks of all sparse weights by their names, as truth values in the shapes of the parameters.

    ``of_zeros``: they say where weights are not zero, and zeros may be active too. ``where`` names them in messages.
    """

    masks: Mapping[str, Tensor]
    where: str
    of_zeros: bool = False


@dataclass(frozen=True)
class Count:
    """The entries of a matrix view, those that its mask has active, and how many are in one unit of each group."""

    num_all: int
    num_active: int
    num_rounded: int

    @property
    def density(self) -> float:
        """The active share."""
        return self.num_active / self.num_all


def count(
    given: GivenMasks, weights: Iterable[Weight], method: Method, *, may_fill: bool, apart: Collection[str]
) -> dict[str, Count]:
    """Counts what masks have active in each matrix view, if they are such as the method can have.

    Where zeros ``may_fill`` groups up, as a sparsity says how many are to be active, these may differ. Views that stand
    ``apart`` share no units out.

    Raises:
        SelectionError: Units are partly active, a view has no active ones, or groups have different numbers of them.
    """
    return {
        view.name: _count(
            view,
            view.of(given.masks[weight.name]),
            given,
            method.granularity,
            may_fill=may_fill and given.of_zeros,
            is_shared_out=is_shared_out(method) and view.name not in apart,
        )
        for weight in weights
        if not weight.reason
        for view in weight.views
    }


def agrees(density: float, counts: Sequence[Count], given: GivenMasks, method: Method, where: str) -> bool:
    """Whether masks have a density, but for rounding to whole units in each group.

    Raises:
        SettingError: They have another one, which the method does not lead to.
    """
    num_all, num_active = (sum(getattr(c, name) for c in counts) for name in ("num_all", "num_active"))
    if abs(density * num_all - num_active) <= sum(c.num_rounded for c in counts):
        return True
    prunes, falls = method.ramp != Constant(1.0), density * num_all < num_active
    require(
        prunes if falls else given.of_zeros,
        "sparsity",
        where,
        allowed=f"{1 - num_active / num_all:.6g}, as the masks have it" + (", or more" if prunes else ""),
        given=f"{1 - density:.6g}",
        remedy="Leave sparsity= out to keep that of the masks"
        + ("" if prunes or not falls else ', or choose a method that prunes from there, such as "gmp" or "granet"')
        + ".",
    )
    return False


def following(counts: Mapping[str, Count], given: GivenMasks, method: Method, *, is_asked: bool) -> Distribution:
    """Makes a distribution that follows masks: their own densities, or else others in proportion to these.

    Only where ``is_asked`` does the density that it is called with count.
    """
    kept = {name: c.density for name, c in counts.items()}

    def follow(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
        asked = [counts[name] for name in shapes]
        if not is_asked or agrees(density, asked, given, method, "sparsify()"):
            return {name: kept[name] for name in shapes}
        return in_proportion(kept)(shapes, density)

    return follow


def check_room(
    given: GivenMasks,
    weights: Iterable[Weight],
    method: Method,
    num_target: Callable[[str, int], int],
    *,
    apart: Collection[str],
) -> None:
    """Checks that each group of a matrix view has room for all that its mask has active.

    ``num_target`` tells how many units a group is to have at first, of a view by name and number of units.

    Raises:
        SelectionError: One has not.
    """
    for weight in weights:
        for view in () if weight.reason else weight.views:
            if is_shared_out(method) and view.name not in apart:
                continue
            active_GU = method.granularity.fold(view.of(given.masks[weight.name])).any(dim=-1)
            most, target = int(active_GU.sum(dim=1).max()), num_target(view.name, active_GU.shape[1])
            if most > target:
                allowed = f"at most {target} active units in each of its {len(active_GU)} groups"
                remedy = "Choose a lower sparsity, or another granularity by replace(method, granularity=...)."
                raise SelectionError.of(f"mask {view.name}", given.where, allowed=allowed, given=most, remedy=remedy)


def is_shared_out(method: Method) -> bool:
    """Whether groups of one view share their units out among themselves, so that some may have none."""
    return isinstance(method.allocate, NeuronAblation)


def _count(
    view: MatrixView, mask: Tensor, given: GivenMasks, grain: Granularity, *, may_fill: bool, is_shared_out: bool
) -> Count:
    mask_GUE = grain.fold(mask)
    active_GU = mask_GUE.any(dim=-1)
    num_G, num_units = active_GU.sum(dim=1), active_GU.shape[1]
    num_parts = int((active_GU != mask_GUE.all(dim=-1)).sum())

    def check(holds: bool, allowed: str, found: object, remedy: str) -> None:
        what = f"mask {view.name}"
        require(holds, what, given.where, allowed=allowed, given=found, remedy=remedy, error=SelectionError)

    another = "Choose a granularity that it has, by replace(method, granularity=...)."
    check(given.of_zeros or not num_parts, f"whole units of {grain}", f"{num_parts} that are partly active", another)
    nothing = "Leave it out by exclude=, or pass a mask in which the zeros are active that are to train."
    check(bool(active_GU.any()), "active units", "none", nothing)
    if isinstance(grain, NM) and given.of_zeros and int(num_G.min()) < num_units:
        check(int(num_G.max()) <= grain.n, f"{grain.n} at most of every {grain.m}", int(num_G.max()), another)
        num_G = num_G.clamp(min=grain.n)  # what is missing are zeros that are active
    live_G = num_G[num_G > 0] if is_shared_out else num_G
    least, most = int(live_G.min()), int(live_G.max())
    fill = " Or pass sparsity=: zeros fill up the groups that have less than it leaves." if given.of_zeros else ""
    if fill and is_shared_out:  # groups that share units out have one number of them, or none
        fill = " Or pass sparsity= and replace(method, allocate=None): zeros fill up the groups that have less."
    allowed = f"one number of active units in each group of {grain}"
    check(least == most or (may_fill and not is_shared_out), allowed, f"from {least} to {most}", another + fill)
    unit_size = mask.numel() // active_GU.numel()
    return Count(mask.numel(), int(num_G.sum()) * unit_size, len(num_G) * unit_size)
