"""What the phantoms are drawn with: bent coordinates, smooth random fields, and one primitive, the capsule.

A capsule is a thick segment with a radius per axis; with equal ends it is an ellipsoid. All coordinates are
(z, y, x) along the array's axes (D, H, W), each from -1 to 1 over the field of view.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dstlib.errors import require
from dstlib.zoo.e2enet.data.cases import Shape, three

Point: TypeAlias = tuple[float, float, float]  # (z, y, x)
Volume: TypeAlias = NDArray[np.float32]
Mask: TypeAlias = NDArray[np.bool_]

NUM_WAVES = 3  # cosines per axis of the deformation: it bends the body, and never folds a small organ
BEND = 0.05  # of the half field of view, the largest deformation along each axis


def checked_shape(shape: Sequence[int], where: str, *, least: Shape, why: str) -> Shape:
    """Returns the shape (D, H, W), if it can hold what is to be drawn.

    Raises:
        SettingError: It is not three sizes, or one is below ``least``.

    >>> checked_shape([48, 64, 64], "a phantom", least=(32, 40, 40), why="")
    (48, 64, 64)
    """
    holds = len(shape) == 3 and all(n >= m for n, m in zip(shape, least, strict=True))
    allowed, remedy = f"three sizes (D, H, W) of at least {least}", f"Choose a larger shape: {why}."
    require(holds, "shape", where, allowed=allowed, given=tuple(shape), remedy=remedy)
    return three(shape)


def smooth_field(rng: np.random.Generator, shape: Sequence[int], *, num_waves: int) -> Volume:
    """Draws a random field of mean 0 and variance 1: the few lowest cosines per axis, randomly weighted.

    >>> field = smooth_field(np.random.default_rng(0), (8, 9, 10), num_waves=3)
    >>> field.shape, bool(abs(field.mean()) < 1e-6)
    ((8, 9, 10), True)
    """
    basis = [np.cos(np.pi * np.arange(num_waves)[:, None] * (np.arange(n) + 0.5) / n).astype(np.float32) for n in shape]
    weights = rng.normal(size=(num_waves,) * 3).astype(np.float32)
    weights[0, 0, 0] = 0  # the mean
    field: Volume = np.einsum("abc,ad,bh,cw->dhw", weights, *basis, optimize=True)
    field /= field.std()
    return field


def bent_grid(rng: np.random.Generator, shape: Shape) -> list[Volume]:
    """Computes the coordinates (z, y, x) of every voxel, after a smooth random deformation.

    >>> z, y, x = bent_grid(np.random.default_rng(0), (8, 9, 10))
    >>> z.shape, bool((np.diff(z, axis=0) > 0).all())
    ((8, 9, 10), True)
    """
    lines = [(2 * np.arange(n, dtype=np.float32) + 1) / n - 1 for n in shape]
    fields = [smooth_field(rng, shape, num_waves=NUM_WAVES) for _ in shape]
    grid = np.meshgrid(*lines, indexing="ij")
    return [(line + BEND * np.tanh(field)).astype(np.float32) for line, field in zip(grid, fields, strict=True)]


def within(points: ArrayLike, radii: ArrayLike, grid: list[Volume]) -> Mask:
    """Finds the voxels within the capsules through ``points`` (P, 3), with ``radii`` (3); one point: an ellipsoid.

    >>> grid = [axis.astype(np.float32) for axis in np.meshgrid(*[[-0.5, 0.5]] * 3, indexing="ij")]
    >>> np.argwhere(within([(-0.5, 0.5, 0.5)], (0.1, 0.1, 0.1), grid)).tolist()
    [[0, 1, 1]]
    """
    inside = np.zeros(grid[0].shape, bool)
    centres, extents = np.array(points, np.float32), np.array(radii, np.float32)
    # Only the box that the capsules can reach is looked at, which makes the small organs nearly free.
    lowest, highest = centres.min(0) - extents - BEND, centres.max(0) + extents + BEND
    sizes: NDArray[np.int64] = np.array(inside.shape)
    first = np.maximum(0, np.floor(sizes * (lowest + 1) / 2)).astype(int)
    last = np.maximum(0, np.ceil(sizes * (highest + 1) / 2)).astype(int)
    box = tuple(slice(a, b) for a, b in zip(first.tolist(), last.tolist(), strict=True))
    scaled = [axis[box] / r for axis, r in zip(grid, extents, strict=True)]
    ends = centres / extents
    for start, end in pairwise(ends) if len(ends) > 1 else [(ends[0], ends[0])]:
        inside[box] |= _squared_distance(scaled, start, end) < 1
    return inside


def _squared_distance(grid: list[Volume], start: Volume, end: Volume) -> Volume:
    """Computes the squared distance of every voxel from the segment between two points."""
    offsets = [axis - at for axis, at in zip(grid, start, strict=True)]
    along = end - start
    length = float(along @ along)
    if length == 0:
        return offsets[0] ** 2 + offsets[1] ** 2 + offsets[2] ** 2
    position = sum(o * a for o, a in zip(offsets, along, strict=True)) / length
    position = np.clip(position, 0, 1)
    distance: Volume = sum((o - position * a) ** 2 for o, a in zip(offsets, along, strict=True))
    return distance
