"""What can be wrong with an image or a label, in words: pure functions of voxels and affines.

Arrays are in a file's own order (x, y, z[, channel]) where
their names say no other; affines take their voxels to millimetres.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray

from dstlib.zoo.e2enet.data.layouts.labels import Labels
from dstlib.zoo.e2enet.data.scans.geometry import Volume
from dstlib.zoo.e2enet.data.scans.header import apart
from dstlib.zoo.e2enet.data.scans.places import MAX_SHIFT, why_elsewhere

# Whole numbers that were float32 for a while, or integers times a scl_slope (100 times 0.01 of float32, less an offset
# of 1024, say), miss by 1e-4 at most. Labels that were interpolated take values between the classes all over.
MAX_ROUNDING = 1e-3

# The volume of the cell that three axes of length 1 span: 1 at right angles, 0 in one plane. A tilted gantry
# (30° at most) leaves 0.87.
MIN_CELL = 0.1


def image_defects(images: Sequence[NDArray[np.float32]], num_channels: int) -> list[str]:
    """Says what is wrong with the files of one image: with their shapes, or the number of channels of all together."""
    shapes = [image.shape for image in images]
    for shape in shapes:
        if len(shape) not in (3, 4) or 0 in shape:
            return [f"has shape {shape}, but an image is (x, y, z) or (x, y, z, channel)"]
    given = sum(shape[3] if len(shape) == 4 else 1 for shape in shapes)
    if given != num_channels:
        return [f"has {given} channel(s), but the data set names {num_channels}"]
    return []


def voxel_defects(image: NDArray[np.float32]) -> list[str]:
    """Says whether voxels are NaN, infinite or beyond float32."""
    if image.size and np.isfinite(image.min()) and np.isfinite(image.max()):  # both are NaN if any voxel is
        return []
    num_bad = int(np.count_nonzero(~np.isfinite(image)))
    return [f"has {num_bad} voxel(s) that are NaN, infinite or beyond float32"] if num_bad else []


def colour_defects(image_CDHW: NDArray[np.float32], channels: Iterable[int]) -> list[str]:
    """Says whether channels that show a colour have voxels that are no bytes.

    >>> colour_defects(np.array([[[[-1.0, 256.0]]]], np.float32), [0])
    ['has voxels from -1 to 256 in channel 0, which shows a colour, of which they go from 0 to 255']
    """
    ranges = {i: (float(image_CDHW[i].min()), float(image_CDHW[i].max())) for i in channels}
    return [
        f"has voxels from {low:g} to {high:g} in channel {i}, which shows a colour, of which they go from 0 to 255"
        for i, (low, high) in ranges.items()
        if low < 0 or high > 255
    ]


def affine_defects(affine: NDArray[np.float64]) -> list[str]:
    """Says whether voxels lack a size, or their axes span no volume."""
    sizes = voxel_sizes(affine)
    if not (np.isfinite(affine).all() and (sizes > 0).all()):
        return [f"has voxels of {sizes.tolist()} mm, but sizes are positive and finite"]
    if abs(np.linalg.det(affine[:3, :3] / sizes)) < MIN_CELL:
        return ["has axes that lie in one plane, or nearly so: its affine places no volume"]
    return []


def as_label(voxels: NDArray[Any], labels: Labels) -> NDArray[np.uint8] | str:
    """Returns the label by its numbers in memory, or else what is wrong with its values.

    Floats are taken for the whole numbers that they miss by rounding.

    >>> as_label(np.array([0.0, 3.99999994]), Labels(values=(1, 2, 4)))
    array([0, 3], dtype=uint8)
    >>> as_label(np.array([0, 3, 7]), Labels.consecutive(2))
    'has values 3, 7, but the classes are numbered 0 to 2'
    """
    if voxels.size == 0:
        return f"has shape {voxels.shape}: no voxel"
    low, high = voxels.min(), voxels.max()
    if low >= -MAX_ROUNDING and high <= labels.in_files.max() + MAX_ROUNDING:  # false where any voxel is NaN
        label = _nearest(voxels)
        if label is not None and (numbers := labels.to_numbers(label)) is not None:
            return numbers
    values = np.unique(voxels)
    with np.errstate(invalid="ignore"):  # of infinite ones
        fractions = values[np.isnan(values) | (np.abs(values - np.rint(values)) > MAX_ROUNDING)]
    if len(fractions):
        return f"has values that are not whole numbers: {_listed(fractions)}"
    foreign = values[~np.isin(np.rint(values), labels.in_files)]
    return f"has values {_listed(foreign)}, but the classes are numbered {labels.told()}"


def _nearest(voxels: NDArray[Any]) -> NDArray[np.uint8] | None:
    """Rounds what is in the range of bytes, with no other copy of a volume; None where that is no rounding."""
    if voxels.dtype.kind != "f":
        return voxels.astype(np.uint8)
    label = np.empty_like(voxels, np.uint8)
    np.rint(voxels, out=label, casting="unsafe")
    planes = zip(np.moveaxis(voxels, -1, 0), np.moveaxis(label, -1, 0), strict=True)
    is_near = all(np.abs(plane - rounded).max() <= MAX_ROUNDING for plane, rounded in planes)
    return label if is_near else None


def _listed(values: NDArray[Any]) -> str:
    """Lists the first values, by all the digits that tell them from others."""
    return ", ".join(str(v).removesuffix(".0") for v in values[:5]) + (", ..." if len(values) > 5 else "")


def mismatches(volume: Volume, other: Volume, name: str) -> list[str]:
    """Says whether a volume lies elsewhere than ``other``, called ``name``: its image, or its first channel."""
    shape, expected = volume.voxels.shape, other.voxels.shape[:3]
    if shape[:3] != expected or volume.voxels.ndim > 4:
        return [f"has shape {shape}, but {name} has {expected}"]
    if len(expected) != 3:
        return []  # reported of the image already
    shift = apart(volume.affine, other.affine, expected, outer=False)
    if not shift <= MAX_SHIFT * voxel_sizes(other.affine).min():  # so written, NaN is refused too
        return [f"lies {shift:.3g} mm away from {name}: {why_elsewhere(volume, other, name)}"]
    return []
