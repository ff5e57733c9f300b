"""What a NIfTI header says of the place of its voxels, and which of its words count.

It may say so twice: by the *sform*, any affine, and by the *qform*, a rotation with the sizes of ``pixdim``. Each has a
code for what kind of place it is, 0 for none. Where the two differ, programs choose differently, and so do our rules:

- ``itk``, as ITK's programs and nnU-Net: sizes always from ``pixdim``, axes and origin from one of the two. That is the
  sform, if its axes are at right angles and its code is 1, or there is no qform; else the qform. (Of two that agree ITK
  may take the sform by any code: signs of singular vectors decide, and rounding is the difference.) A sform that is not
  at right angles, without a qform, they refuse, and we take it as it is. Without either, axes lead left, back and top
  from the origin.
- ``sform``, as nibabel's programs: the sform, sizes and all; the qform where there is none. Without either, axes lead
  left, front and top about the middle.
- ``qform``: the qform; where there is none, as ``itk``.

Numbers are in the units of ``xyzt_units``, which ITK's programs and we turn into mm, and nibabel's do not. Affines take
voxels (x, y, z) to mm, towards right, front and top (RAS+).

Reference: nifti1.h (nifti.nimh.nih.gov); ITK 5.4 and nibabel 5.4, as ``tests/e2enet/test_header.py`` finds them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import nibabel
import numpy as np
from nibabel.affines import apply_affine, voxel_sizes
from numpy.typing import NDArray

from dstlib.zoo.e2enet.data.cases import three
from dstlib.zoo.e2enet.data.layouts.manifest import Geometry

Affine = NDArray[np.float64]
Form = Literal["sform", "qform"]
Three = tuple[float, float, float]
Four = tuple[float, float, float, float]

METRES, MICROMETRES = 1, 3  # codes of units; all others are mm, or taken for it
MAX_COSINE = 1e-4  # between two axes that ITK takes to be at a right angle

EPSILON = 2.0**-23  # of float32

_OF_SPACE = 0b111  # the bits of xyzt_units that tell them
_QUATERNION, _OFFSET = ("quatern_b", "quatern_c", "quatern_d"), ("qoffset_x", "qoffset_y", "qoffset_z")
_ROWS = ("srow_x", "srow_y", "srow_z")


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a NIfTI header says of its place, each number as it is stored.

    - ``version``: of NIfTI, 1 or 2.
    - ``shape``: the voxels along x, y and z.
    - ``pixdim``: the sign of the qform's third axis, then the sizes of a voxel.
    - ``quaternion``, ``offset``: the rotation of the qform, and its origin; ``rows``: of the sform.
    - ``units``: the code of what all this is measured in: 1 for m, 2 for mm, 3 for µm, 0 for what nobody has said.

    >>> header_at(np.diag([-0.5, 0.75, 3.0, 1.0]), (9, 9, 9)).affine("itk").diagonal().tolist()
    [-0.5, 0.75, 3.0, 1.0]
    """

    version: int
    shape: tuple[int, int, int]
    pixdim: Four
    qform_code: int
    quaternion: Three
    offset: Three
    sform_code: int
    rows: tuple[Four, Four, Four]
    units: int

    @property
    def is_placed(self) -> bool:
        """Whether one of the two forms is there."""
        return self.sform_code > 0 or self.qform_code > 0

    @property
    def is_rotation(self) -> bool:
        """Whether the qform turns, by a quaternion no longer than 1: a longer one nibabel refuses, and ITK shortens."""
        return self.qform_code <= 0 or not sum(each * each for each in self.quaternion) > 1 + 3 * EPSILON

    @property
    def in_mm(self) -> float:
        """One unit."""
        return {METRES: 1000.0, MICROMETRES: 0.001}.get(self.units, 1.0)

    @property
    def sizes(self) -> NDArray[np.float64]:
        """What ``pixdim`` says in mm, as ITK takes it: 1 for what is no size; a negative one turns its axis."""
        return np.array([size if math.isfinite(size) and size else 1.0 for size in self.pixdim[1:]]) * self.in_mm

    def code(self, form: Form) -> int:
        """Returns the code of one of the two forms."""
        return self.sform_code if form == "sform" else self.qform_code

    def form(self, form: Form) -> Affine | None:
        """Returns one of the two forms, in mm; None where its code is 0."""
        if self.code(form) <= 0:
            return None
        affine = np.eye(4)
        if form == "sform":
            affine[:3] = np.array(self.rows) * self.in_mm
        else:
            affine[:3, :3] = _rotation(self.quaternion) * np.abs(self.sizes)
            affine[:3, 2] *= -1.0 if self.pixdim[0] < 0 else 1.0
            affine[:3, 3] = np.array(self.offset) * self.in_mm
        return affine

    def itk_form(self) -> Form | None:
        """Finds the form that ITK's programs take axes and origin from; None where there is none, or they refuse it."""
        sform, has_qform = self.form("sform"), self.qform_code > 0
        if sform is not None and is_right(sform) and (self.sform_code == 1 or not has_qform):
            return "sform"
        return "qform" if has_qform else None

    def affine(self, geometry: Geometry) -> Affine:
        """Returns the place of the voxels by a rule, in mm."""
        forms: Sequence[Form] = ("sform", "qform") if geometry == "sform" else ("qform",) if geometry == "qform" else ()
        for name in forms:
            if (affine := self.form(name)) is not None:
                return affine
        if not self.is_placed:
            return _in_the_middle(self.shape, np.abs(self.sizes)) if geometry == "sform" else _at_the_origin(self.sizes)
        taken = self.itk_form()
        axes = self.form(taken or "sform")
        assert axes is not None
        if taken is not None:
            axes[:3, :3] *= self.sizes / voxel_sizes(axes)
        return axes


def read_header(stored: Any) -> Header:
    """Reads what a header of nibabel, as it is stored, says of its place.

    >>> read_header(nibabel.Nifti1Header()).is_placed
    False
    """
    shape = (*stored.get_data_shape()[:3], 1, 1, 1)
    return Header(
        version=1 if stored.sizeof_hdr == nibabel.Nifti1Header.sizeof_hdr else 2,
        shape=three(shape[:3]),
        pixdim=_four(stored["pixdim"][:4]),
        qform_code=int(stored["qform_code"]),
        quaternion=three(float(stored[name]) for name in _QUATERNION),
        offset=three(float(stored[name]) for name in _OFFSET),
        sform_code=int(stored["sform_code"]),
        rows=three(_four(stored[name]) for name in _ROWS),
        units=int(stored["xyzt_units"]) & _OF_SPACE,
    )


def header_at(affine: Affine, shape: tuple[int, int, int]) -> Header:
    """Makes the header of voxels that came without one: sform and qform are the affine, of code 1, in mm.

    A qform cannot be sheared, so there is none where the affine is.
    """
    kind = nibabel.Nifti1Header if max(shape) < 2**15 else nibabel.Nifti2Header
    stored = kind()
    stored.set_data_shape(shape)
    stored.set_xyzt_units("mm")
    stored.set_sform(affine, 1)
    stored.set_qform(affine, int(is_right(affine)), strip_shears=True)
    return read_header(stored)


def label_header(header: Header) -> bytes:
    """Returns the head of a NIfTI file of a label with this place: bytes as voxels, and nothing else of its image."""
    stored = (nibabel.Nifti1Header if header.version == 1 else nibabel.Nifti2Header)()
    stored.set_data_shape(header.shape)
    stored.set_data_dtype(np.uint8)
    stored["magic"] = stored.single_magic
    stored["vox_offset"] = stored.single_vox_offset
    stored["pixdim"][:4] = header.pixdim
    stored["qform_code"], stored["sform_code"] = header.qform_code, header.sform_code
    for names, values in ((_QUATERNION, header.quaternion), (_OFFSET, header.offset), (_ROWS, header.rows)):
        for name, value in zip(names, values, strict=True):
            stored[name] = value
    stored["xyzt_units"] = header.units
    return bytes(stored.binaryblock) + bytes(stored.single_vox_offset - stored.sizeof_hdr)


def is_right(affine: Affine) -> bool:
    """Says whether the axes of an affine are at right angles, by ITK's measure.

    >>> is_right(np.diag([-1.0, 2.0, 3.0, 1.0])), is_right(np.eye(4) + np.eye(4, k=1) * [1, 1, 0, 0])
    (True, False)
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        axes = affine[:3, :3] / voxel_sizes(affine)
    return bool(np.abs(axes @ axes.T - np.eye(3)).max() <= MAX_COSINE)  # so written, NaN is none


def apart(affine: Affine, other: Affine, shape: Sequence[int], *, outer: bool = True) -> float:
    """Measures how far, in mm, a corner of a volume lies by one affine from where it lies by the other.

    Corners are the outer ones of voxels, or their centres.

    >>> apart(np.eye(4), np.diag([1.0, 1.0, 3.0, 1.0]), (9, 9, 1))  # of one slice of 3 mm, or 1 mm
    1.0
    """
    edge = 0.5 if outer else 0.0
    corners = np.array(list(product(*((-edge, size - 1 + edge) for size in shape))))
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.linalg.norm(apply_affine(affine, corners) - apply_affine(other, corners), axis=1).max())


def _four(values: Any) -> Four:
    a, b, c, d = map(float, values)
    return a, b, c, d


def _rotation(quaternion: Three) -> NDArray[np.float64]:
    """Computes the rotation of a quaternion, of which only b, c and d are stored.

    Reference: nifti1.h, and niftilib, where a is below the rounding of the others.
    """
    b, c, d = quaternion
    length = b * b + c * c + d * d
    a = 1.0 - length
    if a < 1e-7:
        a, b, c, d = 0.0, *(each / math.sqrt(length) for each in quaternion)
    else:
        a = math.sqrt(a)
    return np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )


def _at_the_origin(sizes: NDArray[np.float64]) -> Affine:
    return np.diag([*(sizes * (-1, -1, 1)), 1.0])


def _in_the_middle(shape: tuple[int, int, int], sizes: NDArray[np.float64]) -> Affine:
    affine = np.diag([*(sizes * (-1, 1, 1)), 1.0])
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
    return affine
