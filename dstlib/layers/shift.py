"""The restricted shift: groups of channels move along one axis, so that a flat kernel sees its neighbours.

By whole voxels, or by offsets that are learned: interpolated, or rounded to whole voxels.

Shapes: B batch, C channels, G groups, D, H, W depth, height, width in voxels.
"""

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from dstlib.errors import SettingError, require


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
    _check(x, sizes, axis, where="shift()")
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


def channel_moves(channels: int, sizes: Sequence[int]) -> Tensor:
    """Returns by how many voxels each of the channels moves (C), by the size of its group.

    >>> channel_moves(5, (-1, 0, 1))
    tensor([-1, -1,  0,  0,  1], dtype=torch.int32)
    """
    return torch.tensor(sizes, dtype=torch.int32).repeat_interleave(-(-channels // len(sizes)))[:channels]


def _check(x: Tensor, sizes: Sequence[float] | Tensor, axis: int, *, where: str) -> None:
    """Checks that there are sizes, and that ``axis`` is a spatial axis of x."""
    remedy = "Pass (0,) to move nothing."
    require(len(sizes) > 0, "sizes", where, allowed="at least one", given=sizes, remedy=remedy)
    if axis not in (*range(2, x.ndim), *range(2 - x.ndim, 0)):
        allowed = f"a spatial axis of a tensor of {x.ndim} axes, 2 to {x.ndim - 1}"
        remedy = "Axes 0 and 1 are batch and channels; 2 is depth."
        raise SettingError.of("axis", where, allowed=allowed, given=axis, remedy=remedy)


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


def learned_shift(x: Tensor, offsets: Tensor, *, axis: int, rounded: bool = False) -> Tensor:
    """Moves groups of channels as a shift does, by offsets that may be fractions and that receive a gradient.

    An offset o = n + f with a whole n and 0 ≤ f < 1 gives ``(1 - f) · x[i - n] + f · x[i - n - 1]`` along the
    axis, zeros flowing in. Its derivative is ``x[i - n - 1] - x[i - n]``: at a whole offset that of the side of
    higher offsets, and 0 once a group has left the image altogether, from where no offset comes back.

    ``rounded`` moves by the nearest whole number instead (halves down). That has no useful derivative in o, so
    the offsets receive the one above, as if the group had been interpolated (straight through); x receives the
    exact gradient of what was done to it. Whole offsets give what ``shift`` gives, exactly, where x is finite.

    Shapes: x (B, C, \\*spatial), offsets (G,), the result as x. ``axis`` counts the axes of x: 2 is depth.

    Raises:
        SettingError: There is no offset, or ``axis`` is not a spatial axis of x.

    Reference: the future work of Wu et al., *E2ENet* (NeurIPS 2024). Learned by interpolation in Jeon & Kim,
    *Constructing Fast Network through Deconstruction of Convolution* (NeurIPS 2018), there per channel.

    >>> x = torch.tensor([1.0, 2.0, 4.0]).expand(1, 2, 3)
    >>> learned_shift(x, torch.tensor([0.25, -0.5]), axis=2)
    tensor([[[0.7500, 1.7500, 3.5000],
             [1.5000, 3.0000, 2.0000]]])
    >>> learned_shift(x, torch.tensor([0.75, -0.25]), axis=2, rounded=True)
    tensor([[[0., 1., 2.],
             [1., 2., 4.]]])
    """
    _check(x, offsets, axis, where="learned_shift()")
    groups = channel_groups(x, len(offsets))
    moved = [_interpolate(group, o, axis % x.ndim, rounded=rounded) for group, o in zip(groups, offsets, strict=False)]
    return torch.cat(moved, dim=1)


def _interpolate(x: Tensor, offset: Tensor, axis: int, *, rounded: bool) -> Tensor:
    """Moves x by one offset: by computed indices, not slices, so no value leaves the graph, and it compiles."""
    extent = x.shape[axis]
    whole = offset.detach().floor().clamp(-extent - 1, extent)  # beyond, all is zero anyway
    source = torch.arange(-1, extent, device=x.device) - whole.long()
    outside = ((source < 0) | (source >= extent)).view(-1, *[1] * (x.ndim - 1 - axis))
    row = x.index_select(axis, source.clamp(0, extent - 1)).masked_fill(outside, 0)  # one voxel longer than x
    near, far = row.narrow(axis, 1, extent), row.narrow(axis, 0, extent)
    part = offset - whole
    if rounded:
        part = part.detach().round() + (part - part.detach())  # 0 or 1, with the gradient of the fraction
    part = part.to(x.dtype)
    return (1 - part) * near + part * far


class LearnedShift(nn.Module):
    """:func:`learned_shift` as a module: ``offsets`` are a parameter that starts at ``sizes``.

    A vector: ``sparsify`` leaves it dense and counts it with biases and norms. An optimizer's weight decay pulls
    offsets to 0, as it pulls every parameter; a parameter group of their own, of weight decay 0, spares them.

    Raises:
        SettingError: There is no size, or one is not a finite number.

    >>> LearnedShift((-1, 0, 1), axis=2, rounded=True)
    LearnedShift(sizes=(-1, 0, 1), axis=2, rounded=True)
    """

    def __init__(self, sizes: Sequence[float], *, axis: int, rounded: bool = False) -> None:
        super().__init__()
        holds = len(sizes) > 0 and all(map(isfinite, sizes))
        allowed, remedy = "one finite number or more", "Offsets start from them; the paper's are (-1, 0, 1)."
        require(holds, "sizes", "LearnedShift", allowed=allowed, given=sizes, remedy=remedy)
        self.sizes = tuple(sizes)
        self.axis = axis
        self.rounded = rounded
        self.offsets = nn.Parameter(torch.tensor([float(size) for size in sizes]))

    def forward(self, x: Tensor) -> Tensor:
        return learned_shift(x, self.offsets, axis=self.axis, rounded=self.rounded)

    def extra_repr(self) -> str:
        return f"sizes={self.sizes}, axis={self.axis}, rounded={self.rounded}"
