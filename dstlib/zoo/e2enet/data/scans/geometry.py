"""How a scan lies in its file, and the way to the canonical orientation and back.

Stored order is the file's own (D, H, W); canonical order leads D to the top (S), H to the front (A), W to the right
(R) of the patient. Shapes: C channels, D depth, H height, W width.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import nibabel
import numpy as np
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray

from dstlib.errors import DataError
from dstlib.zoo.e2enet.data.cases import Shape, Spacing, three
from dstlib.zoo.e2enet.data.scans.header import Header

ORIENTATION = "SAR"  # where D, H and W lead
MAX_ANISOTROPY = 3.0  # of spacings; beyond it slices are resampled for themselves, as nnU-Net does

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
T = TypeVar("T", bound=np.generic)


class Volume(NamedTuple):
    """One file: voxels in its own order (x, y, z[, channel]), and its affine.

    ``odd`` says what is legal there, but seldom meant; ``header`` is all that the file says of its place, if it is
    NIfTI.
    """

    voxels: NDArray[Any]
    affine: NDArray[np.float64]
    odd: tuple[str, ...] = ()
    header: Header | None = None


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How one scan was turned, cropped and resampled.

    - ``stored_shape``: of the file, in stored order; all else is canonical.
    - ``axes``: canonical axis i is the stored axis ``axes[i]``, running backwards where ``flips[i]``.
    - ``box``: first and past the last voxel along each axis of what the cropping left.
    - ``stored_spacing``, ``spacing``: in mm, before and after resampling; ``shape`` is that of the prepared image.
    """

    stored_shape: Shape
    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    box: Box
    stored_spacing: Spacing
    spacing: Spacing
    shape: Shape

    @property
    def coarse(self) -> int | None:
        """The axis along which slices were resampled for themselves."""
        return coarse_axis(self.stored_spacing, self.spacing)

    def turn(self, stored: NDArray[T]) -> NDArray[T]:
        """Returns a view of a volume (D, H, W) of the file in canonical order."""
        return np.flip(stored.transpose(self.axes), self._flipped)

    def turn_back(self, canonical: NDArray[T]) -> NDArray[T]:
        """Returns a view in stored order: undoes :meth:`turn`."""
        return np.flip(canonical, self._flipped).transpose(np.argsort(self.axes))

    def crop(self, canonical: NDArray[T]) -> NDArray[T]:
        """Returns a view of what lies in the box."""
        return canonical[tuple(slice(*edges) for edges in self.box)]

    @property
    def _flipped(self) -> tuple[int, ...]:
        return tuple(axis for axis in range(3) if self.flips[axis])


def uncropped(shape: Shape, affine: NDArray[np.float64]) -> Placement:
    """Finds how a scan of a stored shape is turned to the nearest canonical axes; nothing is cropped or resampled.

    ``affine`` takes the file's (x, y, z) voxels to mm (RAS+). Each axis goes to the patient's axis that it is
    nearest to, so a tilted scan keeps its tilt.

    Raises:
        DataError: The affine gives an axis no direction.

    >>> uncropped((3, 4, 5), np.diag([-0.5, 0.75, 2.0, 1.0])).flips
    (False, False, True)
    """
    try:
        turned = nibabel.io_orientation(affine)
    except np.linalg.LinAlgError:  # where a number is not finite
        turned = np.full((3, 2), np.nan)
    if np.isnan(turned).any():
        given, remedy = affine[:3, :3].tolist(), "Repair the header of the file."
        raise DataError.of("affine", "a scan", allowed="three axes of voxels", given=given, remedy=remedy)
    patient_axes, directions = turned[::-1].T  # of D, H, W: both count x, y, z, where arrays count D, H, W
    axes = np.argsort(2 - patient_axes)
    flips, sizes, canonical = directions[axes] < 0, voxel_sizes(affine)[::-1][axes], np.array(shape)[axes]
    return Placement(
        stored_shape=shape,
        axes=three(axes.tolist()),
        flips=three(flips.tolist()),
        box=three((0, n) for n in canonical.tolist()),
        stored_spacing=three(sizes.tolist()),
        spacing=three(sizes.tolist()),
        shape=three(canonical.tolist()),
    )


def coarse_axis(*spacings: Spacing) -> int | None:
    """Finds the one axis that is over three times as coarse as the finest, in the first of the spacings that has such.

    Two equally coarse axes, as of a stack of lines, are not taken apart.

    Reference: nnU-Net v2, which asks the spacing before resampling, then the one after it.

    >>> coarse_axis((1.0, 1.0, 1.0), (5.0, 0.8, 0.8)), coarse_axis((5.0, 5.0, 0.8)), coarse_axis((1.0, 1.0, 1.0))
    (0, None, None)
    """
    for spacing in spacings:
        coarsest = max(spacing)
        if coarsest > MAX_ANISOTROPY * min(spacing):
            axes = [axis for axis in range(3) if spacing[axis] == coarsest]
            return axes[0] if len(axes) == 1 else None
    return None


def box_around(mask_DHW: NDArray[np.bool_]) -> Box:
    """Finds the smallest box around what is true; everything, if nothing is.

    >>> box_around(np.array([[[False, True, False, True, False]]]))
    ((0, 1), (0, 1), (1, 4))
    """
    found = [np.flatnonzero(mask_DHW.any(others)) for others in ((1, 2), (0, 2), (0, 1))]
    if not len(found[0]):
        return three((0, n) for n in mask_DHW.shape)
    return three((int(places[0]), int(places[-1]) + 1) for places in found)


def nonzero(image_CDHW: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Finds where any channel is not 0: (D, H, W)."""
    out = image_CDHW[0] != 0
    for channel in image_CDHW[1:]:  # one after the other: comparing all at once takes C times the memory
        out |= channel != 0
    return out


def box_shape(box: Box) -> Shape:
    """Counts the voxels along each axis of a box.

    >>> box_shape(((0, 1), (2, 4), (0, 9)))
    (1, 2, 9)
    """
    return three(end - start for start, end in box)
