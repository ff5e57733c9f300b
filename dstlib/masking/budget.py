"""Budgets: how many units a weight keeps and how many it then has, the integers behind every mask update.

Shapes: G groups, U units per group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dstlib.errors import require
from dstlib.masking.counts import NUDGE


@dataclass(frozen=True)
class Budget:
    """The active units that stay, and those after growth: a whole number per group each."""

    num_kept_G: Tensor
    num_target_G: Tensor


@dataclass(frozen=True, kw_only=True)
class Account:
    """One weight at an update, as an allocator sees it.

    ``drop_GU`` and ``grow_GU`` are the unit scores. ``num_planned`` is the number of units, over all groups,
    that its own density asks for, and ``num_planned_before`` that at its last update, where it was another.
    ``is_output``: its outputs are those of the model, or may be, and none of them may go; ``num_outputs`` is how many
    units they need, one for each, where an update could leave one without.
    """

    name: str
    active_GU: Tensor
    drop_GU: Tensor
    grow_GU: Tensor
    num_planned: int
    num_planned_before: int | None = None
    is_output: bool = False
    num_outputs: int = 0

    @property
    def num_units(self) -> int:
        """All units, active or not."""
        return self.active_GU.numel()

    @property
    def is_idle(self) -> bool:
        """Whether all growth scores are equal: nothing says what another unit would be worth, here or elsewhere."""
        low, high = self.grow_GU.aminmax()
        return bool(low == high)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What weights that share a budget have to meet together.

    ``num_total`` units, at least one per group, are active in all of them after the update; ``drop_fraction`` is
    the share of active units to exchange, whose numbers ``num_dropped`` counts, rounded down or, by ``round_up``, up;
    ``memory`` is the number that the allocator returned at its last update, 0 at first.
    """

    num_total: int
    drop_fraction: float
    memory: float = 0.0
    round_up: bool = False

    def num_dropped(self, num_active: Tensor) -> Tensor:
        """Computes how many of so many active units to exchange, elementwise.

        >>> Terms(num_total=9, drop_fraction=0.3).num_dropped(torch.tensor([9, 2]))
        tensor([2, 0])
        """
        return num_dropped(num_active, self.drop_fraction, round_up=self.round_up)


@dataclass(frozen=True)
class Allocation:
    """A budget per account, in their order, and a number to be given back at the next update."""

    budgets: tuple[Budget, ...]
    memory: float = 0.0


Allocator = Callable[[Sequence[Account], Terms], Allocation]


def num_dropped(num_active: Tensor, drop_fraction: float, *, round_up: bool = False) -> Tensor:
    """Computes floor(f·A), or ceil(f·A) with ``round_up``, elementwise.

    Raises:
        SettingError: The fraction lies outside [0, 1].

    >>> num_dropped(torch.tensor([100, 7]), 0.29)
    tensor([29,  2])
    >>> num_dropped(torch.tensor([100, 7]), 0.29, round_up=True)
    tensor([29,  3])
    """
    allowed = "a number in [0, 1]"
    remedy = "Look at the method's drop_fraction curve."
    require(
        0 <= drop_fraction <= 1, "drop fraction", "a mask update", allowed=allowed, given=drop_fraction, remedy=remedy
    )
    if round_up:
        return (num_active.double() * (drop_fraction / NUDGE)).ceil().long()
    return (num_active.double() * (drop_fraction * NUDGE)).floor().long()


def spend(
    num_active_G: Tensor,
    *,
    num_target: int | Tensor,
    drop_fraction: float,
    num_kept: int | None = None,
    round_up: bool = False,
) -> Budget:
    """Returns the budget of a weight by itself: of A active units per group, min(A - floor(f·A), target) are kept.

    ``num_kept``, where given, is a lower ceiling than the target on what is kept; with ``round_up``, ceil(f·A) go.

    >>> spend(torch.tensor([10]), num_target=8, drop_fraction=0.3)
    Budget(num_kept_G=tensor([7]), num_target_G=tensor([8]))
    """
    num_target_G = torch.as_tensor(num_target, device=num_active_G.device).expand_as(num_active_G)
    ceiling_G = num_target_G if num_kept is None else num_target_G.clamp(max=num_kept)
    num_kept_G = torch.minimum(num_active_G - num_dropped(num_active_G, drop_fraction, round_up=round_up), ceiling_G)
    return Budget(num_kept_G, num_target_G)
