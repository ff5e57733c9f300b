"""What the abdominal phantoms are drawn from: tables of organs, and the classes of AMOS and of BTCV.

The coordinates are those of a torso, each axis from -1 to 1: z from the pelvic floor to the diaphragm, y from
the belly to the back, x from the patient's right to the left.
"""

from dataclasses import dataclass, replace

import numpy as np

from dstlib.zoo.e2enet.data.phantoms.drawing import Point

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
BTCV_ORGANS = (
    *AMOS_ORGANS[:9],
    "portal and splenic veins",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
)


@dataclass(frozen=True)
class Organ:
    """One organ: its intensity in HU, and the capsules through ``points`` (one point: an ellipsoid)."""

    hu: float
    radii: Point
    points: tuple[Point, ...]


def varied(organ: Organ, rng: np.random.Generator) -> Organ:
    """The organ of another patient: moved a little as a whole, and of another size.

    >>> other = varied(Organ(10, (0.1, 0.1, 0.1), ((0.0, 0.0, 0.0),)), np.random.default_rng(0))
    >>> other.hu, all(0.09 < radius < 0.12 for radius in other.radii)
    (10, True)
    """
    shift = rng.uniform(-0.015, 0.015, 3)
    scale = rng.uniform(0.92, 1.12)
    points = tuple((z + shift[0], y + shift[1], x + shift[2]) for z, y, x in organ.points)
    rz, ry, rx = organ.radii
    return replace(organ, points=points, radii=(rz * scale, ry * scale, rx * scale))


FAT = -95  # HU, between the organs

# Large organs first, small ones over them: the other way round the adrenal glands would vanish.
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
