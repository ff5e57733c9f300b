"""What makes intensities comparable between scans: by a training set for CT, by each scan itself for MRI.

Shapes: C channels, D depth, H height, W width.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dstlib.errors import require


@dataclass(frozen=True, kw_only=True)
class CtNormalization:
    """Clips a CT to [low, high] and standardises it, with numbers that belong to a training set.

    Raises:
        SettingError: A number is not finite, or the range or the deviation is negative.

    >>> CtNormalization(low=-100.0, high=200.0, mean=50.0, std=50.0)
    CtNormalization(low=-100.0, high=200.0, mean=50.0, std=50.0)
    """

    kind: Literal["ct"] = field(default="ct", repr=False)  # its name where it is saved
    low: float
    high: float
    mean: float
    std: float

    def __post_init__(self) -> None:
        given = (self.low, self.high, self.mean, self.std)
        holds = all(map(math.isfinite, given)) and self.low <= self.high and self.std >= 0
        allowed = "finite numbers with low <= high and std >= 0"
        remedy = "They are measured on the scans to train on: prepare these anew."
        require(holds, "low, high, mean, std", "CtNormalization", allowed=allowed, given=given, remedy=remedy)

    def apply(self, image_DHW: NDArray[np.float32], mask_DHW: NDArray[np.bool_] | None = None) -> NDArray[np.float32]:
        """Clips and standardises one channel; the mask of the patient makes no difference to a CT.

        >>> rule = CtNormalization(low=0.0, high=100.0, mean=50.0, std=25.0)
        >>> rule.apply(np.array([[[-1000, 75, 3000]]], np.float32)).tolist()
        [[[-2.0, 1.0, 2.0]]]
        """
        out = np.clip(image_DHW, self.low, self.high)
        out -= self.mean  # in place: a scan of 768×768×300 voxels is 0.7 GB, and each worker holds several of it
        out /= max(self.std, 1e-8)
        return out


@dataclass(frozen=True, kw_only=True)
class MriNormalization:
    """Gives a channel of an MRI mean 0 and standard deviation 1, by that scan alone.

    With ``inside_mask``, as for skull-stripped heads, both are measured inside the patient's mask, and all outside
    stays exactly 0.

    Reference: Isensee et al., *nnU-Net* (Nature Methods 2021), the z-score scheme with and without its mask.
    """

    kind: Literal["mri"] = field(default="mri", repr=False)
    inside_mask: bool = False

    def apply(self, image_DHW: NDArray[np.float32], mask_DHW: NDArray[np.bool_] | None = None) -> NDArray[np.float32]:
        """Standardises one channel; a constant one becomes 0.

        >>> image, mask = np.array([[[0, 0, 1, 3]]], np.float32), np.array([[[False, False, True, True]]])
        >>> MriNormalization(inside_mask=True).apply(image, mask).tolist()
        [[[0.0, 0.0, -1.0, 1.0]]]
        """
        assert mask_DHW is not None or not self.inside_mask
        mask = mask_DHW if self.inside_mask and mask_DHW is not None and mask_DHW.any() else None
        voxels = image_DHW if mask is None else image_DHW[mask]
        mean, std = float(voxels.mean(dtype=np.float64)), float(voxels.std(dtype=np.float64))
        out = image_DHW - mean
        out /= max(std, 1e-8)
        if mask is not None:
            out[~mask] = 0
        return out


Normalization = CtNormalization | MriNormalization
