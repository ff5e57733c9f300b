"""After the prediction: of the classes that gain by it, only the largest connected component is kept.

Which classes these are is for :mod:`dstlib.zoo.e2enet.evaluation.evaluate` to say.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import find_objects
from scipy.ndimage import label as connected

CHUNK = 1 << 22  # voxels counted at a time: bincount makes eight bytes of each
NEIGHBOURS = np.ones((3, 3, 3), bool)  # voxels that share a corner are connected: 26 neighbours


def keep_largest(
    label: NDArray[np.uint8], classes: Sequence[int], members: Sequence[Sequence[int]] | None = None
) -> NDArray[np.uint8]:
    """Returns a label without the smaller components of these classes, which become background.

    Components are 26-connected, and their size is counted in voxels. Of two of the same size the one with the
    first voxel stays, in (depth, height, width) order. Other classes, and ``label`` itself, are left as they are.
    ``members`` are the numbers in the label that make each of all classes, or regions; by default class i has number i.
    Regions that share voxels are reduced one after the other, in the order of ``classes``.

    Shapes: (D, H, W) → (D, H, W), depth, height and width in voxels.

    >>> keep_largest(np.array([[[1, 0, 1, 1, 2, 0, 2]]], np.uint8), (1,))
    array([[[0, 0, 1, 1, 2, 0, 2]]], dtype=uint8)
    >>> keep_largest(np.array([[[1, 0, 1, 1, 2, 0, 2]]], np.uint8), (1,), members=((1, 2), (2,)))
    array([[[0, 0, 1, 1, 2, 0, 0]]], dtype=uint8)
    """
    kept = label.copy()
    regions = [(k,) if members is None else members[k - 1] for k in classes]
    boxes = find_objects(label, max_label=max((n for numbers in regions for n in numbers), default=0))
    for numbers in regions:
        found = [boxes[n - 1] for n in numbers if boxes[n - 1] is not None]
        if not found:
            continue
        box = tuple(
            slice(min(s.start for s in sides), max(s.stop for s in sides)) for sides in zip(*found, strict=True)
        )
        inside = kept[box]  # a view: what is written here is written to `kept`
        mask = np.isin(np.arange(256), numbers)[inside]
        components, num = connected(mask, structure=NEIGHBOURS)
        if num > 1:
            flat, sizes = components.ravel(), np.zeros(num + 1, np.int64)
            for start in range(0, flat.size, CHUNK):
                sizes += np.bincount(flat[start : start + CHUNK], minlength=num + 1)
            sizes[0] = 0  # the background
            largest = flat[(sizes == sizes.max())[flat].argmax()]  # of several, the first in the volume
            inside[(components > 0) & (components != largest)] = 0
    return kept
