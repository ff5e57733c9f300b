"""The restricted shift: groups of channels move along one axis, so that a flat kernel sees its neighbours.

Shapes: B batch, C channels, D, H, W depth, height, width in voxels.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from dstlib.errors import require

Axis = Literal["depth", "height", "width"]
AXES = get_args(Axis)  # in the order of the axes of (D, H, W)


def shift(x: Tensor, sizes: Sequence[int], *, axis: int) -> Tensor:
    """Moves each group of channels by its own number of voxels along ``axis``; zeros flow in, nothing wraps.

    The C channels are cut into ``len(sizes)`` contiguous groups of ceil(C / len(sizes)); the last groups are
    smaller, or empty, where that does not divide C. Group g moves by ``sizes[g]`` voxels **towards higher
    indices**: ``out[:, c, i] = x[:, c, i - sizes[g]]`` along the axis, and 0 where ``i - sizes[g]`` lies
    outside. So a size of 1 lets voxel i see voxel i - 1. What leaves at one end is lost; a group that moves
    by the extent or more is all zeros.

    Shapes: x (B, C, \\*spatial), the result the same. ``axis`` counts the axes of x: 2 is the depth of a
    (B, C, D, H, W) tensor, -1 its width.

    Raises:
        SettingError: ``sizes`` is empty, or ``axis`` is not a spatial axis of x.

    Reference: Wu et al., *E2ENet* (NeurIPS 2024), restricted depth-shift: group g of n moves by g - n // 2,
    which is (-1, 0, 1) for n = 3. Here the sizes are given, so the paper's multiples of it are values too.

    >>> x = torch.tensor([1.0, 2.0, 3.0]).expand(1, 3, 3)
    >>> shift(x, (-1, 0, 1), axis=2)
    tensor([[[2., 3., 0.],
             [1., 2., 3.],
             [0., 1., 2.]]])
    """
    check_shift(x, sizes, axis, where="shift()")
    groups = channel_groups(x, len(sizes))
    # zip stops at the shorter: ceil may leave no channels for the last sizes
    moved = [_move(group, size, axis % x.ndim) for group, size in zip(groups, sizes, strict=False)]
    return torch.cat(moved, dim=1)


def channel_groups(x: Tensor, num_groups: int) -> tuple[Tensor, ...]:
    """Cuts x into the groups that move together: contiguous parts of axis 1, of ceil(C / num_groups) but for the last.

    There are fewer than ``num_groups`` where ceil leaves no channels for the last ones.

    >>> [group.shape[1] for group in channel_groups(torch.zeros(1, 7), 3)]
    [3, 3, 1]
    """
    return x.split(-(-x.shape[1] // num_groups), dim=1)


def check_shift(x: Tensor, sizes: Sequence[float] | Tensor, axis: int, *, where: str) -> None:
    """Checks that there are sizes, and that ``axis`` is a spatial axis of x.

    Raises:
        SettingError: Of ``where``, if not.
    """
    remedy = "Pass (0,) to move nothing."
    require(len(sizes) > 0, "sizes", where, allowed="at least one", given=sizes, remedy=remedy)
    is_spatial = axis in (*range(2, x.ndim), *range(2 - x.ndim, 0))
    allowed = f"a spatial axis of a tensor of {x.ndim} axes, 2 to {x.ndim - 1}"
    remedy = "Axes 0 and 1 are batch and channels; 2 is depth."
    require(is_spatial, "axis", where, allowed=allowed, given=axis, remedy=remedy)


def _move(x: Tensor, size: int, axis: int) -> Tensor:
    """Moves x by one size: pads, then cuts, which unlike a negative padding holds for sizes beyond the extent too."""
    if size == 0:
        return x
    padding = [0, 0] * (x.ndim - 1 - axis) + [max(size, 0), max(-size, 0)]
    return pad(x, padding).narrow(axis, max(-size, 0), x.shape[axis])


class Shift(nn.Module):
    """:func:`shift` as a module, for tensors (B, C, \\*spatial).

    >>> Shift((-1, 0, 1), axis=2)
    Shift(sizes=(-1, 0, 1), axis=2)
    """

    def __init__(self, sizes: Sequence[int], *, axis: int) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return shift(x, self.sizes, axis=self.axis)

    def extra_repr(self) -> str:
        return f"sizes={self.sizes}, axis={self.axis}"
