"""What a training loop draws from: normalised cases in, batches of augmented patches out.

Shapes: B batch, C channels, D depth, H height, W width. A batch is a pure function of (cases, settings, seed,
iteration): a resumed run draws what an uninterrupted one would have drawn, and no generator is ever saved.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dstlib.errors import DataError, SettingError, explain
from dstlib.zoo.e2enet.data.augment import change_intensities, margins, random_affine, resample
from dstlib.zoo.e2enet.data.cases import Case

Index = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class PatchSettings:
    """What a batch is made of.

    ``oversample`` is the share of the batch that is forced to contain foreground, counted as nnU-Net does:
    one patch of two at 0.33. ``mirror`` names the axes (0 = D, 1 = H, 2 = W) along which a patch is flipped,
    each with probability 1/2. The paper flips all three; where classes tell left from right, as two kidneys,
    that makes them harder to tell apart, and ``(0, 1)`` keeps the sides.

    Raises:
        SettingError: A setting lies outside what is allowed.

    >>> PatchSettings(patch_size=(40, 56, 40)).num_forced
    1
    """

    patch_size: tuple[int, int, int]
    batch_size: int = 2
    oversample: float = 0.33
    augment: bool = True
    mirror: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        sizes = len(self.patch_size) == 3 and min(self.patch_size) > 0
        checks = (
            ("patch_size", sizes, "three positive sizes (D, H, W)", "Pass (64, 128, 128), say."),
            ("batch_size", self.batch_size > 0, "a positive number", "Pass 2, as the paper."),
            ("oversample", 0 <= self.oversample <= 1, "a number in [0, 1]", "Pass 0.33, as the paper."),
            ("mirror", set(self.mirror) <= {0, 1, 2}, "axes among 0, 1, 2", "Pass () for no mirroring."),
        )
        for name, good, allowed, remedy in checks:
            if not good:
                given = getattr(self, name)
                raise SettingError(explain(name, "PatchSettings", allowed=allowed, given=given, remedy=remedy))

    @property
    def num_forced(self) -> int:
        """How many patches of a batch are forced to contain foreground: the last ones."""
        return self.batch_size - round(self.batch_size * (1 - self.oversample))


def draw_batch(cases: Sequence[Case], settings: PatchSettings, *, seed: int, iteration: int) -> tuple[Tensor, Tensor]:
    """The batch of one iteration: images (B, C, D, H, W) as float32, labels (B, 1, D, H, W) as int64.

    Each patch comes from a case drawn with replacement. A forced patch is centred on a voxel of a class drawn
    among those that the case has (pushed back into the volume at its borders); the others lie anywhere. A
    case without foreground gives an unforced patch. Cases smaller than the patch are padded with zeros, which
    is the mean of a normalised image.

    Raises:
        DataError: There are no cases.

    Reference: the patch sampling and augmentation of nnU-Net, which E2ENet trains with. It deviates in being
    lighter: no blur and no simulated low resolution.

    >>> case = Case("a", np.zeros((1, 4, 9, 9), np.float32), np.ones((4, 9, 9), np.uint8), (1.0, 1.0, 1.0))
    >>> image, label = draw_batch([case], PatchSettings(patch_size=(4, 8, 8)), seed=0, iteration=3)
    >>> image.shape, label.dtype
    (torch.Size([2, 1, 4, 8, 8]), torch.int64)
    """
    if not cases:
        raise DataError(
            explain(
                "cases",
                "draw_batch()",
                allowed="at least one",
                given="none",
                remedy="Pass the training cases.",
            )
        )
    images, labels = [], []
    for i in range(settings.batch_size):
        # One generator per patch: what one of them consumes cannot change the others.
        rng = np.random.default_rng((seed, iteration, i))
        case = cases[int(rng.integers(len(cases)))]
        forced = i >= settings.batch_size - settings.num_forced
        image, label = _draw_patch(case, settings, rng, forced=forced)
        images.append(image)
        labels.append(label)
    return torch.stack(images), torch.stack(labels)


def _draw_patch(
    case: Case, settings: PatchSettings, rng: np.random.Generator, *, forced: bool
) -> tuple[Tensor, Tensor]:
    """One patch of a case: image (C, D, H, W) and label (1, D, H, W)."""
    size = settings.patch_size
    voxel = _foreground_voxel(case.label, rng) if forced else None
    start = _position(case.label.shape, size, voxel, rng)
    if not settings.augment:
        return _seen_through(None, case, start, size)
    image, label = _seen_through(random_affine(rng), case, start, size)
    if voxel is not None and not label.any():
        # A rotation or zoom can push what the patch was centred on out of it: keep the promise instead.
        image, label = _seen_through(None, case, start, size)
    flipped = [axis + 1 for axis in sorted(settings.mirror) if rng.random() < 0.5]
    image, label = image.flip(flipped), label.flip(flipped)
    return change_intensities(image, rng), label


def _foreground_voxel(label: NDArray[np.uint8], rng: np.random.Generator) -> Index | None:
    """A voxel of a class, both drawn uniformly from what the case has; none where it has no foreground."""
    counts = np.bincount(label.ravel(), minlength=1)
    classes = np.flatnonzero(counts[1:]) + 1
    if not len(classes):
        return None
    chosen = rng.choice(classes)
    flat = np.flatnonzero(label.ravel() == chosen)[rng.integers(counts[chosen])]
    z, y, x = np.unravel_index(flat, label.shape)
    return int(z), int(y), int(x)


def _position(shape: Sequence[int], size: Index, voxel: Index | None, rng: np.random.Generator) -> Index:
    """Where the patch starts; negative along an axis on which the case is smaller and lies in the middle."""
    free = rng.random(3)
    start = []
    for axis in range(3):
        room = shape[axis] - size[axis]
        if room <= 0:
            start.append(-(-room // 2))
        elif voxel is None:
            start.append(int(free[axis] * (room + 1)))
        else:
            start.append(min(max(voxel[axis] - size[axis] // 2, 0), room))
    return start[0], start[1], start[2]


def _cut(volume: NDArray[Any], start: Index, size: Index) -> NDArray[Any]:
    """The box of a volume (C, D, H, W), with zeros where it reaches beyond."""
    box = np.zeros((len(volume), *size), volume.dtype)
    source, target = [slice(None)], [slice(None)]
    for at, length, end in zip(start, size, volume.shape[1:], strict=True):
        first, last = max(at, 0), max(min(at + length, end), 0)
        source.append(slice(first, last))
        target.append(slice(first - at, last - at))
    box[tuple(target)] = volume[tuple(source)]
    return box


def _seen_through(matrix: NDArray[np.float64] | None, case: Case, start: Index, size: Index) -> tuple[Tensor, Tensor]:
    """The patch, turned and scaled by a matrix if there is one."""
    margin = (0, 0, 0) if matrix is None else margins(matrix, size)
    # A turned patch is cut from a larger box, so that its corners show the case and not padding.
    at = (start[0] - margin[0], start[1] - margin[1], start[2] - margin[2])
    box = (size[0] + 2 * margin[0], size[1] + 2 * margin[1], size[2] + 2 * margin[2])
    image = torch.from_numpy(_cut(case.image, at, box))
    label = torch.from_numpy(_cut(case.label[None], at, box))
    return (image, label.long()) if matrix is None else resample(image, label, matrix, size)
