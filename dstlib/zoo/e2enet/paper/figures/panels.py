"""Figures 5, 9 and 10: what methods predict on some cases, beside image and label, and where they differ.

Shapes: N cases, D, H, W as stored; rows and columns of a slice as shown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, distance_transform_edt, find_objects, label

from dstlib.errors import DataError
from dstlib.plot import drawn
from dstlib.zoo.e2enet.data.cases import Case
from dstlib.zoo.e2enet.data.layouts.labels import Labels
from dstlib.zoo.e2enet.evaluation.figures import OUTLINED, class_colours, show_slice
from dstlib.zoo.e2enet.evaluation.slices import View, busiest_slice, classes_on_top, usual_view
from dstlib.zoo.e2enet.paper.figures import style

MOST_BOXES = 3
_WIDTH = 2.2  # inches of a picture
Box = tuple[slice, slice]


@dataclass(frozen=True, eq=False)
class Predicted:
    """A case, what each method predicted of it (D, H, W), and the mean Dice of each there."""

    case: Case
    predictions: Mapping[str, NDArray[np.uint8]]
    dice: Mapping[str, float]


def panels(path: Path, cases: Sequence[Predicted], *, labels: Labels, classes: Sequence[str], title: str) -> None:
    """Draws a row per case: the image, the label on it, and what each method predicted; regions that differ are boxed.

    It is the slice with something of the label on which the predictions differ most, cut out around all that is
    segmented there.

    Raises:
        DataError: There is no case, or they are of other methods.
    """
    methods = [tuple(of.predictions) for of in cases]
    if not cases or len(set(methods)) > 1 or len(methods[0]) < 2:
        given = "; ".join(", ".join(names) for names in dict.fromkeys(methods)) or "no case"
        allowed, remedy = (
            "cases that the same methods have segmented, two or more",
            "Finish the rows on the same folds.",
        )
        raise DataError.of("cases", "figures 5, 9 and 10", allowed=allowed, given=given, remedy=remedy)
    colours, num_columns = class_colours(len(classes)), 2 + len(methods[0])
    width = 0.5 + _WIDTH * num_columns
    size = (width, 0.7 + (_WIDTH + 0.2) * len(cases) + 0.25 * style.num_rows(len(classes), width))
    with drawn(path, size=size) as figure:
        grid = figure.subplots(len(cases), num_columns, squeeze=False)
        for row, of, is_first in zip(grid, cases, [True, *[False] * len(cases)], strict=False):
            _draw_row(row, of, labels, colours)
            if is_first:
                for axes, name in zip(row, ("Image", "Label", *methods[0]), strict=True):
                    below = f"\n{axes.get_title('center')}" if axes.get_title("center") else ""
                    axes.set_title(style.label(name, width=20) + below, loc="center", fontsize=10)
        handles = [Patch(color=colours(k), label=style.label(f"{k + 1} {name}")) for k, name in enumerate(classes)]
        style.below(figure, handles)
        style.headline(figure, title)


def chosen_cases(difference_N: NDArray[np.float64], number: int) -> list[int]:
    """Returns cases at even steps of rank, from the lowest difference over the median to the highest.

    Cases without a difference are never among them; where there are fewer than asked for, it is all of them.

    >>> chosen_cases(np.array([0.1, -0.2, 0.0, np.nan, 0.3]), 3)
    [1, 0, 4]
    """
    order = [int(n) for n in np.argsort(difference_N, kind="stable") if np.isfinite(difference_N[n])]
    ranks = np.linspace(0, len(order) - 1, min(number, len(order)))
    return [order[int(rank + 0.5)] for rank in ranks]


def differing(predictions: Sequence[NDArray[np.uint8]]) -> NDArray[np.bool_]:
    """Says of each voxel whether not all predictions agree there."""
    first, *others = predictions
    return np.any([other != first for other in others], axis=0)


def boxes_around(differs: NDArray[np.bool_], *, most: int = MOST_BOXES) -> list[Box]:
    """Returns boxes around the regions of a slice that differ, those with the most voxels first.

    Voxels nearer to each other than a fiftieth of the slice are of one region. Regions of a single voxel are none.

    >>> differs = np.zeros((20, 20), bool)
    >>> differs[2:4, 2:6] = differs[12:14, 12] = differs[18, 2] = True
    >>> boxes_around(differs)
    [(slice(2, 4, None), slice(2, 6, None)), (slice(12, 14, None), slice(12, 13, None))]
    """
    reach = max(1, round(max(differs.shape) / 100))
    regions, _ = label(binary_dilation(differs, np.ones((3, 3), bool), iterations=reach), np.ones((3, 3)))
    regions = regions * differs
    sizes = {k: int((regions == k).sum()) for k in range(1, int(regions.max()) + 1)}
    found = find_objects(regions)
    largest = sorted((k for k, size in sizes.items() if size > 1), key=lambda k: -sizes[k])
    return [found[k - 1] for k in largest[:most]]


def cut_out(foreground: NDArray[np.bool_], spacing: tuple[float, float]) -> Box:
    """Returns the box of a slice to show: a square in millimetres around the foreground, with a sixth of margin.

    Where the slice ends, so does the box. Without foreground it is the whole slice.

    >>> cut_out(np.pad(np.ones((6, 2), bool), 10), (1.0, 2.0))
    (slice(9, 17, None), slice(9, 13, None))
    """
    if not foreground.any():
        return (slice(0, foreground.shape[0]), slice(0, foreground.shape[1]))
    (top, left), (bottom, right) = (extreme(np.argwhere(foreground), axis=0) for extreme in (np.min, np.max))
    edges = [(int(top), int(bottom) + 1), (int(left), int(right) + 1)]
    side = 4 / 3 * max((stop - start) * mm for (start, stop), mm in zip(edges, spacing, strict=True))
    box = []
    for (start, stop), mm, size in zip(edges, spacing, foreground.shape, strict=True):
        margin = (side / mm - (stop - start)) / 2
        box.append(slice(max(0, round(start - margin)), min(size, round(stop + margin))))
    return (box[0], box[1])


def _draw_row(row: Sequence[Axes], of: Predicted, labels: Labels, colours: ListedColormap) -> None:
    case, view = of.case, usual_view(of.case.orientation, of.case.spacing)
    volumes = [classes_on_top(volume, labels) for volume in (case.label, *of.predictions.values())]
    index = _slice_to_show(volumes, view)
    slices = [view.of(volume, index) for volume in volumes]
    box = cut_out(np.any([each > 0 for each in slices], axis=0), view.spacing)
    picture, slices = view.of(case.image[0], index)[box], [each[box] for each in slices]
    boxes = boxes_around(differing(slices[1:]))
    for axes, shown, name in zip(row, (None, *slices), ("", "", *of.predictions), strict=True):
        show_slice(axes, view, picture, shown, colours)
        if shown is not None:
            _draw_boxes(axes, boxes)
        if shown is slices[0]:
            _draw_numbers(axes, shown)
        if name:
            axes.set_title(f"Dice {of.dice[name]:.3f}", loc="center", fontsize=9)
    place = f"{style.label(case.name, width=24)}\n{view.name} slice {index + 1} of {case.label.shape[view.axis]}"
    row[0].text(-0.06, 0.5, place, rotation=90, ha="right", va="center", fontsize=8, transform=row[0].transAxes)


def _slice_to_show(volumes: Sequence[NDArray[np.uint8]], view: View) -> int:
    """Returns the slice with something of the label on which predictions differ most.

    Where they are alike it is the slice with the most classes; where the label is empty, any slice counts.
    """
    counts, labelled = (
        np.moveaxis(volume, view.axis, 0).sum(axis=(1, 2)) for volume in (differing(volumes[1:]), volumes[0] > 0)
    )
    counts = np.where(labelled > 0, counts, 0) if labelled.any() else counts
    return int(counts.argmax()) if counts.any() else busiest_slice(volumes[0], view.axis)


def _draw_numbers(axes: Axes, classes: NDArray[np.uint8]) -> None:
    """Writes the number of each class where it is thickest: many colours are not told apart by all."""
    for k in np.unique(classes[classes > 0]):
        depth = distance_transform_edt(np.pad(classes == k, 1))[1:-1, 1:-1]
        row, column = np.unravel_index(int(depth.argmax()), depth.shape)
        text = axes.text(float(column), float(row), f"{k}", ha="center", va="center", fontsize=7, gid="class")
        text.set(color="white", path_effects=[withStroke(linewidth=2, foreground="black")])


def _draw_boxes(axes: Axes, boxes: Sequence[Box]) -> None:
    """Draws boxes half a voxel outside what they hold, but not outside the picture; voxels lie around their indices."""
    right, bottom = (max(limits) for limits in (axes.get_xlim(), axes.get_ylim()))
    for rows, columns in boxes:
        x, y = max(columns.start - 1.0, -0.5), max(rows.start - 1.0, -0.5)
        wide, tall = min(columns.stop, right) - x, min(rows.stop, bottom) - y
        box = Rectangle((x, y), wide, tall, fill=False, edgecolor="white", linewidth=1.4, gid="box")
        box.set(path_effects=OUTLINED)
        axes.add_patch(box)
