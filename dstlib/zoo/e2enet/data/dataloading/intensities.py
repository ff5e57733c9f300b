"""How the values of one channel are changed: blur, low resolution, contrast, gamma. Nothing random happens here.

Shapes: D depth, H height, W width. All work on float32 (D, H, W) and leave what they are given as it is.

Blur and low resolution are linear and separable, so each is one matrix per axis. SciPy, applied to the identity,
says which matrix; three products then take half the time of SciPy's own filters on a patch of 128³.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor


def blur(x: Tensor, sigma: float) -> Tensor:
    """The channel under a Gaussian of standard deviation ``sigma`` voxels; its border voxels go on outside.

    Reference: ``scipy.ndimage.gaussian_filter``, truncated at 4 sigma, as nnU-Net; which reflects at the border.

    >>> blur(torch.tensor([[[0.0, 0.0, 1.0, 0.0, 0.0]]]), 0.5).numpy().round(3)
    array([[[0.   , 0.106, 0.787, 0.106, 0.   ]]], dtype=float32)
    """
    return _along_axes(x, [_gaussian(n, sigma) for n in x.shape])


def low_resolution(x: Tensor, scale: float, *, skip: int | None = None) -> Tensor:
    """The channel as a coarser scanner would show it: voxels left out, then interpolated from those that are left.

    Each axis of n voxels keeps round(scale · n) of them; ``skip`` names an axis that keeps all.

    Reference: nnU-Net's simulated low resolution: down to the nearest voxel, up by cubic splines.

    >>> low_resolution(torch.arange(6.0).expand(1, 1, 6), 0.5).numpy().round(2)  # through 1, 3 and 5
    array([[[0.86, 1.32, 2.37, 3.63, 4.68, 5.14]]], dtype=float32)
    """
    kept = [n if axis == skip else max(1, round(scale * n)) for axis, n in enumerate(x.shape)]
    return _along_axes(x, [_coarse(n, k) if k < n else None for n, k in zip(x.shape, kept, strict=True)])


def contrast(x: Tensor, factor: float) -> Tensor:
    """Distances from the mean times ``factor``, cut off at the range that the channel had.

    >>> contrast(torch.tensor([[[0.0, 4.0, 4.0, 8.0]]]), 1.5).tolist()
    [[[0.0, 4.0, 4.0, 8.0]]]
    >>> contrast(torch.tensor([[[0.0, 4.0, 4.0, 8.0]]]), 0.5).tolist()
    [[[2.0, 4.0, 4.0, 6.0]]]
    """
    low, high = x.aminmax()
    mean = x.mean()
    return ((x - mean) * factor + mean).clamp(low, high)


def gamma(x: Tensor, exponent: float, *, inverted: bool = False) -> Tensor:
    """Relative position between minimum and maximum, to a power; mean and standard deviation stay what they were.

    Inverted, it is the distance from the maximum that is raised: gamma of the negative. A channel of one value
    has no positions, and stays as it is.

    Reference: nnU-Net's gamma with retained statistics, for which its range before the power does not matter.

    >>> gamma(torch.tensor([[[0.0, 0.0, 1.0, 2.0]]]), 2.0).numpy().round(3)
    array([[[0.118, 0.118, 0.624, 2.141]]], dtype=float32)
    """
    low, high = x.aminmax()
    spread = high - low
    if not torch.finfo(x.dtype).tiny <= float(spread) < torch.inf:
        return x
    raised = (((high - x) if inverted else (x - low)) / spread).pow_(exponent)
    raised -= raised.mean()
    mean = x.mean()
    ratio = torch.linalg.vector_norm(x - mean) / torch.linalg.vector_norm(raised)
    return raised.mul_(-ratio if inverted else ratio).add_(mean)


def _along_axes(x: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """A matrix applied along each axis of (D, H, W); None leaves an axis alone."""
    of_depth, of_height, of_width = matrices
    if of_depth is not None:
        x = (of_depth @ x.reshape(len(x), -1)).reshape(x.shape)
    if of_height is not None:
        x = of_height @ x
    if of_width is not None:
        x = x @ of_width.T
    return x


def _gaussian(num: int, sigma: float) -> Tensor:
    """The matrix (num, num) that blurs an axis."""
    return torch.tensor(ndimage.gaussian_filter1d(np.eye(num), sigma, axis=0, mode="nearest"), dtype=torch.float32)


@lru_cache(maxsize=256)  # of 64 kB for an axis of 128; most patches are cubes, and scales repeat when rounded
def _coarse(num: int, num_kept: int) -> Tensor:
    """The matrix (num, num) that keeps the nearest voxels of an axis and puts cubic splines through them."""
    down = ndimage.zoom(np.eye(num), (num_kept / num, 1), order=0, mode="nearest", grid_mode=True)
    up = ndimage.zoom(np.eye(num_kept), (num / num_kept, 1), order=3, mode="nearest", grid_mode=True)
    return torch.tensor(up @ down, dtype=torch.float32)
