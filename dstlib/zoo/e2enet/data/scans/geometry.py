"""How a scan lies in its file, and the way to the canonical orientation and back.

Stored order is the file's own (D, H, W); canonical order leads D to the top (S), H to the front (A), W to the right
(R) of the patient. Shapes: C channels, D depth, H height, W width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import nibabel
import numpy as np
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray

from dstlib.errors import DataError, StateError, require

ORIENTATION = "SAR"  # where D, H and W lead
MAX_ANISOTROPY = 3.0  # of spacings; beyond it slices are resampled for themselves, as nnU-Net does

Shape = tuple[int, int, int]
Spacing = tuple[float, float, float]  # mm
Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
T = TypeVar("T", bound=np.generic)


class Volume(NamedTuple):
    """One file: voxels in its own order (x, y, z[, channel]), its affine, and whether the header states that one."""

    voxels: NDArray[Any]
    affine: NDArray[np.float64]
    is_placed: bool


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
    def cropped_shape(self) -> Shape:
        """The shape before resampling."""
        return box_shape(self.box)

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

    def to_json(self) -> dict[str, Any]:
        """Returns what :meth:`from_json` reads."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Placement":
        """Reads what :meth:`to_json` wrote.

        Raises:
            StateError: The content is damaged or foreign.
        """
        try:
            box = tuple(tuple(edges) for edges in content["box"])
            return cls(**{name: tuple(value) for name, value in content.items() if name != "box"}, box=box)  # type: ignore[arg-type]
        except (KeyError, TypeError, AttributeError) as error:
            allowed, remedy = "what to_json() wrote", "Prepare the scan again, or restore the file."
            raise StateError.of("placement", "a saved scan", allowed=allowed, given=content, remedy=remedy) from error


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
    require(
        not np.isnan(turned).any(),
        "affine",
        "a scan",
        allowed="three axes of voxels",
        given=affine[:3, :3].tolist(),
        remedy="Repair the header of the file.",
        error=DataError,
    )
    axes, flips = [0, 0, 0], [False, False, False]
    for file_axis, (axis, direction) in enumerate(turned):  # both count x, y, z, where arrays count D, H, W
        axes[2 - int(axis)] = 2 - file_axis
        flips[2 - int(axis)] = bool(direction < 0)
    sizes = [float(size) for size in voxel_sizes(affine)[::-1]]
    spacing = (sizes[axes[0]], sizes[axes[1]], sizes[axes[2]])
    canonical = (shape[axes[0]], shape[axes[1]], shape[axes[2]])
    return Placement(
        stored_shape=shape,
        axes=(axes[0], axes[1], axes[2]),
        flips=(flips[0], flips[1], flips[2]),
        box=((0, canonical[0]), (0, canonical[1]), (0, canonical[2])),
        stored_spacing=spacing,
        spacing=spacing,
        shape=canonical,
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
    edges = []
    for axis in range(3):
        found = np.flatnonzero(mask_DHW.any(tuple(a for a in range(3) if a != axis)))
        edges.append((int(found[0]), int(found[-1]) + 1) if len(found) else (0, mask_DHW.shape[axis]))
    return edges[0], edges[1], edges[2]


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
    (d, d_end), (h, h_end), (w, w_end) = box
    return d_end - d, h_end - h, w_end - w
