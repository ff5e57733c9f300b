"""A procedural abdominal CT: all fifteen AMOS organs, no download.

It is drawn in the coordinates of a torso, each axis from -1 to 1: z from the pelvic floor to the diaphragm,
y from the belly to the back, x from the patient's right to the left. The array's axes (D, H, W) run the same
way, so a slice shown as an image is the usual radiological view: liver on the left of the picture, spine at
the bottom. One primitive draws everything: the capsule, a thick segment with a radius per axis; with equal
ends it is an ellipsoid.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dstlib.errors import SettingError, explain
from dstlib.zoo.e2enet.data.cases import Case, Cases

AMOS_ORGANS = (
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    "oesophagus",
    "liver",
    "stomach",
    "aorta",
    "postcava",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
    "duodenum",
    "bladder",
    "prostate/uterus",
)

Point: TypeAlias = tuple[float, float, float]  # (z, y, x)
Volume: TypeAlias = NDArray[np.float32]

FIELD_OF_VIEW = (432.0, 320.0, 400.0)  # mm along (D, H, W)
MIN_SHAPE = (32, 40, 40)  # below it the adrenal glands are a voxel or two, which is no shape to learn
NUM_WAVES = 3  # cosines per axis of the deformation: it bends the body, and never folds a small organ
BEND = 0.05  # of the half field of view, the largest deformation along each axis


@dataclass(frozen=True)
class Organ:
    """One organ: its intensity in HU, and the capsules through ``points`` (one point: an ellipsoid)."""

    hu: float
    radii: Point
    points: tuple[Point, ...]


# Large organs first, small ones over them: the other way round the adrenal glands would vanish.
ORGANS = {
    "liver": Organ(105, (0.24, 0.42, 0.32), ((0.62, 0.0, -0.42), (0.42, 0.02, -0.46), (0.62, -0.4, -0.02))),
    "stomach": Organ(35, (0.13, 0.20, 0.15), ((0.7, 0.05, 0.36), (0.5, -0.25, 0.4), (0.32, -0.42, 0.1))),
    "spleen": Organ(120, (0.15, 0.19, 0.12), ((0.66, 0.32, 0.56), (0.46, 0.22, 0.62))),
    "right kidney": Organ(175, (0.13, 0.17, 0.13), ((0.14, 0.36, -0.40), (-0.04, 0.32, -0.44))),
    "left kidney": Organ(175, (0.13, 0.17, 0.13), ((0.22, 0.36, 0.40), (0.04, 0.32, 0.44))),
    "bladder": Organ(8, (0.15, 0.22, 0.27), ((-0.70, -0.22, 0.0),)),
    "prostate/uterus": Organ(65, (0.09, 0.15, 0.16), ((-0.88, 0.02, 0.0),)),
    "pancreas": Organ(90, (0.07, 0.09, 0.07), ((0.16, -0.06, -0.1), (0.24, -0.12, 0.1), (0.36, 0.16, 0.42))),
    "duodenum": Organ(
        50,
        (0.06, 0.08, 0.07),
        ((0.26, -0.16, -0.18), (0.1, 0.0, -0.26), (-0.1, 0.0, -0.22), (-0.12, 0.08, 0.1)),
    ),
    "gallbladder": Organ(10, (0.09, 0.11, 0.09), ((0.26, -0.34, -0.36), (0.18, -0.42, -0.36))),
    "postcava": Organ(135, (0.06, 0.08, 0.08), ((-0.3, 0.24, -0.12), (0.5, 0.2, -0.14), (0.8, 0.1, -0.12))),
    "aorta": Organ(190, (0.06, 0.08, 0.07), ((-0.28, 0.28, 0.08), (0.96, 0.30, 0.1))),
    "oesophagus": Organ(42, (0.05, 0.07, 0.06), ((0.98, 0.14, 0.05), (0.78, 0.12, 0.14))),
    "right adrenal gland": Organ(70, (0.055, 0.05, 0.045), ((0.36, 0.22, -0.24), (0.32, 0.3, -0.28))),
    "left adrenal gland": Organ(70, (0.055, 0.05, 0.045), ((0.42, 0.22, 0.22), (0.38, 0.3, 0.27))),
}

FRAME = (  # on either side the muscle along the spine and the wing of the pelvis
    Organ(55, (0.1, 0.16, 0.17), ((-1.1, 0.54, -0.24), (1.1, 0.54, -0.2))),
    Organ(55, (0.1, 0.16, 0.17), ((-1.1, 0.54, 0.24), (1.1, 0.54, 0.2))),
    Organ(300, (0.14, 0.12, 0.06), ((-0.35, 0.36, -0.6), (-0.85, 0.3, -0.42))),
    Organ(300, (0.14, 0.12, 0.06), ((-0.35, 0.36, 0.6), (-0.85, 0.3, 0.42))),
)
SPINE = Organ(240, (0.1, 0.16, 0.14), ((-1.1, 0.5, 0.0), (1.1, 0.5, 0.0)))
CANAL = Organ(30, (0.1, 0.06, 0.06), ((-1.1, 0.68, 0.0), (1.1, 0.68, 0.0)))


def phantom(seed: int, shape: Sequence[int] = (48, 64, 64)) -> Case:
    """One procedural CT of the abdomen in HU, with all fifteen organs: the same seed, the same voxels.

    The field of view is 432 x 320 x 400 mm whatever the ``shape`` (D, H, W), so the spacing follows from it.

    Raises:
        SettingError: The shape is too small to hold every organ.

    >>> case = phantom(0)
    >>> case.image.shape, len(np.unique(case.label)) - 1
    ((1, 48, 64, 64), 15)
    """
    size = _checked_shape(shape)
    rng = np.random.default_rng(seed)
    grid = _bent_grid(rng, size)
    hu, cavity = _torso(rng, grid)
    label = np.zeros(size, np.uint8)
    for name, organ in ORGANS.items():
        inside = _draw(_varied(organ, rng), grid) & cavity
        label[inside] = AMOS_ORGANS.index(name) + 1
        hu[inside] = organ.hu + rng.normal(0, 4)
    hu += 6 * _smooth_field(rng, size, num_waves=10)
    hu = ndimage.gaussian_filter(hu, 0.4)  # voxels: the blur of partial volume
    hu += rng.normal(0, 10, size).astype(np.float32)
    spacing = tuple(mm / n for mm, n in zip(FIELD_OF_VIEW, size, strict=True))
    image = np.clip(hu, -1024, 3071)[None]
    return Case(f"phantom_{seed}", image, label, (spacing[0], spacing[1], spacing[2]))


def phantoms(num_cases: int, *, seed: int = 0, shape: Sequence[int] = (48, 64, 64)) -> Cases:
    """A data set of phantoms. Another seed gives other patients; more cases leave the first ones as they are.

    Raises:
        SettingError: The shape is too small to hold every organ.

    >>> [case.name for case in phantoms(2, seed=7).cases]
    ['phantom_7_000', 'phantom_7_001']
    """
    seeds = [int(np.random.SeedSequence((seed, i)).generate_state(1)[0]) for i in range(num_cases)]
    cases = (replace(phantom(s, shape), name=f"phantom_{seed}_{i:03d}") for i, s in enumerate(seeds))
    return Cases(name="phantom", channels=("CT",), classes=AMOS_ORGANS, cases=tuple(cases))


def _checked_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    if len(shape) != 3 or any(n < least for n, least in zip(shape, MIN_SHAPE, strict=True)):
        raise SettingError(
            explain(
                "shape",
                "phantom()",
                allowed=f"three sizes (D, H, W) of at least {MIN_SHAPE}",
                given=tuple(shape),
                remedy="Choose a larger shape: the adrenal glands vanish in a smaller one.",
            )
        )
    depth, height, width = shape
    return depth, height, width


def _smooth_field(rng: np.random.Generator, shape: tuple[int, int, int], *, num_waves: int) -> Volume:
    """A random field of mean 0 and variance 1: the few lowest cosines per axis, randomly weighted."""
    basis = [np.cos(np.pi * np.arange(num_waves)[:, None] * (np.arange(n) + 0.5) / n).astype(np.float32) for n in shape]
    weights = rng.normal(size=(num_waves,) * 3).astype(np.float32)
    weights[0, 0, 0] = 0  # the mean
    field: Volume = np.einsum("abc,ad,bh,cw->dhw", weights, *basis, optimize=True)
    field /= field.std()
    return field


def _bent_grid(rng: np.random.Generator, shape: tuple[int, int, int]) -> list[Volume]:
    """The torso's coordinates (z, y, x) of every voxel, after a smooth random deformation."""
    lines = [(2 * np.arange(n, dtype=np.float32) + 1) / n - 1 for n in shape]
    fields = [_smooth_field(rng, shape, num_waves=NUM_WAVES) for _ in shape]
    grid = np.meshgrid(*lines, indexing="ij")
    return [(line + BEND * np.tanh(field)).astype(np.float32) for line, field in zip(grid, fields, strict=True)]


def _varied(organ: Organ, rng: np.random.Generator) -> Organ:
    """The organ of another patient: moved a little as a whole, and of another size."""
    shift = rng.uniform(-0.015, 0.015, 3)
    scale = rng.uniform(0.92, 1.12)
    points = tuple((z + shift[0], y + shift[1], x + shift[2]) for z, y, x in organ.points)
    rz, ry, rx = organ.radii
    return replace(organ, points=points, radii=(rz * scale, ry * scale, rx * scale))


def _draw(organ: Organ, grid: list[Volume]) -> NDArray[np.bool_]:
    """The voxels within the capsules of an organ."""
    inside = np.zeros(grid[0].shape, bool)
    points = np.array(organ.points, np.float32)
    radii = np.array(organ.radii, np.float32)
    # Only the box that the capsules can reach is looked at, which makes the small organs nearly free.
    lowest, highest = points.min(0) - radii - BEND, points.max(0) + radii + BEND
    sizes: NDArray[np.int64] = np.array(inside.shape)
    first = np.maximum(0, np.floor(sizes * (lowest + 1) / 2)).astype(int)
    last = np.maximum(0, np.ceil(sizes * (highest + 1) / 2)).astype(int)
    box = tuple(slice(a, b) for a, b in zip(first.tolist(), last.tolist(), strict=True))
    scaled = [axis[box] / r for axis, r in zip(grid, radii, strict=True)]
    ends = points / radii
    for start, end in pairwise(ends) if len(ends) > 1 else [(ends[0], ends[0])]:
        inside[box] |= _squared_distance(scaled, start, end) < 1
    return inside


def _squared_distance(grid: list[Volume], start: Volume, end: Volume) -> Volume:
    """Squared distance of every voxel from the segment between two points."""
    offsets = [axis - at for axis, at in zip(grid, start, strict=True)]
    along = end - start
    length = float(along @ along)
    if length == 0:
        return offsets[0] ** 2 + offsets[1] ** 2 + offsets[2] ** 2
    position = sum(o * a for o, a in zip(offsets, along, strict=True)) / length
    position = np.clip(position, 0, 1)
    distance: Volume = sum((o - position * a) ** 2 for o, a in zip(offsets, along, strict=True))
    return distance


def _torso(rng: np.random.Generator, grid: list[Volume]) -> tuple[Volume, NDArray[np.bool_]]:
    """What surrounds the organs, in HU, and the cavity that they lie in."""
    z, y, x = grid
    girth = rng.uniform(0.94, 1.0)
    ring = (np.abs(x / (0.9 * girth)) ** 2.4 + np.abs((y - 0.02) / (0.84 * girth)) ** 2.4) ** (1 / 2.4)
    hu = np.full(z.shape, -1000, np.float32)
    hu[ring < 1] = -105  # fat under the skin
    hu[ring < 0.88] = 55  # muscle
    cavity = ring < 0.81
    hu[cavity] = -95  # fat between the organs
    loops = _smooth_field(rng, z.shape, num_waves=12)
    hu[cavity & (loops > 0.45) & (y < 0.15) & (z < 0.5)] = 35  # bowel
    hu[cavity & (loops > 1.9) & (y < -0.1) & (z < 0.4)] = -700  # and the gas in it
    hu[cavity & (z > 0.8 + 0.5 * (y**2 + (np.abs(x) - 0.45) ** 2))] = -840  # lungs, above a domed diaphragm
    ribs = (ring > 0.8) & (ring < 0.87) & (np.sin(14 * z + 7 * y) > 0.45) & (z > 0.1)
    hu[ribs] = 320
    for part in FRAME:
        hu[_draw(part, grid)] = part.hu
    spine = _draw(SPINE, grid)
    hu[spine] = np.where(np.sin(24 * z[spine]) > -0.7, SPINE.hu, 90)  # vertebrae, and the discs between them
    hu[_draw(CANAL, grid)] = CANAL.hu
    return hu, cavity & ~spine
