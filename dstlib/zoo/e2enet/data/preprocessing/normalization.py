"""What makes intensities comparable between scans: by a training set for CT, by each scan itself for most else.

What a channel is called settles how: :mod:`dstlib.zoo.e2enet.data.layouts.channels`. Shapes: D depth, H height,
W width.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dstlib.errors import DataError, require


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
class ZScoreNormalization:
    """Gives a channel mean 0 and standard deviation 1, by that scan alone: MRI, PET, and whatever is not known.

    With ``inside_mask``, as for skull-stripped heads, both are measured inside the patient's mask, and all outside
    stays exactly 0.

    Reference: Isensee et al., *nnU-Net* (Nature Methods 2021), the z-score scheme with and without its mask.
    """

    kind: Literal["mri"] = field(default="mri", repr=False)  # of before there was anything but CT and MRI
    inside_mask: bool = False

    def apply(self, image_DHW: NDArray[np.float32], mask_DHW: NDArray[np.bool_] | None = None) -> NDArray[np.float32]:
        """Standardises one channel; a constant one becomes 0.

        >>> image, mask = np.array([[[0, 0, 1, 3]]], np.float32), np.array([[[False, False, True, True]]])
        >>> ZScoreNormalization(inside_mask=True).apply(image, mask).tolist()
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


@dataclass(frozen=True, kw_only=True)
class RangeNormalization:
    """Leaves a channel as it is, or brings it into [0, 1]: by its own range, or as the bytes of a colour.

    Reference: nnU-Net 2.8.1, the schemes of the channel names noNorm, rescale_to_0_1 and rgb_to_0_1.
    """

    kind: Literal["nonorm", "rescale_to_0_1", "rgb_to_0_1"]

    def apply(self, image_DHW: NDArray[np.float32], mask_DHW: NDArray[np.bool_] | None = None) -> NDArray[np.float32]:
        """Brings one channel into its range; a constant one that is rescaled becomes 0. The mask makes no difference.

        Raises:
            DataError: Voxels of a colour are no bytes.

        >>> image = np.array([[[0, 51, 255]]], np.float32)
        >>> RangeNormalization(kind="rgb_to_0_1").apply(image).round(6).tolist()[0][0][0]
        0.0
        >>> RangeNormalization(kind="rescale_to_0_1").apply(image + 3).tolist() == (image / 255).tolist()
        True
        """
        if self.kind == "nonorm":
            return image_DHW
        low, high = float(image_DHW.min()), float(image_DHW.max())
        if self.kind == "rescale_to_0_1":
            out = image_DHW - np.float32(low)
            out /= max(float(out.max()), 1e-8)
            return out
        if low < 0 or high > 255:
            remedy = "Rename the channel in dataset.json: rescale_to_0_1 takes any range."
            given = f"{low:g} to {high:g}"
            raise DataError.of("voxels", "a channel rgb_to_0_1", allowed="0 to 255", given=given, remedy=remedy)
        return image_DHW / np.float32(255)


Normalization = CtNormalization | ZScoreNormalization | RangeNormalization
