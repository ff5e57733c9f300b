"""What programs understand differently of a place, in words: of one header, and of two that should agree."""

import math
from itertools import combinations
from typing import get_args

import numpy as np
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray

from dstlib.zoo.e2enet.data.layouts.manifest import Geometry
from dstlib.zoo.e2enet.data.scans.geometry import Volume
from dstlib.zoo.e2enet.data.scans.header import Affine, Form, Header, apart, is_right

# Headers written by different programs differ by rounding. Under a tenth of a voxel that moves no label to
# another voxel; a real mismatch (another origin, a flip, another spacing) is a whole voxel at some corner.
MAX_SHIFT = 0.1  # voxels

MIN_TILT = 1.0  # degrees from a right angle, from which on it is no rounding but a gantry

_TILTED = (
    "as dcm2niix leaves a CT with a tilted gantry, beside a file named _Tilt_1, which alone is in place: use that one"
)
_READERS = {"itk": "ITK's programs and nnU-Net", "sform": "nibabel's programs", "qform": "ITK's programs and nnU-Net"}


def place_doubts(header: Header, geometry: Geometry) -> list[str]:
    """Says what programs may understand otherwise of the place of a scan, and what is used.

    >>> from dstlib.zoo.e2enet.data.scans.header import header_at
    >>> place_doubts(header_at(np.diag([1.0, 1.0, 2.0, 1.0]), (9, 9, 9)), "itk")
    []
    """
    doubts = []
    if not header.is_placed:
        towards = "front" if geometry == "sform" else "back"
        told = f"its axes are taken to lead left, {towards} and top, as by {_READERS[geometry]}"
        doubts.append(f"states no place (sform and qform codes are 0): {told}")
    if header.version == 2:
        doubts.append("is NIfTI-2, which ITK's programs do not read")
    if header.in_mm != 1:
        unit = "metres" if header.in_mm > 1 else "micrometres"
        told = f"so its voxels are {_shown(header.sizes)} mm; nibabel's programs take its numbers for mm"
        doubts.append(f"is measured in {unit}, {told}")
    if not all(math.isfinite(size) and size > 0 for size in header.pixdim[1:]):
        doubts.append(f"says in pixdim that voxels are {_shown(header.pixdim[1:])}: what is no size counts as 1")
    return doubts + _disagreement(header, geometry) if header.is_placed else doubts


def _disagreement(header: Header, geometry: Geometry) -> list[str]:
    forms = {form: affine for form in get_args(Form) if (affine := header.form(form)) is not None}
    places = [*forms.values(), header.affine("itk")]
    is_refused = header.itk_form() is None
    if not is_refused and all(agree(a, b, header.shape) for a, b in combinations(places, 2)):
        return []
    told = [f"{form} (code {header.code(form)}) {_shown(voxel_sizes(affine))} mm" for form, affine in forms.items()]
    told += [] if "qform" in forms else [f"pixdim {_shown(header.sizes)} mm"]
    text = f"has more than one place: voxels by its {', by its '.join(told)}"
    if no_place := [
        form for form, affine in forms.items() if not (np.isfinite(affine).all() and voxel_sizes(affine).all())
    ]:
        return [f"{text}. The {no_place[0]} is none, as an axis of it has no length. {_used(header, geometry)}"]
    pairs = [*combinations(places, 2)]
    farthest = max(apart(a, b, header.shape) for a, b in pairs)
    turned = max(_turn(a, b) for a, b in pairs)
    text += f"; corners lie up to {farthest:.3g} mm apart, axes {turned:.3g} degrees"
    if "sform" in forms and not is_right(forms["sform"]):
        angles = _angles(forms["sform"])
        text += f". Its sform is sheared: axes meet at {', '.join(f'{angle:.4g}' for angle in angles)} degrees"
        text += f", {_TILTED}" if max(abs(angle - 90) for angle in angles) >= MIN_TILT else ""
    return [f"{text}. {_used(header, geometry)}"]


def _used(header: Header, geometry: Geometry) -> str:
    """Says which place is used, and whose that is."""
    form = header.itk_form()
    if geometry != "itk" and (geometry == "sform" or header.form(geometry) is not None):
        form = geometry if header.form(geometry) is not None else "qform"
        return f"The {form} is used, as --geometry {geometry} has it"
    if form is None:
        return "The sform is used; ITK's programs and nnU-Net's first reader refuse the file"
    affine = header.form(form)
    assert affine is not None
    is_scaled = not np.allclose(voxel_sizes(affine), header.sizes, rtol=1e-3)
    what = "axes of the sform with the sizes of pixdim are" if is_scaled else f"{form} is"
    return f"The {what} used, as by ITK's programs and nnU-Net; --geometry sform or qform chooses"


def agree(affine: Affine, other: Affine, shape: tuple[int, ...]) -> bool:
    """Says whether two affines place a volume alike, but for rounding."""
    smallest = min(voxel_sizes(affine).min(), voxel_sizes(other).min())
    return bool(apart(affine, other, shape) <= MAX_SHIFT * smallest)  # so written, NaN agrees with nothing


def why_elsewhere(volume: Volume, other: Volume, name: str) -> str:
    """Says by which of their forms two volumes lie on each other after all; ``other`` is called ``name``."""
    shape = other.voxels.shape[:3]
    for mine, affine in _readings(volume):
        for theirs, place in _readings(other):
            if agree(affine, place, shape):
                rules = [rule for rule in get_args(Geometry) if agree(_by(volume, rule), _by(other, rule), shape)]
                remedy = f"--geometry {rules[0]} reads both alike" if rules else "write the header of one anew"
                return f"its {mine} lies on the {theirs} of {name}, and programs differ in what they read; {remedy}"
    return "the affines differ by more than rounding"


def _readings(volume: Volume) -> list[tuple[str, Affine]]:
    """Lists the places that a volume may be said to have, each with its name."""
    if volume.header is None:
        return [("place", volume.affine)]
    forms = [(form, affine) for form in get_args(Form) if (affine := volume.header.form(form)) is not None]
    return [*forms, ("place in ITK's programs", volume.header.affine("itk"))]


def _by(volume: Volume, rule: Geometry) -> Affine:
    return volume.affine if volume.header is None else volume.header.affine(rule)


def _angles(affine: Affine) -> list[float]:
    """Returns the angles between y and z, x and z, x and y, in degrees."""
    axes = _axes(affine)
    return [_degrees(axes[:, i], axes[:, j]) for i, j in ((1, 2), (0, 2), (0, 1))]


def _turn(affine: Affine, other: Affine) -> float:
    """Returns the largest angle between an axis of one and the same axis of the other, in degrees."""
    return max(map(_degrees, _axes(affine).T, _axes(other).T))


def _axes(affine: Affine) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore", divide="ignore"):
        axes: NDArray[np.float64] = affine[:3, :3] / voxel_sizes(affine)
    return axes


def _degrees(axis: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Returns the angle between two directions, by the diagonals of their rhombus: a cosine loses small angles."""
    return math.degrees(2 * math.atan2(float(np.linalg.norm(axis - other)), float(np.linalg.norm(axis + other))))


def _shown(sizes: NDArray[np.float64] | tuple[float, ...]) -> str:
    return " × ".join(f"{size:.6g}" for size in sizes)
