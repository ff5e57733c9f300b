"""How a patch is changed before a network sees it: nnU-Net's augmentation, drawn from the patch's one generator.

Shapes: C channels, D depth, H height, W width. Which changes there are, how likely and how strong is a value, the
:class:`~dstlib.zoo.e2enet.data.dataloading.settings.Augmentation`. What a change does to the values of a channel stands
at the end, where nothing is random.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from monai.transforms.utils import create_rotate
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from dstlib.zoo.e2enet.data.cases import Shape, three
from dstlib.zoo.e2enet.data.dataloading.settings import Augmentation

THIN = 3  # a patch whose longest side is more than this many times its shortest is turned within its plane alone


def thin_axis(size: Shape) -> int | None:
    """Finds the axis along which a patch is so thin that nothing is turned or scaled along it.

    Reference: nnU-Net's "dummy 2D" augmentation, which presumes that the thin axis is the first.

    >>> thin_axis((32, 128, 96)), thin_axis((64, 128, 128))
    (0, None)
    """
    return size.index(min(size)) if max(size) > THIN * min(size) else None


def random_affine(rng: np.random.Generator, augmentation: Augmentation, size: Shape) -> NDArray[np.float64] | None:
    """Draws a matrix (3, 3) from patch to case, in voxels around the patch's centre; mostly none.

    >>> [random_affine(np.random.default_rng(s), Augmentation(), (8, 8, 8)) is None for s in range(4)]
    [True, True, True, False]
    """
    rotated, scaled = augmentation.rotation.comes(rng), augmentation.scaling.comes(rng)
    if not rotated and not scaled:
        return None
    thin = thin_axis(size)
    angles, scales = np.zeros(3), np.ones(3)
    if rotated and thin is None:
        angles[:] = [augmentation.rotation.uniform(rng) for _ in range(3)]
    elif rotated:
        angles[thin] = rng.uniform(-180, 180)
    if scaled:
        scales[[axis for axis in range(3) if axis != thin]] = augmentation.scaling.around_one(rng)
    rotation = np.asarray(create_rotate(3, np.deg2rad(angles).tolist()), np.float64)[:3, :3]
    return rotation * scales


def seen_box(matrix: NDArray[np.float64], start: Shape, size: Shape, shape: Shape) -> tuple[slice, slice, slice]:
    """Finds the part of a case of ``shape`` that a patch shows which starts at ``start`` and is turned by a matrix.

    >>> seen_box(np.diag([2.0, 1.0, 1.0]), (4, 4, 4), (5, 5, 5), (20, 20, 7))
    (slice(1, 12, None), slice(3, 10, None), slice(3, 7, None))
    """
    half = (np.asarray(size) - 1) / 2
    centre, reach = np.asarray(start) + half, np.abs(matrix) @ half
    # One voxel more on either side, for positions that rounding moved outwards.
    first, last = np.floor(centre - reach).astype(int) - 1, np.ceil(centre + reach).astype(int) + 2
    edges = zip(first.tolist(), last.tolist(), shape, strict=True)
    return three(slice(min(max(a, 0), n - 1), max(min(b, n), 1)) for a, b, n in edges)


def spatial_transform(
    image: Tensor, label: Tensor, matrix: NDArray[np.float64], *, centre: NDArray[np.float64], size: Shape
) -> tuple[Tensor, Tensor]:
    """Cuts a turned patch of ``size`` around ``centre`` out of a box: image (C, D, H, W), label (1, D, H, W).

    The image is interpolated linearly, the label is that of the nearest voxel; outside the box lie zeros.

    Reference: E2ENet's fork of nnU-Net interpolates images by cubic splines, nnU-Net itself linearly; both
    interpolate labels linearly, one-hot, which would take as many passes as there are classes.

    >>> label = torch.arange(4, dtype=torch.uint8).reshape(1, 1, 1, 4)
    >>> spatial_transform(label.float(), label, np.eye(3), centre=np.array([0.0, 0.0, 1.5]), size=(1, 1, 2))[1].tolist()
    [[[[1, 2]]]]
    """
    grid = _grid(matrix, centre, size, np.asarray(image.shape[1:]))
    turned = functional.grid_sample(image[None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    named = functional.grid_sample(label[None].float(), grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return turned[0], named[0].to(label.dtype)


def _grid(matrix: NDArray[np.float64], centre: NDArray[np.float64], size: Shape, box: NDArray[np.int64]) -> Tensor:
    """Computes positions (1, D, H, W, 3) for grid_sample, which counts W first and from -1 to 1 over the box.

    A sum of three short tables: torch's affine_grid multiplies a matrix per voxel, which took longer than sampling.
    """
    to_unit, offset = (2 / box)[:, None] * matrix, (2 * centre + 1) / box - 1
    along = [np.outer(np.arange(n) - (n - 1) / 2, to_unit[::-1, axis]) for axis, n in enumerate(size)]
    depth, height, width = (torch.from_numpy(table).float() for table in (along[0] + offset[::-1], along[1], along[2]))
    return ((depth[:, None] + height)[:, :, None] + width)[None]


def change_intensities(
    image: Tensor, rng: np.random.Generator, augmentation: Augmentation, *, thin: int | None = None
) -> Tensor:
    """Gives an image (C, D, H, W) noise, blur, brightness, contrast, low resolution and gamma, each of them sometimes.

    A ``thin`` axis keeps its resolution. All strengths but that of the noise are drawn per channel.

    >>> change_intensities(torch.zeros(1, 2, 2, 2), np.random.default_rng(0), Augmentation()).shape
    torch.Size([1, 2, 2, 2])
    """
    a, channels = augmentation, list(image)
    if a.noise.comes(rng):
        std = a.noise.uniform(rng)
        channels = [x + std * torch.from_numpy(rng.standard_normal(x.shape, np.float32)) for x in channels]
    if a.blur.comes(rng):
        channels = [blur(x, a.blur.uniform(rng)) if rng.random() < a.per_channel else x for x in channels]
    if a.brightness.comes(rng):
        channels = [x * a.brightness.uniform(rng) for x in channels]
    if a.contrast.comes(rng):
        channels = [contrast(x, a.contrast.around_one(rng)) for x in channels]
    if a.resolution.comes(rng):
        scales = [a.resolution.uniform(rng) if rng.random() < a.per_channel else 1.0 for _ in channels]
        channels = [low_resolution(x, scale, skip=thin) for x, scale in zip(channels, scales, strict=True)]
    if a.inverted_gamma.comes(rng):
        channels = [gamma(x, a.inverted_gamma.around_one(rng), inverted=True) for x in channels]
    if a.gamma.comes(rng):
        channels = [gamma(x, a.gamma.around_one(rng)) for x in channels]
    return torch.stack(channels)


def blur(x: Tensor, sigma: float) -> Tensor:
    """Blurs a channel (D, H, W) by a Gaussian of ``sigma`` voxels; its border voxels go on outside.

    Reference: ``scipy.ndimage.gaussian_filter``, truncated at 4 sigma, as nnU-Net; which reflects at the border.

    >>> blur(torch.tensor([[[0.0, 0.0, 1.0, 0.0, 0.0]]]), 0.5).numpy().round(3)
    array([[[0.   , 0.106, 0.787, 0.106, 0.   ]]], dtype=float32)
    """
    return _along_axes(x, [_gaussian(n, sigma) for n in x.shape])


def low_resolution(x: Tensor, scale: float, *, skip: int | None = None) -> Tensor:
    """Shows a channel (D, H, W) as a coarser scanner would: voxels left out, then interpolated from the others.

    Each axis of n voxels keeps round(scale · n) of them; ``skip`` names an axis that keeps all.

    Reference: nnU-Net's simulated low resolution: down to the nearest voxel, up by cubic splines.

    >>> low_resolution(torch.arange(6.0).expand(1, 1, 6), 0.5).numpy().round(2)  # through 1, 3 and 5
    array([[[0.86, 1.32, 2.37, 3.63, 4.68, 5.14]]], dtype=float32)
    """
    kept = [n if axis == skip else max(1, round(scale * n)) for axis, n in enumerate(x.shape)]
    return _along_axes(x, [_coarse(n, k) if k < n else None for n, k in zip(x.shape, kept, strict=True)])


def contrast(x: Tensor, factor: float) -> Tensor:
    """Multiplies distances from the mean by ``factor``, cut off at the range that the channel (D, H, W) had.

    >>> contrast(torch.tensor([[[0.0, 4.0, 4.0, 8.0]]]), 1.5).tolist()
    [[[0.0, 4.0, 4.0, 8.0]]]
    >>> contrast(torch.tensor([[[0.0, 4.0, 4.0, 8.0]]]), 0.5).tolist()
    [[[2.0, 4.0, 4.0, 6.0]]]
    """
    low, high = x.aminmax()
    mean = x.mean()
    return ((x - mean) * factor + mean).clamp(low, high)


def gamma(x: Tensor, exponent: float, *, inverted: bool = False) -> Tensor:
    """Raises relative positions between minimum and maximum to a power; mean and standard deviation stay.

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
    """Applies a matrix along each axis of (D, H, W); None leaves an axis alone.

    Blur and low resolution are linear and separable. SciPy, applied to the identity, says which matrix each is; three
    products then take half the time of SciPy's own filters on a patch of 128³.
    """
    of_depth, of_height, of_width = matrices
    if of_depth is not None:
        x = (of_depth @ x.reshape(len(x), -1)).reshape(x.shape)
    if of_height is not None:
        x = of_height @ x
    if of_width is not None:
        x = x @ of_width.T
    return x


def _gaussian(num: int, sigma: float) -> Tensor:
    """Returns the matrix (num, num) that blurs an axis."""
    return torch.tensor(ndimage.gaussian_filter1d(np.eye(num), sigma, axis=0, mode="nearest"), dtype=torch.float32)


@lru_cache(maxsize=256)  # of 64 kB for an axis of 128; most patches are cubes, and scales repeat when rounded
def _coarse(num: int, num_kept: int) -> Tensor:
    """Returns the matrix (num, num) that keeps the nearest voxels of an axis and puts cubic splines through them."""
    down = ndimage.zoom(np.eye(num), (num_kept / num, 1), order=0, mode="nearest", grid_mode=True)
    up = ndimage.zoom(np.eye(num_kept), (num / num_kept, 1), order=3, mode="nearest", grid_mode=True)
    return torch.tensor(up @ down, dtype=torch.float32)
