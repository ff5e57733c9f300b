"""How a slice of a scan is looked at: across which axis, which way up, and how many millimetres it shows.

Shapes: D, H, W as stored.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dstlib.zoo.e2enet.data.layouts.labels import Labels
from dstlib.zoo.e2enet.data.scans.geometry import coarse_axis

OPPOSITE = {"L": "R", "R": "L", "A": "P", "P": "A", "S": "I", "I": "S"}
# By where the axis across the slices leads: what the slices are called, and what is shown at the top and on the left.
_SHOWN = {
    **dict.fromkeys("SI", ("axial", "A", "R")),
    **dict.fromkeys("AP", ("coronal", "S", "R")),
    **dict.fromkeys("LR", ("sagittal", "S", "A")),
}


@dataclass(frozen=True, kw_only=True)
class View:
    """How the slices across one axis of a volume (D, H, W) are shown.

    - ``name``: axial, coronal or sagittal.
    - ``axis``: the one across the slices; ``rows`` and ``columns`` are those that lead down and to the right.
    - ``flips``: which of rows and columns are shown in the reverse order.
    - ``spacing``: millimetres from row to row, and from column to column.
    - ``top`` and ``left``: what lies there in the patient: A(nterior), P, S(uperior), I, L or R.
    """

    name: str
    axis: int
    rows: int
    columns: int
    flips: tuple[bool, bool]
    spacing: tuple[float, float]
    top: str
    left: str

    def of(self, volume: NDArray[Any], index: int) -> NDArray[Any]:
        """Returns the slice of that index as it is shown."""
        plane = np.take(volume, index, self.axis)
        if self.rows > self.columns:
            plane = plane.T
        return plane[tuple(slice(None, None, -1) if flip else slice(None) for flip in self.flips)]


def usual_view(orientation: str, spacing: Sequence[float]) -> View:
    """Returns the view in which radiologists look at a volume: front or top above, the patient's right on the left.

    The slices are those that were taken, where one axis is far coarser than the others, and else axial ones.
    ``orientation`` names where D, H and W lead, ``spacing`` says how many millimetres their voxels measure.

    >>> view = usual_view("SAR", (5.0, 0.8, 0.8))  # RAS, as most NIfTI files
    >>> view.name, view.flips, view.top, view.left
    ('axial', (True, True), 'A', 'R')
    >>> usual_view("SAR", (0.8, 5.0, 0.8)).name
    'coronal'
    """
    depth, height, width = spacing
    found = coarse_axis((depth, height, width))
    axis = next(i for i in range(3) if orientation[i] in "SI") if found is None else found
    name, top, left = _SHOWN[orientation[axis]]
    rows, columns = (next(i for i in range(3) if orientation[i] in (edge, OPPOSITE[edge])) for edge in (top, left))
    return View(
        name=name,
        axis=axis,
        rows=rows,
        columns=columns,
        flips=(orientation[rows] == top, orientation[columns] == left),
        spacing=(spacing[rows], spacing[columns]),
        top=top,
        left=left,
    )


def busiest_slice(label: NDArray[np.uint8], axis: int = 0) -> int:
    """Returns the slice with the most classes, of those the one with the most foreground, and else the middle one.

    >>> busiest_slice(np.array([[[1, 1]], [[1, 2]], [[0, 0]]], np.uint8))
    1
    >>> busiest_slice(np.zeros((3, 1, 2), np.uint8))
    1
    """
    planes = np.moveaxis(label, axis, 0)

    def rank(index: int) -> tuple[int, int, float]:
        foreground = planes[index][planes[index] > 0]
        return len(np.unique(foreground)), foreground.size, -abs(index - (len(planes) - 1) / 2)

    return max(range(len(planes)), key=rank)


def classes_on_top(label: NDArray[np.uint8], labels: Labels) -> NDArray[np.uint8]:
    """Returns a label as it is shown: each voxel as its class, from 1 up, and of regions that overlap as the last one.

    What is ignored is 0, as the background is.

    >>> brats = Labels(values=(1, 2, 4), regions=((1, 2, 4), (1, 4)), written=(2, 1), ignored=5)
    >>> classes_on_top(np.array([0, 1, 2, 3, 4], np.uint8), brats).tolist()
    [0, 2, 1, 2, 0]
    """
    shown = np.zeros(256, np.uint8)
    for k, numbers in enumerate(labels.members, start=1):
        shown[list(numbers)] = k
    return shown[label]


def bar_length(width: float) -> float:
    """Returns the millimetres of the scale bar on a picture of a width: a third at most, 1, 2 or 5 × 10^n.

    >>> bar_length(300.0), bar_length(35.0), bar_length(0.9)
    (100.0, 10.0, 0.2)
    """
    power = 10.0 ** math.floor(math.log10(width / 3))
    return max(digit * power for digit in (0.5, 1, 2, 5) if digit * power <= width / 3)  # 0.5, as log10 rounds
