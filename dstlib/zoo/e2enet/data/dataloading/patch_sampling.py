"""Which patches make a batch: drawn from prepared cases, with foreground oversampling as in nnU-Net.

Shapes: B batch, C channels, D depth, H height, W width. A batch is a pure function of (cases, settings, seed,
iteration): a resumed run draws what an uninterrupted one would have drawn, and no generator is ever saved.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dstlib.errors import DataError, require
from dstlib.workers import one_thread
from dstlib.zoo.e2enet.data.cases import Case, Shape, read_box, three
from dstlib.zoo.e2enet.data.dataloading.augmentation import (
    change_intensities,
    random_affine,
    seen_box,
    spatial_transform,
    thin_axis,
)
from dstlib.zoo.e2enet.data.dataloading.settings import PatchSettings


def draw_batch(
    cases: Sequence[Case],
    settings: PatchSettings,
    *,
    seed: int,
    iteration: int,
    ranks: tuple[int, int] = (0, 1),
) -> tuple[Tensor, Tensor]:
    """Draws the batch of one iteration: images (B, C, D, H, W) as float32, labels (B, 1, D, H, W) as int64.

    Each patch comes from a case drawn with replacement. A forced patch is centred on a voxel of a class, or region,
    drawn among those that the case has (pushed back into the volume at its borders); the others lie anywhere or,
    where the set has voxels to ignore, are centred on one that is not ignored. A case without foreground gives an
    unforced patch. Cases smaller than the patch are padded with zeros, which
    is the mean of a normalised image. Of ``ranks`` (this one, how many) each draws its share: patch i of the
    batch is drawn by rank i modulo their number. All shares are of one size, or the mean over ranks, which is
    what DDP takes of gradients, would not be that over patches.

    Raises:
        DataError: There are no cases.
        SettingError: There is no such rank, or the ranks cannot share the patches evenly.

    Reference: the patch sampling and augmentation of nnU-Net, which E2ENet trains with.

    >>> case = Case("a", np.zeros((1, 4, 9, 9), np.float32), np.ones((4, 9, 9), np.uint8), (1.0, 1.0, 1.0))
    >>> image, label = draw_batch([case], PatchSettings(patch_size=(4, 8, 8)), seed=0, iteration=3)
    >>> image.shape, label.dtype
    (torch.Size([2, 1, 4, 8, 8]), torch.int64)
    """
    allowed, remedy, where = "at least one", "Pass the training cases.", "a batch"
    require(len(cases) > 0, "cases", where, allowed=allowed, given="none", remedy=remedy, error=DataError)
    rank, num_ranks = ranks
    shares = 0 <= rank < num_ranks and settings.batch_size % num_ranks == 0
    allowed = f"(rank, how many), so many that they share the {settings.batch_size} patches of a batch evenly"
    remedy = "Make batch_size a multiple of the number of processes."
    require(shares, "ranks", where, allowed=allowed, given=ranks, remedy=remedy)
    images, labels = [], []
    with one_thread():  # over several, sums round differently, and a batch depends on the size of the machine
        for i in range(rank, settings.batch_size, num_ranks):
            # One generator per patch: what one of them consumes cannot change the others.
            rng = np.random.default_rng((seed, iteration, i))
            case = cases[int(rng.integers(len(cases)))]
            forced = i >= settings.batch_size - settings.num_forced
            image, label = _draw_patch(case, settings, rng, forced=forced)
            images.append(image)
            labels.append(label)
        return torch.stack(images), torch.stack(labels).long()


def _draw_patch(
    case: Case, settings: PatchSettings, rng: np.random.Generator, *, forced: bool
) -> tuple[Tensor, Tensor]:
    """Draws one patch of a case: image (C, D, H, W) and label (1, D, H, W)."""
    size, augmentation = settings.patch_size, settings.augment
    foreground = _foreground_voxel(case, rng) if forced else None
    centre = foreground or _labelled_voxel(case, rng)
    start = _position(case.label.shape, size, centre, rng)
    if augmentation is None:
        return _cut(case.image, start, size), _cut(case.label[None], start, size)
    matrix = random_affine(rng, augmentation, size)
    image, label = _seen_through(matrix, case, start, size)
    if matrix is not None and foreground is not None and not _has_foreground(label, case):
        # A rotation or zoom can push what the patch was centred on out of it: keep the promise instead.
        image, label = _seen_through(None, case, start, size)
    image = change_intensities(image, rng, augmentation, thin=thin_axis(size))
    flipped = [axis + 1 for axis in sorted(settings.mirror) if rng.random() < 0.5]
    return image.flip(flipped), label.flip(flipped)


def _foreground_voxel(case: Case, rng: np.random.Generator) -> Shape | None:
    """Draws a voxel of a class, both drawn uniformly from what the case has; none where it has no foreground."""
    classes = list(case.class_voxels)
    if not classes:
        return None
    return _one_of(case.class_voxels[classes[int(rng.integers(len(classes)))]], case, rng)


def _labelled_voxel(case: Case, rng: np.random.Generator) -> Shape | None:
    """Draws a voxel that is not ignored; none where nothing can be ignored, or all is."""
    voxels = case.labelled_voxels
    return None if voxels is None or not len(voxels) else _one_of(voxels, case, rng)


def _one_of(voxels: NDArray[np.unsignedinteger], case: Case, rng: np.random.Generator) -> Shape:
    return three(map(int, np.unravel_index(int(voxels[rng.integers(len(voxels))]), case.label.shape)))


def _has_foreground(label: Tensor, case: Case) -> bool:
    ignored = case.labels.ignored_number
    return bool(label.any() if ignored is None else ((label != 0) & (label != ignored)).any())


def _position(shape: Sequence[int], size: Shape, voxel: Shape | None, rng: np.random.Generator) -> Shape:
    """Draws where a patch starts; negative along an axis on which the case is smaller and lies in the middle."""
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
    return three(start)


def _cut(volume: NDArray[np.generic], start: Shape, size: Shape) -> Tensor:
    """Copies a box of a volume (C, D, H, W), with zeros where it reaches beyond."""
    # torch aligns its memory, numpy does not: some sums would round by where a patch happens to lie.
    box = torch.zeros((len(volume), *size), dtype=torch.from_numpy(np.empty(0, volume.dtype)).dtype)
    source, target = [slice(None)], [slice(None)]
    for at, length, end in zip(start, size, volume.shape[1:], strict=True):
        first, last = max(at, 0), max(min(at + length, end), 0)
        source.append(slice(first, last))
        target.append(slice(first - at, last - at))
    box.numpy()[tuple(target)] = read_box(volume, source)
    return box


def _seen_through(matrix: NDArray[np.float64] | None, case: Case, start: Shape, size: Shape) -> tuple[Tensor, Tensor]:
    """Cuts a patch out of a case, turned and scaled by a matrix if there is one."""
    image, label = case.image, case.label[None]
    if matrix is None:
        return _cut(image, start, size), _cut(label, start, size)
    # A turned patch is cut from a larger box, so that its corners show the case and not padding.
    box = seen_box(matrix, start, size, three(case.label.shape))
    corner, length = three(edge.start for edge in box), three(edge.stop - edge.start for edge in box)
    centre = np.asarray(start) + (np.asarray(size) - 1) / 2 - np.asarray(corner)
    return spatial_transform(_cut(image, corner, length), _cut(label, corner, length), matrix, centre=centre, size=size)
