"""Procedural MRIs: brain tumours in the four sequences of BraTS, and a hippocampus with its two parts.

MRI intensities have no unit: each scan gets a scale of its own, and a smooth bias across it, as coils give it.
The anatomy is schematic: enough that tissue, place and shape tell the classes apart, as in real scans.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dstlib.zoo.e2enet.data.cases import Case, three
from dstlib.zoo.e2enet.data.phantoms.drawing import Mask, Point, Volume, bent_grid, checked_shape, smooth_field, within

BRAIN_VIEW = (150.0, 210.0, 190.0)  # mm along (D, H, W)
MIN_BRAIN_SHAPE = (32, 40, 40)  # below it the rim of the smallest tumour is thinner than a voxel
CONTRASTS = {  # intensity of each tissue in FLAIR, T1w, T1gd, T2w
    "white matter": (0.48, 0.88, 0.90, 0.40),
    "grey matter": (0.64, 0.62, 0.66, 0.60),
    "fluid": (0.15, 0.25, 0.27, 1.20),
    "edema": (1.05, 0.52, 0.55, 0.95),
    "non-enhancing tumour": (0.75, 0.38, 0.42, 1.05),
    "enhancing tumour": (0.85, 0.55, 1.40, 0.80),
}
BRAIN = (0.86, 0.84, 0.80)  # radii in half fields of view
DEEP_GREY = (((-0.02, -0.02, 0.16), (0.02, 0.14, 0.14)), (0.16, 0.13, 0.09))  # on the left: points, radii
VENTRICLE = (((0.16, -0.3, 0.09), (0.24, 0.0, 0.1), (0.1, 0.34, 0.2)), (0.1, 0.12, 0.07))
MAX_EXTRA_LESIONS = 2


def tumour_phantom(seed: int, shape: Sequence[int] = (48, 64, 64)) -> Case:
    """Draws a brain without its skull in FLAIR, T1w, T1gd, T2w, with 1 edema, 2 non-enhancing, 3 enhancing tumour.

    One to three lesions lie anywhere but at the midline. Each is an enhancing rim around a core, within an
    irregular edema. Outside the brain every channel is exactly 0, inside it at least 1. The field of view is
    150 x 210 x 190 mm whatever the ``shape`` (D, H, W); the axes lead up, back and to the patient's left.

    Raises:
        SettingError: The shape is too small for a rim around a core.

    >>> case = tumour_phantom(0)
    >>> case.image.shape, np.unique(case.label).tolist()
    ((4, 48, 64, 64), [0, 1, 2, 3])
    """
    why = "the rim of a tumour is thinner than a voxel in a smaller one"
    size = checked_shape(shape, "a phantom", least=MIN_BRAIN_SHAPE, why=why)
    rng = np.random.default_rng(seed)
    grid = bent_grid(rng, size)
    depth = _brain_depth(grid)
    brain = depth > 0
    tissue = _brain_tissue(rng, grid, depth)
    label = np.zeros(size, np.uint8)
    for i in range(1 + int(rng.integers(MAX_EXTRA_LESIONS + 1))):
        _add_lesion(label, rng, grid, brain, core_radius=rng.uniform(15, 24) if i == 0 else rng.uniform(7, 12))
    tissue[label > 0] = label[label > 0] + 2  # the classes follow the three tissues in CONTRASTS
    contrasts = np.array(list(CONTRASTS.values()), np.float32).T
    image = np.stack([_acquired(rng, c[tissue], noise=0.03, scale=np.exp(rng.uniform(5.5, 7))) for c in contrasts])
    image[:, ~brain] = 0
    image[:, brain] = image[:, brain].clip(1)
    spacing = three(mm / n for mm, n in zip(BRAIN_VIEW, size, strict=True))
    return Case(f"tumour_{seed}", image, label, spacing)


def hippocampus_phantom(seed: int) -> Case:
    """Draws a box around one hippocampus at 1 mm, with 1 its anterior and 2 its posterior part.

    The size is drawn too, about 35 x 50 x 36 (D, H, W); the axes lead up, to the front and to the patient's right,
    as those of the Decathlon's Task04. Both parts have one intensity: a coronal plane divides them, as in the
    real labels, so that only place and shape tell them apart.

    >>> case = hippocampus_phantom(0)
    >>> case.spacing, case.orientation, np.unique(case.label).tolist()
    ((1.0, 1.0, 1.0), 'SAR', [0, 1, 2])
    """
    rng = np.random.default_rng(seed)
    size = (int(rng.integers(31, 42)), int(rng.integers(45, 56)), int(rng.integers(32, 40)))
    grid = bent_grid(rng, size)
    half = np.array(size) / 2
    shift, scale = rng.uniform(-2, 2, 3), rng.uniform(0.9, 1.1)

    def part(points: Sequence[Point], radii: Point) -> Mask:
        """Capsules given in mm from the middle of the box."""
        return within((np.array(points) * scale + shift) / half, np.array(radii) * scale / half, grid)

    head = part(((-6, 13, 2), (-5, 7, 0)), (5.0, 6.0, 8.0))
    body = part(((-5, 8, 0), (0, -2, -1), (5, -10, -4), (8, -13, -6)), (4.2, 4.5, 5.0))
    inside = head | body
    boundary = (rng.uniform(2.5, 5.5) * scale + shift[1]) / half[1]
    label = np.where(grid[1] > boundary, 1, 2).astype(np.uint8) * inside
    tissue = np.full(size, 0.95, np.float32)  # white matter
    folds = smooth_field(rng, size, num_waves=9)
    tissue[folds > 0.6] = 0.7  # cortex
    tissue[folds > 1.6] = 0.3  # fluid in its folds
    tissue[part(((-4, 12, -12), (0, -2, -11), (6, -12, -13)), (4.0, 5.0, 3.0))] = 0.25  # the temporal horn, lateral
    tissue[part(((-2, 12, -1), (3, -2, 1), (9, -10, -3)), (5.5, 6.0, 6.0)) & ~inside] = 0.9  # white matter above
    tissue[inside] = 0.66
    image = _acquired(rng, tissue, noise=0.06, scale=np.exp(rng.uniform(4, 7)))
    return Case(f"hippocampus_{seed}", image.clip(0)[None], label, (1.0, 1.0, 1.0), orientation="SAR")


def _brain_depth(grid: list[Volume]) -> Volume:
    """Computes how deep each voxel lies in the brain, in half fields of view: 0 at its surface, negative outside."""
    z, y, x = grid
    rz, ry, rx = BRAIN
    flat = np.where(z < -0.1, 1.12, 1.0) * (z - 0.02) / rz  # flatter at the base
    radius = (np.abs(flat) ** 2.3 + np.abs(y / ry) ** 2.3 + np.abs(x / rx) ** 2.3) ** (1 / 2.3)
    depth: Volume = (1 - radius) * min(BRAIN)
    return depth


def _brain_tissue(rng: np.random.Generator, grid: list[Volume], depth: Volume) -> NDArray[np.intp]:
    """Draws the healthy brain: 0 white matter, 1 grey matter, 2 fluid."""
    z, _, x = grid
    folds = smooth_field(rng, depth.shape, num_waves=14)
    tissue = np.zeros(depth.shape, np.intp)
    tissue[depth < 0.13 + 0.06 * folds] = 1  # cortex
    tissue[(depth < 0.2) & (folds > 1.3) | (depth < 0.02)] = 2  # sulci
    tissue[(np.abs(x) < 0.02) & (depth < 0.45) & (z > 0)] = 2  # the fissure between the hemispheres
    for side in (-1, 1):
        for number, (points, radii) in ((1, DEEP_GREY), (2, VENTRICLE)):
            tissue[within([(pz, py, side * px) for pz, py, px in points], radii, grid)] = number
    return tissue


def _add_lesion(
    label: NDArray[np.uint8], rng: np.random.Generator, grid: list[Volume], brain: Mask, *, core_radius: float
) -> None:
    """Draws one lesion into a label; where two meet, the higher class stays. The radius is in mm."""
    side = rng.choice((-1, 1))
    middle = (rng.uniform(-0.3, 0.45), rng.uniform(-0.5, 0.5), side * rng.uniform(0.25, 0.45))
    offsets = [(axis - at) * mm / 2 for axis, at, mm in zip(grid, middle, BRAIN_VIEW, strict=True)]
    distance = np.sqrt(sum(offset**2 for offset in offsets)) / core_radius
    uneven, ragged = (np.tanh(smooth_field(rng, label.shape, num_waves=waves)) for waves in (6, 9))
    core = distance * (1 + 0.2 * uneven)
    edema = distance * (1 + 0.3 * ragged) < rng.uniform(1.6, 2.2)
    drawn = np.where(core < 0.7, 2, np.where(core < 1, 3, edema)).astype(np.uint8)
    np.maximum(label, drawn * brain, out=label)


def _acquired(rng: np.random.Generator, clean: Volume, *, noise: float, scale: float) -> Volume:
    """Makes of a true contrast what a scanner does: partial volume, the coils' bias, noise, a scale of its own."""
    bias = np.exp(0.1 * smooth_field(rng, clean.shape, num_waves=3))
    blurred = ndimage.gaussian_filter(clean, 0.45)  # voxels
    image: Volume = (scale * (blurred * bias + noise * rng.normal(size=clean.shape))).astype(np.float32)
    return image
