"""The metrics of a prediction against its label: Dice, surface Dice, Hausdorff distances, of one class or of all.

Shapes: K foreground classes, D, H, W depth, height, width in voxels; spacing in mm along (D, H, W).
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_surface_dice
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, find_objects
from scipy.spatial import KDTree

from dstlib.errors import DataError, require, similar

Mask = NDArray[np.bool_]
CHUNK = 1 << 22  # voxels counted at a time: bincount makes eight bytes of each


@dataclass(frozen=True)
class Pair:
    """A structure in label and prediction, both there: masks (D, H, W), their spacing, the tolerance in mm."""

    label: Mask
    prediction: Mask
    spacing: Sequence[float]
    tolerance: float

    @cached_property
    def distances(self) -> NDArray[np.float64]:
        """The distances between the surfaces, in mm."""
        return surface_distances(self.label, self.prediction, spacing=self.spacing)


@dataclass(frozen=True)
class Metric:
    """A metric: its name in tables, what it is, and how it is measured; None is by the numbers of voxels alone.

    A share is 0 where a structure is missed; a distance, in mm, has no value there.
    """

    name: str
    definition: str
    measure: Callable[[Pair], float] | None
    is_share: bool


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "dice": Metric(
            "Dice",
            "Dice = 2 |label ∩ prediction| / (|label| + |prediction|), per class and case.",
            None,
            is_share=True,
        ),
        "nsd": Metric(
            "NSD",
            "NSD, surface Dice: the share of both surfaces, by area, within {tolerance} of the other one.",
            lambda pair: surface_dice(pair.label, pair.prediction, spacing=pair.spacing, tolerance=pair.tolerance),
            is_share=True,
        ),
        "hd95": Metric(
            "HD95",
            "HD95: 95th percentile, in mm, of the distances between the surface voxels, both directions pooled.",
            lambda pair: np.percentile(pair.distances, 95),
            is_share=False,
        ),
        "hd": Metric(
            "HD",
            "HD: the largest of these distances, in mm.",
            lambda pair: np.percentile(pair.distances, 100),
            is_share=False,
        ),
        "msd": Metric(
            "MSD",
            "MSD: the mean of these distances, in mm.",
            lambda pair: pair.distances.mean(),
            is_share=False,
        ),
    }
)
USUAL = ("dice", "nsd", "hd95", "hd")  # what every run keeps


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What is measured: the metrics, and the tolerance of surface Dice in mm, one for all classes or one for each.

    ``postprocessing`` names the classes of whose prediction the largest component alone is measured.
    ``penalty`` is the distance in mm that counts where a structure is in one of label and prediction alone; where it is
    in neither, it then counts as found. None leaves the first out of the means of distances, and the second of all.

    Raises:
        SettingError: A metric is unknown, or a tolerance or the penalty is no distance.

    >>> Scoring(tolerance=(1.0, 2.5)).tolerances(2)
    (1.0, 2.5)
    """

    metrics: tuple[str, ...] = USUAL
    tolerance: float | tuple[float, ...] = 1.0
    postprocessing: tuple[int, ...] = ()
    penalty: float | None = None

    def __post_init__(self) -> None:
        where, names, given = "Scoring", self.metrics, self.tolerance
        alike = [f"Similar to {name!r}: {similar(name, METRICS)}." for name in names if name not in METRICS]
        allowed, remedy = f"'dice' and more of {', '.join(METRICS)}", [*alike, "Leave it out for the usual ones."][0]
        require("dice" in names and not alike, "metrics", where, allowed=allowed, given=names, remedy=remedy)
        values = given if isinstance(given, tuple) else (given,)
        holds, allowed = all(0 <= value < math.inf for value in values), "millimetres from 0 up"
        require(holds, "tolerance", where, allowed=allowed, given=given, remedy="Pass 1.0, say.")
        holds, remedy = self.penalty is None or 0 <= self.penalty < math.inf, "Pass the longest diagonal of a scan."
        require(holds, "penalty", where, allowed=f"{allowed}, or None", given=self.penalty, remedy=remedy)

    def tolerances(self, num_classes: int) -> tuple[float, ...]:
        """Returns the tolerance of each class, in mm.

        Raises:
            SettingError: There is one tolerance per class, and the classes are more or fewer.
        """
        given = self.tolerance
        if not isinstance(given, tuple):
            return (given,) * num_classes
        allowed, remedy = f"one number, or {num_classes} of them", "Give the tolerances in the order of the classes."
        require(len(given) == num_classes, "tolerance", "Scoring", allowed=allowed, given=given, remedy=remedy)
        return given


@dataclass(frozen=True, eq=False)
class CaseScores:
    """The scores of one case: ``values`` (M, K), a row per metric; ``num_voxels`` (K, 2) of label and prediction."""

    values: NDArray[np.float64]
    num_voxels: NDArray[np.int64]


def score(
    label: NDArray[Any], prediction: NDArray[Any], *, spacing: Sequence[float], num_classes: int, scoring: Scoring
) -> CaseScores:
    """Computes every metric of every class 1..``num_classes``, each within the box of its structure.

    Absent from label and prediction: NaN. Absent from one: Dice and surface Dice 0, the distances NaN.

    Shapes: label and prediction (D, H, W), integers.

    Raises:
        DataError: The shapes differ.

    >>> label = np.zeros((4, 4, 4), np.uint8)
    >>> label[1:3, 1:3, 1:3] = 1
    >>> score(label, label, spacing=(1, 1, 1), num_classes=2, scoring=Scoring()).values.tolist()
    [[1.0, nan], [1.0, nan], [0.0, nan], [0.0, nan]]
    """
    overlap, sizes = _count(label, prediction, num_classes=num_classes)
    values = np.full((len(scoring.metrics), num_classes), np.nan)
    present = sizes.sum(axis=1) > 0
    values[:, present] = [[0.0 if METRICS[name].is_share else np.nan] for name in scoring.metrics]
    rows = {name: values[row] for row, name in enumerate(scoring.metrics)}
    rows["dice"][:] = _dice(overlap, sizes)
    if set(rows) == {"dice"}:
        return CaseScores(values, sizes)
    boxes = [find_objects(x, max_label=num_classes) for x in (label, prediction)]
    tolerances = scoring.tolerances(num_classes)
    for k in np.flatnonzero((sizes > 0).all(axis=1)):
        sides = zip(*(found[k] for found in boxes), strict=True)
        box = tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in sides)
        pair = Pair(label[box] == k + 1, prediction[box] == k + 1, spacing, tolerances[k])
        for name, row in rows.items():
            if measure := METRICS[name].measure:
                row[k] = measure(pair)
    return CaseScores(values, sizes)


def score_regions(
    label: NDArray[Any],
    prediction: NDArray[Any],
    *,
    spacing: Sequence[float],
    regions: Sequence[Sequence[int]],
    scoring: Scoring,
) -> CaseScores:
    """Computes every metric of every region as :func:`score` does; a voxel belongs to it if its number is one of these.

    Shapes: label and prediction (D, H, W), bytes.

    Raises:
        DataError: The shapes differ.

    >>> label, prediction = np.array([[[0, 1, 2, 2]]], np.uint8), np.array([[[0, 2, 1, 0]]], np.uint8)
    >>> scoring = Scoring(metrics=("dice",))
    >>> score_regions(label, prediction, spacing=(1, 1, 1), regions=((1, 2), (2,)), scoring=scoring).values.tolist()
    [[0.8, 0.0]]
    """
    found = []
    for numbers, tolerance in zip(regions, scoring.tolerances(len(regions)), strict=True):
        masks = (_inside(volume, numbers) for volume in (label, prediction))
        own = replace(scoring, tolerance=tolerance)
        found.append(score(*masks, spacing=spacing, num_classes=1, scoring=own))
    values, num_voxels = zip(*((of.values, of.num_voxels) for of in found), strict=True)
    return CaseScores(np.concatenate(values, axis=1), np.concatenate(num_voxels))


def dice_per_region(
    label: NDArray[Any], prediction: NDArray[Any], *, regions: Sequence[Sequence[int]]
) -> NDArray[np.float64]:
    """Computes the Dice (K,) of each region; NaN where it is in neither volume.

    Raises:
        DataError: The shapes differ.
    """
    masks = ([_inside(volume, numbers) for volume in (label, prediction)] for numbers in regions)
    return np.concatenate([dice_per_class(*pair, num_classes=1) for pair in masks])


def _inside(volume: NDArray[Any], numbers: Sequence[int]) -> NDArray[np.uint8]:
    """Returns 1 where a volume of bytes has one of these numbers, else 0."""
    return np.isin(np.arange(256), numbers).view(np.uint8)[volume]


def dice_per_class(label: NDArray[Any], prediction: NDArray[Any], *, num_classes: int) -> NDArray[np.float64]:
    """Computes the Dice (K,) of the classes 1..``num_classes``; NaN where a class is in neither volume.

    Shapes: label and prediction alike, integers.

    Raises:
        DataError: The shapes differ.

    >>> dice_per_class(np.array([0, 1, 1, 2]), np.array([1, 1, 1, 0]), num_classes=3)
    array([0.8, 0. , nan])
    """
    return _dice(*_count(label, prediction, num_classes=num_classes))


def surface_dice(label: Mask, prediction: Mask, *, spacing: Sequence[float], tolerance: float) -> float:
    """Computes the share of both surfaces that lies within ``tolerance`` mm of the other; NaN of two empty masks.

    A surface runs between voxels, and is weighed by its area. A structure on the edge of the volume is closed there.

    Shapes: label and prediction (D, H, W).

    Reference: Nikolov et al., *Clinically applicable segmentation of head and neck anatomy for radiotherapy*
    (JMIR 2021), by MONAI with ``use_subvoxels``; without that flag it counts voxels, and seven points less came out.
    """
    if not (label.any() and prediction.any()):
        return 0.0 if label.any() or prediction.any() else math.nan
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "monai.metrics.utils get_mask_edges", FutureWarning)  # MONAI's own call
        found = compute_surface_dice(
            *(torch.from_numpy(np.ascontiguousarray(mask))[None, None] for mask in (prediction, label)),
            class_thresholds=[tolerance],
            include_background=True,
            spacing=[float(step) for step in spacing],
            use_subvoxels=True,
        )
    return float(found)


def surface_distances(label: Mask, prediction: Mask, *, spacing: Sequence[float]) -> NDArray[np.float64]:
    """Measures from every surface voxel of each mask to the nearest one of the other, in mm, both directions pooled.

    A surface voxel has one of its six neighbours outside the mask, or outside the volume. Empty if a mask is.

    Shapes: label and prediction (D, H, W) → (number of surface voxels of both,).

    Reference: the Hausdorff distances of MedPy, which pools both directions; MONAI and others take the larger of the
    two directions' percentiles instead. At 100 % they agree.

    >>> line = np.array([[[True, True, False, False]]])
    >>> surface_distances(line, line[..., ::-1], spacing=(5, 1, 0.5)).tolist()
    [1.0, 0.5, 0.5, 1.0]
    """
    points = [
        np.argwhere(mask & ~binary_erosion(mask)) * np.asarray(spacing, np.float64) for mask in (label, prediction)
    ]
    if not all(map(len, points)):
        return np.empty(0)
    trees = [KDTree(found) for found in points]
    return np.concatenate([trees[1].query(points[0])[0], trees[0].query(points[1])[0]])


def _count(
    label: NDArray[Any], prediction: NDArray[Any], *, num_classes: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Counts the voxels of each class in both (K,), and in label and prediction (K, 2)."""
    if label.shape != prediction.shape:
        allowed, remedy = f"the label's shape {label.shape}", "Predict and score in the same geometry."
        raise DataError.of("shape", "a prediction", allowed=allowed, given=prediction.shape, remedy=remedy)
    counts = np.zeros((3, num_classes + 1), np.int64)
    flat_label, flat_prediction = label.reshape(-1), prediction.reshape(-1)
    for start in range(0, label.size, CHUNK):
        a, b = flat_label[start : start + CHUNK], flat_prediction[start : start + CHUNK]
        for row, voxels in enumerate((a[a == b], a, b)):
            counts[row] += np.bincount(voxels, minlength=num_classes + 1)[: num_classes + 1]
    return counts[0, 1:], counts[1:, 1:].T


def _dice(overlap_K: NDArray[np.int64], sizes_K2: NDArray[np.int64]) -> NDArray[np.float64]:
    total = sizes_K2.sum(axis=1)
    return np.divide(2.0 * overlap_K, total, out=np.full(len(total), np.nan), where=total > 0)
