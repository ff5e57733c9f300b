"""Volumes on another grid: cubic for intensities, linear for probabilities and labels, nearest along coarse axes.

Voxels are cells: the first and the last cell of the old grid and of the new one end at the same places. Every method
is separable, so a volume is resampled axis by axis. Shapes: C channels, K classes, D depth, H height, W width.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dstlib.zoo.e2enet.data.cases import Shape, Spacing, three


def new_shape(shape: Shape, old: Spacing, new: Spacing) -> Shape:
    """Computes how many voxels of a new spacing come nearest to the same extent, at least one along each axis.

    >>> new_shape((10, 100, 100), (5.0, 0.8, 0.8), (2.5, 1.0, 500.0))
    (20, 80, 1)
    """
    return three(max(1, round(n * a / b)) for n, a, b in zip(shape, old, new, strict=True))


def resample_intensities(volume_DHW: NDArray[np.float32], shape: Shape, coarse: int | None) -> NDArray[np.float32]:
    """Resamples a volume to another shape by cubic splines, within the range that it had.

    Along the ``coarse`` axis the nearest slice is taken, and the range is that of each slice.

    Reference: ``scipy.ndimage.zoom(order=3, mode="nearest", grid_mode=True)``, then clipping, which is nnU-Net's.
    Where that evaluates 64 coefficients per voxel, here a matrix per axis does, some thirty times as fast.

    >>> resample_intensities(np.array([[[0, 4]]], np.float32), (1, 1, 4), None).round().tolist()
    [[[0.0, 1.0, 3.0, 4.0]]]
    """
    axes = tuple(axis for axis in range(3) if axis != coarse)
    if all(volume_DHW.shape[axis] == shape[axis] for axis in axes):
        return _resample_axis(volume_DHW, coarse, shape, 0)
    low, high = (reduce(axis=axes, keepdims=True) for reduce in (volume_DHW.min, volume_DHW.max))
    out = volume_DHW
    for axis in sorted(axes, key=lambda axis: shape[axis] / volume_DHW.shape[axis]):  # shrinking first saves work
        out = _resample_axis(out, axis, shape, 3)
    np.clip(out, low, high, out=out)
    return _resample_axis(out, coarse, shape, 0)


def resample_slices(
    slices_KHW: Iterable[NDArray[np.float32]], old: Shape, new: Shape, coarse: int | None
) -> Iterator[NDArray[np.float32]]:
    """Resamples K volumes to another shape, linearly, and by the nearest slice along the ``coarse`` axis.

    They come and go slice by slice, and two are held at most.

    Shapes: ``old`` and ``new`` (D, H, W); slices (K, H, W), as many as ``old`` is deep, to as many as ``new`` is.

    >>> slices = np.array([[[[0]]], [[[4]]]], np.float32)
    >>> [float(each[0, 0, 0]) for each in resample_slices(slices, (2, 1, 1), (4, 1, 1), None)]
    [0.0, 1.0, 3.0, 4.0]
    """
    order = sorted(range(3), key=lambda axis: new[axis] / old[axis])  # shrinking first saves work
    depth = order.index(0)

    def within(axes: Sequence[int], slice_KHW: NDArray[np.float32]) -> NDArray[np.float32]:
        for axis in axes:
            slice_KHW = _resample_axis(slice_KHW, axis, new, 0 if axis == coarse else 1)
        return slice_KHW

    shrunk = (within(order[:depth], each) for each in slices_KHW)
    for each in _resample_depth(shrunk, old[0], new[0], nearest=coarse == 0):
        yield within(order[depth + 1 :], each)


def most_probable(values_KHW: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Finds the class of the largest value at each voxel (H, W), the first of equals.

    >>> most_probable(np.array([[[0.5, 0.2]], [[0.5, 0.8]]], np.float32)).tolist()
    [[0, 1]]
    """
    return values_KHW.argmax(axis=0).astype(np.uint8)


def topmost(values_KHW: NDArray[np.float32], numbers: Sequence[int]) -> NDArray[np.uint8]:
    """Writes the number of each region where its probability is above 1/2, one after the other, onto zeros (H, W).

    Reference: nnU-Net's ``regions_class_order``.

    >>> topmost(np.array([[[0.9, 0.9, 0.5]], [[0.2, 0.7, 0.5]]], np.float32), (1, 4)).tolist()
    [[1, 4, 0]]
    """
    label = np.zeros(values_KHW.shape[1:], np.uint8)
    for number, values in zip(numbers, values_KHW, strict=True):
        label[values > 1 / 2] = number
    return label


def _resample_depth(
    slices: Iterator[NDArray[np.float32]], old: int, new: int, *, nearest: bool
) -> Iterator[NDArray[np.float32]]:
    """Resamples along the axis on which the slices follow each other."""
    if old == new:
        yield from slices
        return
    before, weight = _linear(old, new)
    last = _nearest(old, new) if nearest else np.minimum(before + 1, old - 1)
    held: deque[NDArray[np.float32]] = deque(maxlen=2)
    num_read = 0
    for index, share in zip(last.tolist(), weight, strict=True):
        while num_read <= index:
            held.append(next(slices))
            num_read += 1
        yield held[-1] if nearest else held[0] * (1 - share) + held[-1] * share


def _resample_axis(
    volume: NDArray[np.float32], axis: int | None, shape: Sequence[int], order: int
) -> NDArray[np.float32]:
    """Resamples a volume to ``shape[axis]`` voxels along one axis; returns it where there is nothing to do."""
    if axis is None or volume.shape[axis] == shape[axis]:
        return volume
    old, new = volume.shape[axis], shape[axis]
    if order == 3:
        moved = np.moveaxis(volume, axis, -2) if axis < 2 else volume.swapaxes(1, 2)
        out = _cubic(old, new) @ moved
        return np.ascontiguousarray(np.moveaxis(out, -2, axis) if axis < 2 else out.swapaxes(1, 2))
    if order == 0:
        return volume.take(_nearest(old, new), axis)
    before, weight = _linear(old, new)
    weight = np.expand_dims(weight, [a for a in range(3) if a != axis])
    out, after = volume.take(before, axis), volume.take(np.minimum(before + 1, old - 1), axis)
    out *= 1 - weight
    after *= weight
    out += after
    return out


def _places(old: int, new: int) -> NDArray[np.float64]:
    """Returns where the centres of the new voxels lie, in old ones."""
    return np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)


def _nearest(old: int, new: int) -> NDArray[np.intp]:
    return np.floor(_places(old, new) + 0.5).astype(np.intp)


def _linear(old: int, new: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Returns the old voxel before each new one, and the weight of the one behind that."""
    place = _places(old, new)
    before = np.minimum(np.floor(place).astype(np.intp), max(old - 2, 0))
    return before, (place - before).astype(np.float32)


@lru_cache(16)
def _cubic(old: int, new: int) -> NDArray[np.float32]:
    """Returns the matrix (new, old) of scipy's cubic splines: what these make of each unit vector."""
    units = np.eye(old)
    return ndimage.zoom(units, (new / old, 1), order=3, mode="nearest", grid_mode=True).astype(np.float32)
