"""After the prediction: of each class that gains by it, only the largest connected component is kept.

Shapes: D, H, W depth, height, width in voxels.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import find_objects
from scipy.ndimage import label as connected

from dstlib.zoo.e2enet.evaluation.metrics import dice_per_class

NEIGHBOURS = np.ones((3, 3, 3), bool)  # voxels that share a corner are connected: 26 neighbours


def keep_largest(label: NDArray[np.uint8], classes: Sequence[int]) -> NDArray[np.uint8]:
    """(D, H, W): without the smaller components of these classes, which become background.

    Components are 26-connected, and their size is counted in voxels. Of two of the same size the one with the
    first voxel stays, in (depth, height, width) order. Other classes, and ``label`` itself, are left as they are.

    >>> keep_largest(np.array([[[1, 0, 1, 1, 2, 0, 2]]], np.uint8), (1,))
    array([[[0, 0, 1, 1, 2, 0, 2]]], dtype=uint8)
    """
    kept = label.copy()
    boxes = find_objects(label, max_label=max(classes, default=0))
    for value in classes:
        if boxes[value - 1] is None:
            continue
        inside = kept[boxes[value - 1]]  # a view: what is written here is written to `kept`
        components, num = connected(inside == value, structure=NEIGHBOURS)
        if num > 1:
            sizes = np.bincount(components.ravel())[1:]
            inside[(components > 0) & (components != 1 + _first_largest(components, sizes))] = 0
    return kept


def choose_postprocessing(
    predictions: Iterable[NDArray[np.uint8]], labels: Iterable[NDArray[np.uint8]], *, num_classes: int
) -> tuple[int, ...]:
    """The classes whose mean Dice over the validation cases rises by :func:`keep_largest`.

    No other class can lose by it, as what is removed becomes background. Both may be generators: one case is
    held at a time.

    Reference: nnU-Net's choice of postprocessing, class by class; it also tries all foreground as one, first.
    """
    before, after = [], []
    everything = range(1, num_classes + 1)
    for prediction, label in zip(predictions, labels, strict=True):
        before.append(dice_per_class(label, prediction, num_classes=num_classes))
        after.append(dice_per_class(label, keep_largest(prediction, everything), num_classes=num_classes))
    gains = np.nansum(np.subtract(after, before), axis=0) if before else np.zeros(num_classes)
    return tuple(k for k, gain in zip(everything, gains, strict=True) if gain > 0)


def _first_largest(components: NDArray[np.int32], sizes: NDArray[np.int64]) -> int:
    """The index of the largest size; of several, the one that comes first in the volume."""
    largest = np.flatnonzero(sizes == sizes.max())
    if len(largest) == 1:
        return int(largest[0])
    flat = components.ravel()
    first = flat[np.isin(flat, largest + 1).argmax()]
    return int(first) - 1
