"""How a patch is changed: the light part of nnU-Net's augmentation, each change drawn from one generator.

Shapes: C channels, D depth, H height, W width. The transforms are MONAI's; which ones, how strong and how
likely is said here.
"""

import numpy as np
import torch
from monai.transforms import AdjustContrast, Affine, ScaleIntensityFixedMean
from monai.transforms.utils import create_rotate
from monai.utils import convert_to_tensor
from numpy.typing import NDArray
from torch import Tensor

ROTATION = np.deg2rad(30)  # largest angle about each axis
SCALING = (0.7, 1.4)  # above 1 the patch shows more of the case, and everything in it is smaller
PROBABILITY = 0.2  # of a rotation, and independently of a scaling


def random_affine(rng: np.random.Generator) -> NDArray[np.float64] | None:
    """A matrix (4, 4) from patch to case coordinates, in voxels around the patch's centre; mostly none.

    Reference: nnU-Net's rotation by up to 30 degrees about all axes at once, and its scaling by 0.7 to 1.4,
    each of probability 0.2. The factor is uniform here, where nnU-Net first tosses for smaller or larger.

    >>> [random_affine(np.random.default_rng(seed)) is None for seed in range(4)]
    [True, True, True, False]
    """
    rotated, scaled = rng.random(2) < PROBABILITY
    if not rotated and not scaled:
        return None
    angles = rng.uniform(-ROTATION, ROTATION, 3) if rotated else np.zeros(3)
    matrix = np.asarray(create_rotate(3, angles.tolist()), np.float64)
    matrix[:3, :3] *= rng.uniform(*SCALING) if scaled else 1.0
    return matrix


def margins(matrix: NDArray[np.float64], size: tuple[int, int, int]) -> tuple[int, int, int]:
    """How many voxels the turned patch reaches beyond its own box, on either side of each axis.

    >>> margins(np.diag([1.5, 1.0, 0.5, 1.0]), (8, 8, 8))
    (3, 1, 0)
    """
    reach = np.ceil(np.abs(matrix[:3, :3]) @ size).astype(int)
    depth, height, width = (max(0, int(r - n) // 2 + 1) for r, n in zip(reach, size, strict=True))
    return depth, height, width


def resample(
    image: Tensor, label: Tensor, matrix: NDArray[np.float64], size: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """The central patch of ``size`` seen through a matrix: the image linearly, the label by its nearest voxel.

    >>> label = torch.arange(4.0).reshape(1, 1, 1, 4)
    >>> resample(label, label, np.eye(4), (1, 1, 2))[1].tolist()
    [[[[1, 2]]]]
    """
    affine = Affine(affine=torch.from_numpy(matrix), spatial_size=size, padding_mode="zeros", image_only=True)
    turned = convert_to_tensor(affine(image, mode="bilinear"), track_meta=False)
    return turned, convert_to_tensor(affine(label, mode="nearest"), track_meta=False).long()


def change_intensities(image: Tensor, rng: np.random.Generator) -> Tensor:
    """The image (C, D, H, W) with noise, brightness, contrast and gamma, each of them sometimes.

    Reference: nnU-Net's order, probabilities and ranges. The noise has one strength for all channels, the rest
    is drawn per channel. Gamma and contrast are uniform over their range here, where nnU-Net first tosses for
    less or more.

    >>> change_intensities(torch.zeros(1, 2, 2, 2), np.random.default_rng(0)).shape
    torch.Size([1, 2, 2, 2])
    """
    # The tosses are ours, from the one generator of the patch: MONAI's random transforms each seed another,
    # which took longer than what they then seldom do.
    channels = list(image.split(1))
    if rng.random() < 0.1:
        std = rng.uniform(0, 0.1)
        channels = [c + torch.from_numpy(rng.normal(0, std, c.shape).astype(np.float32)) for c in channels]
    if rng.random() < 0.15:
        channels = [c * rng.uniform(0.75, 1.25) for c in channels]
    if rng.random() < 0.15:
        channels = [ScaleIntensityFixedMean(rng.uniform(-0.25, 0.25), preserve_range=True)(c) for c in channels]
    for probability, inverted in ((0.1, True), (0.3, False)):
        # a single voxel has no spread that a change of gamma could keep: MONAI's would be NaN
        if rng.random() < probability and image[0].numel() > 1:
            gammas = rng.uniform(0.7, 1.5, len(channels)).tolist()
            channels = [
                AdjustContrast(gamma, invert_image=inverted, retain_stats=True)(c)
                for gamma, c in zip(gammas, channels, strict=True)
            ]
    return torch.cat([convert_to_tensor(c, track_meta=False) for c in channels])
