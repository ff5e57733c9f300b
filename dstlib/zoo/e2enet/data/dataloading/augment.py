"""How a patch is changed before a network sees it: nnU-Net's augmentation, drawn from the patch's one generator.

Shapes: C channels, D depth, H height, W width. Which changes there are, how likely and how strong is a value,
:class:`Augmentation`; what a change of intensities does is in ``intensities.py``.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from monai.transforms.utils import create_rotate
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from dstlib.errors import SettingError
from dstlib.zoo.e2enet.data.dataloading.intensities import blur, contrast, gamma, low_resolution

Size = tuple[int, int, int]

THIN = 3  # a patch whose longest side is more than this many times its shortest is turned within its plane alone


@dataclass(frozen=True)
class Chance:
    """How likely a change is, and between what its strength is drawn.

    >>> Chance(0.2, 0.7, 1.4).around_one(np.random.default_rng(0)) < 1.4
    True
    """

    probability: float
    low: float
    high: float

    def comes(self, rng: np.random.Generator) -> bool:
        """Whether it happens, this time."""
        return bool(rng.random() < self.probability)

    def uniform(self, rng: np.random.Generator) -> float:
        """How strong it is."""
        return float(rng.uniform(self.low, self.high))

    def around_one(self, rng: np.random.Generator) -> float:
        """How strong a factor or exponent is: as often below 1 as above, and uniform on either side."""
        below = rng.random() < 0.5 if self.low < 1 < self.high else self.high <= 1
        return float(rng.uniform(self.low, min(self.high, 1)) if below else rng.uniform(max(self.low, 1), self.high))


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The changes in the order in which they come; the defaults are the paper's. ``Chance(0, ...)`` is never.

    - ``rotation``: degrees, about each axis. A thin patch is turned in its plane only, by any angle.
    - ``scaling``: above 1 the patch shows more of the case, and everything in it is smaller.
    - ``noise``: standard deviation, one for all channels. nnU-Net calls it a variance and uses it as this.
    - ``blur``: standard deviation in voxels; each channel with probability ``per_channel``.
    - ``brightness``, ``contrast``: factors, on the value and on its distance from the mean.
    - ``resolution``: share of the voxels of each axis that is kept; each channel with ``per_channel``.
    - ``inverted_gamma``, ``gamma``: exponents.

    Mirroring comes last, and is a setting of the patches, as prediction needs it too.

    Raises:
        SettingError: A probability lies outside [0, 1], or a range is empty or outside what is allowed.

    Reference: nnU-Net (Isensee et al. 2021), "moreDA", in the fork that E2ENet was published with.

    >>> Augmentation(rotation=Chance(1.5, -30, 30))
    Traceback (most recent call last):
    dstlib.errors.SettingError: rotation of Augmentation: expected a probability in [0, 1] and a range within ...
    """

    rotation: Chance = Chance(0.2, -30.0, 30.0)
    scaling: Chance = Chance(0.2, 0.7, 1.4)
    noise: Chance = Chance(0.1, 0.0, 0.1)
    blur: Chance = Chance(0.2, 0.5, 1.0)
    brightness: Chance = Chance(0.15, 0.75, 1.25)
    contrast: Chance = Chance(0.15, 0.75, 1.25)
    resolution: Chance = Chance(0.25, 0.5, 1.0)
    inverted_gamma: Chance = Chance(0.1, 0.7, 1.5)
    gamma: Chance = Chance(0.3, 0.7, 1.5)
    per_channel: float = 0.5

    def __post_init__(self) -> None:
        # Blur cannot be 0 (its weights would be 0/0), nor can the others at 0.01: a patch would lose its content.
        limits = {"rotation": (-180.0, 180.0), "noise": (0.0, 10.0), "resolution": (0.01, 1.0)}
        for name in (field.name for field in fields(self) if field.name != "per_channel"):
            chance, (least, most) = getattr(self, name), limits.get(name, (0.01, 10.0))
            if not (0 <= chance.probability <= 1 and least <= chance.low <= chance.high <= most):
                allowed = f"a probability in [0, 1] and a range within [{least:g}, {most:g}]"
                remedy = "Pass Chance(probability, low, high); Chance(0, 1, 1) switches most parts off."
                raise SettingError.of(name, "Augmentation", allowed=allowed, given=chance, remedy=remedy)
        if not 0 <= self.per_channel <= 1:
            allowed, remedy = "a number in [0, 1]", "The paper's is 0.5."
            raise SettingError.of("per_channel", "Augmentation", allowed=allowed, given=self.per_channel, remedy=remedy)


def thin_axis(size: Size) -> int | None:
    """The axis along which a patch is so thin that nothing is turned or scaled along it.

    Reference: nnU-Net's "dummy 2D" augmentation, which presumes that the thin axis is the first.

    >>> thin_axis((32, 128, 96)), thin_axis((64, 128, 128))
    (0, None)
    """
    return size.index(min(size)) if max(size) > THIN * min(size) else None


def random_affine(rng: np.random.Generator, augmentation: Augmentation, size: Size) -> NDArray[np.float64] | None:
    """A matrix (3, 3) from patch to case, in voxels around the patch's centre; mostly none.

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


def seen_box(matrix: NDArray[np.float64], start: Size, size: Size, shape: Size) -> tuple[slice, slice, slice]:
    """The part of a case of ``shape`` that a patch shows when it starts at ``start`` and is turned by a matrix.

    >>> seen_box(np.diag([2.0, 1.0, 1.0]), (4, 4, 4), (5, 5, 5), (20, 20, 7))
    (slice(1, 12, None), slice(3, 10, None), slice(3, 7, None))
    """
    half = (np.asarray(size) - 1) / 2
    centre, reach = np.asarray(start) + half, np.abs(matrix) @ half
    # One voxel more on either side, for positions that rounding moved outwards.
    first, last = np.floor(centre - reach).astype(int) - 1, np.ceil(centre + reach).astype(int) + 2
    depth, height, width = (
        slice(int(min(max(a, 0), n - 1)), int(max(min(b, n), 1))) for a, b, n in zip(first, last, shape, strict=True)
    )
    return depth, height, width


def resample(
    image: Tensor, label: Tensor, matrix: NDArray[np.float64], *, centre: NDArray[np.float64], size: Size
) -> tuple[Tensor, Tensor]:
    """The patch of ``size`` around ``centre`` of a box: image (C, D, H, W) linearly, label (1, D, H, W) by nearest.

    Outside the box lie zeros.

    Reference: E2ENet's fork of nnU-Net interpolates images by cubic splines, nnU-Net itself linearly; both
    interpolate labels linearly, one-hot, which would take as many passes as there are classes.

    >>> label = torch.arange(4, dtype=torch.uint8).reshape(1, 1, 1, 4)
    >>> resample(label.float(), label, np.eye(3), centre=np.array([0.0, 0.0, 1.5]), size=(1, 1, 2))[1].tolist()
    [[[[1, 2]]]]
    """
    grid = _grid(matrix, centre, size, np.asarray(image.shape[1:]))
    turned = functional.grid_sample(image[None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    named = functional.grid_sample(label[None].float(), grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return turned[0], named[0].to(label.dtype)


def _grid(matrix: NDArray[np.float64], centre: NDArray[np.float64], size: Size, box: NDArray[np.int64]) -> Tensor:
    """Positions (1, D, H, W, 3) for grid_sample, which counts W first and from -1 to 1 over the box.

    A sum of three short tables: torch's affine_grid multiplies a matrix per voxel, which took longer than sampling.
    """
    to_unit, offset = (2 / box)[:, None] * matrix, (2 * centre + 1) / box - 1
    along = [np.outer(np.arange(n) - (n - 1) / 2, to_unit[::-1, axis]) for axis, n in enumerate(size)]
    depth, height, width = (torch.from_numpy(table).float() for table in (along[0] + offset[::-1], along[1], along[2]))
    return ((depth[:, None] + height)[:, :, None] + width)[None]


def change_intensities(
    image: Tensor, rng: np.random.Generator, augmentation: Augmentation, *, thin: int | None = None
) -> Tensor:
    """The image (C, D, H, W) with noise, blur, brightness, contrast, low resolution and gamma, each of them sometimes.

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
