"""What makes intensities comparable between scans: by a training set for CT, by each scan itself for MRI.

Shapes: C channels, D depth, H height, W width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dstlib.errors import DataError, explain
from dstlib.zoo.e2enet.data.cases import Case


@dataclass(frozen=True, kw_only=True)
class CtNormalization:
    """Clips a CT to [low, high] and standardises it, with numbers that belong to a training set.

    >>> CtNormalization(low=-100.0, high=200.0, mean=50.0, std=50.0)
    CtNormalization(low=-100.0, high=200.0, mean=50.0, std=50.0)
    """

    low: float
    high: float
    mean: float
    std: float

    def __call__(self, case: Case) -> Case:
        image = (np.clip(case.image, self.low, self.high) - self.mean) / max(self.std, 1e-8)
        return replace(case, image=image.astype(np.float32))


def normalize_ct(cases: Sequence[Case]) -> CtNormalization:
    """What normalises a CT like the foreground of these training cases: call the result on any case.

    Save its four numbers with the run: the cases to predict are normalised by the training set, not by their
    own intensities, as Hounsfield units mean the same in every scan.

    Raises:
        DataError: No case has foreground, so there is nothing to measure.

    Reference: Isensee et al., *nnU-Net* (Nature Methods 2021), the CT scheme: clipping to the 0.5 and 99.5
    percentiles of the foreground voxels, then their mean and standard deviation. nnU-Net measures a sample of
    10,000 voxels per case; here it is every voxel, so the numbers depend on no generator.

    >>> label = np.ones((1, 1, 3), np.uint8)
    >>> case = Case("a", np.array([[[[0, 50, 100]]]], np.float32), label, (1.0, 1.0, 1.0))
    >>> normalize_ct([case])
    CtNormalization(low=0.5, high=99.5, mean=50.0, std=40.82...)
    """
    voxels = [case.image[:, case.label > 0].ravel() for case in cases]
    foreground = np.concatenate(voxels) if voxels else np.zeros(0, np.float32)
    if not foreground.size:
        raise DataError(
            explain(
                "foreground",
                "the training cases",
                allowed="at least one labelled voxel",
                given=f"none in {len(cases)} case(s)",
                remedy="Check that the labels belong to these images, or use normalize_mri.",
            )
        )
    low, high = np.percentile(foreground, (0.5, 99.5))
    return CtNormalization(
        low=float(low),
        high=float(high),
        mean=float(foreground.mean(dtype=np.float64)),
        std=float(foreground.std(dtype=np.float64)),
    )


def normalize_mri(case: Case) -> Case:
    """The case with mean 0 and standard deviation 1 in every channel, as MRI intensities have no unit.

    >>> case = Case("a", np.array([[[[1, 3]]]], np.float32), np.zeros((1, 1, 2), np.uint8), (1.0, 1.0, 1.0))
    >>> normalize_mri(case).image.tolist()
    [[[[-1.0, 1.0]]]]
    """
    image = case.image.astype(np.float64)
    mean = image.mean((1, 2, 3), keepdims=True)
    std = image.std((1, 2, 3), keepdims=True)
    return replace(case, image=((image - mean) / np.maximum(std, 1e-8)).astype(np.float32))
