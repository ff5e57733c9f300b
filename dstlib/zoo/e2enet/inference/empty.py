"""Windows that hold nothing, by what the preparation of the scans makes of air: they need not be read.

Shapes: C channels, D, H, W depth, height, width in voxels.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from dstlib.zoo.e2enet.data.preprocessing.normalization import CtNormalization, Normalization, ZScoreNormalization
from dstlib.zoo.e2enet.data.preprocessing.preprocessor import Preparation
from dstlib.zoo.e2enet.inference.sliding_window import Window, Windows

TOLERANCE = 1e-3  # of the standard deviation of a channel: resampling by splines rings around edges, ever fainter
Range = tuple[float, float]  # of prepared intensities, both ends with it


def empty_ranges(preparation: Preparation) -> tuple[Range, ...] | None:
    """Finds what prepared intensities hold nothing, of each channel; None where one has no threshold for that.

    - A CT is clipped from below: nothing is what was clipped there, air say.
    - A channel that is standardised inside the patient's mask is 0 outside: nothing is what is 0.
    - Any other has no threshold: what its air is, differs from scan to scan.

    >>> rule = CtNormalization(low=-950.0, high=300.0, mean=50.0, std=100.0)
    >>> empty_ranges(Preparation(spacing=None, normalization=(rule,)))
    ((-inf, -9.999),)
    >>> empty_ranges(Preparation(spacing=None, normalization=(rule, ZScoreNormalization()))) is None
    True
    """
    found = [_range_of(rule) for rule in preparation.normalization]
    ranges = tuple(each for each in found if each is not None)
    return ranges if len(ranges) == len(found) else None


def _range_of(rule: Normalization) -> Range | None:
    if isinstance(rule, CtNormalization):
        clipped = rule.apply(np.full((1, 1, 1), rule.low, np.float32))
        return -math.inf, clipped.item() + TOLERANCE
    if isinstance(rule, ZScoreNormalization) and rule.inside_mask:
        return -TOLERANCE, TOLERANCE
    return None


def without_empty(windows: Windows, image_CDHW: NDArray[np.float32], ranges: Sequence[Range]) -> Windows:
    """Marks the windows as empty in which every voxel of the image, in every channel, holds nothing.

    What the image is padded with holds nothing, either; NaN is something.

    >>> from dstlib.zoo.e2enet.inference.sliding_window import windows_of
    >>> image = np.array([0, 0, 0, 0, 0, 7, 0, 0], np.float32).reshape(1, 1, 1, 8)
    >>> without_empty(windows_of((1, 1, 8), (1, 1, 4)), image, [(0, 0)]).is_empty
    (True, False, False)
    """
    boxes = [windows.inside(place) for place in windows.places]
    # Between these no window begins or ends: the image is looked at once, however many windows lie on each voxel.
    cuts = [sorted({edge for box in boxes for edge in (box[i].start, box[i].stop)}) for i in range(3)]
    is_full = np.zeros([len(each) - 1 for each in cuts], bool)
    for channel_DHW, (low, high) in zip(image_CDHW, ranges, strict=True):
        channel = channel_DHW.transpose(windows.order)
        for cell in product(*(range(len(each) - 1) for each in cuts)):
            if not is_full[cell]:
                voxels = channel[tuple(slice(each[i], each[i + 1]) for each, i in zip(cuts, cell, strict=True))]
                is_full[cell] = not (voxels.min() >= low and voxels.max() <= high)

    def is_empty(box: Window) -> bool:
        cells = (slice(each.index(s.start), each.index(s.stop)) for s, each in zip(box, cuts, strict=True))
        return not is_full[tuple(cells)].any()

    return replace(windows, is_empty=tuple(map(is_empty, boxes)))
