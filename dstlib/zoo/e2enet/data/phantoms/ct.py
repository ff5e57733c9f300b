"""Procedural abdominal CTs with the organs of AMOS or of BTCV: no download.

The array's axes (D, H, W) run as the torso's (z, y, x), so a slice shown as an image is the usual radiological
view: liver on the left of the picture, spine at the bottom.

The body is schematic, and some of it is larger than in people, so that voxels of 9 x 5 x 6 mm still show a shape:
the adrenal glands about three times (13 ml), aorta and postcava about twice, the liver by half (2.5 l). Each
adrenal gland has a mantle of fat to itself, where a real one may touch liver, crus or vessels. The intensities
are those of a portal venous CT after oral contrast: it fills the bowel, which has no label, and has left stomach
and duodenum.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from dstlib.zoo.e2enet.data.cases import Case, Cases, three
from dstlib.zoo.e2enet.data.layouts.amos import AMOS_ORGANS
from dstlib.zoo.e2enet.data.phantoms.drawing import Mask, Point, Volume, bent_grid, checked_shape, smooth_field, within

FIELD_OF_VIEW = (432.0, 320.0, 400.0)  # mm along (D, H, W)
MIN_SHAPE = (32, 40, 40)  # below it the adrenal glands are a few voxels, which is no shape to learn


@dataclass(frozen=True)
class Organ:
    """One organ: its intensity in HU, and the capsules through ``points`` (one point: an ellipsoid)."""

    hu: float
    radii: Point
    points: tuple[Point, ...]


FAT = -95  # HU, between the organs

# Coordinates are (z, y, x) of a torso, each from -1 to 1: z from the pelvic floor to the diaphragm, y from the belly
# to the back, x from the patient's right to the left. Large organs first, small ones over them: the other way round
# the adrenal glands would vanish.
ORGANS = {
    "liver": Organ(105, (0.24, 0.42, 0.32), ((0.62, 0.0, -0.42), (0.42, 0.02, -0.46), (0.62, -0.4, -0.02))),
    "stomach": Organ(35, (0.13, 0.20, 0.15), ((0.7, 0.05, 0.36), (0.5, -0.25, 0.4), (0.32, -0.42, 0.1))),
    "spleen": Organ(120, (0.15, 0.19, 0.12), ((0.66, 0.32, 0.56), (0.46, 0.22, 0.62))),
    # The fat that holds kidney and adrenal gland, and keeps the liver off them.
    "right perirenal fat": Organ(FAT, (0.16, 0.15, 0.13), ((0.45, 0.28, -0.28), (0.26, 0.36, -0.36))),
    "left perirenal fat": Organ(FAT, (0.15, 0.15, 0.13), ((0.45, 0.26, 0.26), (0.3, 0.36, 0.36))),
    "right kidney": Organ(175, (0.13, 0.17, 0.13), ((0.12, 0.36, -0.40), (-0.06, 0.32, -0.44))),
    "left kidney": Organ(175, (0.13, 0.17, 0.13), ((0.18, 0.36, 0.40), (0.0, 0.32, 0.44))),
    "bladder": Organ(8, (0.15, 0.22, 0.27), ((-0.70, -0.22, 0.0),)),
    "prostate/uterus": Organ(95, (0.09, 0.15, 0.16), ((-0.88, 0.02, 0.0),)),
    "portal and splenic veins": Organ(
        165,
        (0.045, 0.055, 0.045),
        ((0.5, -0.1, -0.26), (0.27, 0.05, -0.06), (0.31, 0.06, 0.12), (0.42, 0.12, 0.38), (0.54, 0.2, 0.5)),
    ),
    "pancreas": Organ(90, (0.07, 0.09, 0.07), ((0.16, -0.06, -0.1), (0.24, -0.12, 0.1), (0.34, 0.02, 0.42))),
    "duodenum": Organ(
        50,
        (0.06, 0.08, 0.07),
        ((0.26, -0.16, -0.18), (0.1, 0.0, -0.26), (-0.1, 0.0, -0.22), (-0.12, 0.08, 0.1)),
    ),
    "gallbladder": Organ(12, (0.1, 0.12, 0.1), ((0.26, -0.34, -0.36), (0.18, -0.42, -0.36))),
    "postcava": Organ(135, (0.06, 0.08, 0.08), ((-0.3, 0.24, -0.12), (0.5, 0.2, -0.14), (0.8, 0.1, -0.12))),
    "aorta": Organ(190, (0.06, 0.08, 0.07), ((-0.28, 0.28, 0.08), (0.96, 0.30, 0.1))),
    "oesophagus": Organ(60, (0.05, 0.08, 0.07), ((0.98, 0.14, 0.05), (0.76, 0.12, 0.16))),
    "right adrenal gland": Organ(75, (0.065, 0.055, 0.05), ((0.46, 0.26, -0.28), (0.39, 0.33, -0.32))),
    "left adrenal gland": Organ(75, (0.065, 0.055, 0.05), ((0.46, 0.23, 0.25), (0.39, 0.31, 0.29))),
}

FRAME = (  # on either side the muscle along the spine and the wing of the pelvis
    Organ(55, (0.1, 0.16, 0.17), ((-1.1, 0.54, -0.24), (1.1, 0.54, -0.2))),
    Organ(55, (0.1, 0.16, 0.17), ((-1.1, 0.54, 0.24), (1.1, 0.54, 0.2))),
    Organ(300, (0.14, 0.12, 0.06), ((-0.35, 0.36, -0.6), (-0.85, 0.3, -0.42))),
    Organ(300, (0.14, 0.12, 0.06), ((-0.35, 0.36, 0.6), (-0.85, 0.3, 0.42))),
)
SPINE = Organ(240, (0.1, 0.16, 0.14), ((-1.1, 0.5, 0.0), (1.1, 0.5, 0.0)))
CANAL = Organ(30, (0.1, 0.06, 0.06), ((-1.1, 0.68, 0.0), (1.1, 0.68, 0.0)))


def phantom(seed: int, shape: Sequence[int] = (48, 64, 64), *, organs: Sequence[str] = AMOS_ORGANS) -> Case:
    """Draws a CT of the abdomen in HU, with all fifteen organs of AMOS: the same seed, the same voxels.

    The label names ``organs``, BTCV's thirteen say, and leaves others background; the image is the same for all.

    The field of view is 432 x 320 x 400 mm whatever the ``shape`` (D, H, W), so the spacing follows from it.

    Raises:
        SettingError: The shape is too small to hold every organ.

    >>> case = phantom(0)
    >>> case.image.shape, len(np.unique(case.label)) - 1
    ((1, 48, 64, 64), 15)
    """
    size = checked_shape(shape, "a phantom", least=MIN_SHAPE, why="the adrenal glands vanish in a smaller one")
    rng = np.random.default_rng(seed)
    grid = bent_grid(rng, size)
    hu, cavity = _torso(rng, grid)
    label = np.zeros(size, np.uint8)
    numbers = {name: number for number, name in enumerate(organs, start=1)}
    for name, organ in ORGANS.items():
        # From patient to patient it is moved a little as a whole, and of another size.
        points = np.array(organ.points) + rng.uniform(-0.015, 0.015, 3)
        radii = np.array(organ.radii) * rng.uniform(0.92, 1.12)
        inside = within(points, radii, grid) & cavity
        label[inside] = numbers.get(name, 0)
        hu[inside] = organ.hu + rng.normal(0, 4)
    hu += 6 * smooth_field(rng, size, num_waves=10)
    hu = ndimage.gaussian_filter(hu, 0.4)  # voxels: the blur of partial volume
    hu += rng.normal(0, 10, size).astype(np.float32)
    spacing = three(mm / n for mm, n in zip(FIELD_OF_VIEW, size, strict=True))
    return Case(f"phantom_{seed}", np.clip(hu, -1024, 3071)[None], label, spacing)


def phantoms(num_cases: int, *, seed: int = 0, shape: Sequence[int] = (48, 64, 64)) -> Cases:
    """Draws a data set of phantoms. Another seed gives other patients; more cases leave the first ones as they are.

    Raises:
        SettingError: The shape is too small to hold every organ.

    >>> [case.name for case in phantoms(2, seed=7).cases]
    ['phantom_7_000', 'phantom_7_001']
    """
    seeds = (patient_seed(seed, i) for i in range(num_cases))
    cases = (replace(phantom(s, shape), name=f"phantom_{seed}_{i:03d}") for i, s in enumerate(seeds))
    return Cases(name="phantom", channels=("CT",), classes=AMOS_ORGANS, cases=tuple(cases))


def patient_seed(seed: int, number: int) -> int:
    """Returns the seed of one patient of a set: sets of neighbouring seeds share no patient.

    >>> patient_seed(0, 1) == patient_seed(1, 0)
    False
    """
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def _torso(rng: np.random.Generator, grid: list[Volume]) -> tuple[Volume, Mask]:
    """Draws what surrounds the organs, in HU, and finds the cavity that they lie in."""
    z, y, x = grid
    girth = rng.uniform(0.94, 1.0)
    ring = (np.abs(x / (0.9 * girth)) ** 2.4 + np.abs((y - 0.02) / (0.84 * girth)) ** 2.4) ** (1 / 2.4)
    hu = np.full(z.shape, -1000, np.float32)
    hu[ring < 1] = -105  # fat under the skin
    hu[ring < 0.88] = 55  # muscle
    cavity = ring < 0.81
    hu[cavity] = FAT
    loops = smooth_field(rng, z.shape, num_waves=12)
    bowel = cavity & (loops > 0.45) & (y < 0.15) & (z > -0.55) & (z < 0.5)
    hu[bowel] = 220  # what was drunk an hour before the scan has left the stomach
    hu[bowel & (loops > 1.9) & (y < -0.1) & (z < 0.4)] = -700  # gas
    hu[cavity & (z > 0.8 + 0.5 * (y**2 + (np.abs(x) - 0.45) ** 2))] = -840  # lungs, above a domed diaphragm
    ribs = (ring > 0.8) & (ring < 0.87) & (np.sin(14 * z + 7 * y) > 0.45) & (z > 0.1)
    hu[ribs] = 320
    for part in FRAME:
        hu[within(part.points, part.radii, grid)] = part.hu
    spine = within(SPINE.points, SPINE.radii, grid)
    hu[spine] = np.where(np.sin(24 * z[spine]) > -0.7, SPINE.hu, 90)  # vertebrae, and the discs between them
    hu[within(CANAL.points, CANAL.radii, grid)] = CANAL.hu
    return hu, cavity & ~spine
