"""Voxels behind a header of text, as NRRD and MetaImage have them: unpacked no further than the header promises.

They are not left to ITK's readers: those allocate whatever a header claims, and where MetaImage's cannot unpack the
voxels, it returns what was in memory before. What both make of a sound file is the same, and tested to be.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.affines import voxel_sizes
from numpy.typing import ArrayLike, DTypeLike, NDArray

from dstlib.bounds import available_memory
from dstlib.errors import shown
from dstlib.files import read_whole
from dstlib.zoo.e2enet.data.layouts.files import path_fault
from dstlib.zoo.e2enet.data.scans.geometry import Volume
from dstlib.zoo.e2enet.data.scans.header import is_right
from dstlib.zoo.e2enet.data.scans.unpacking import Packing, refuse_memory, refuse_ratio, unpacked

MAX_AXES = 16  # of NRRD; MetaImage has ten at most
MAX_HEADER = 2**24  # bytes: 3D Slicer writes some hundred per segment
LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])


@dataclass(frozen=True, kw_only=True, eq=False)
class Stored:
    """What a header says of voxels: their type, the sizes of their axes, fastest first, and how they are packed.

    ``channels`` is the axis along which channels lie; None where there is one channel.
    """

    dtype: np.dtype[Any]
    sizes: tuple[int, ...]
    packing: Packing | None
    channels: int | None = None

    @property
    def num_bytes(self) -> int:
        """How many bytes the voxels take, unpacked."""
        return math.prod(self.sizes) * self.dtype.itemsize


def read_stored(content: bytes | memoryview, stored: Stored, dtype: DTypeLike | None) -> NDArray[Any]:
    """Returns voxels (x, y, z[, channel]) as ``dtype``, or as they are stored.

    Raises:
        ValueError: There are fewer than the header promises, they do not fit into memory, or their checksum is another.
    """
    num_bytes = stored.num_bytes
    if stored.packing:
        refuse_ratio(content, num_bytes)
    refuse_memory((num_bytes if stored.packing else 0) + math.prod(stored.sizes) * np.dtype(dtype or "u1").itemsize)
    if stored.packing:
        content = unpacked(content, stored.packing, num_bytes)
    if len(content) < num_bytes:
        raise ValueError(f"it ends after {len(content)} of {num_bytes} bytes of voxels")
    voxels: NDArray[Any] = np.ndarray(stored.sizes, stored.dtype, buffer=content, order="F")
    with np.errstate(over="ignore"):  # beyond float32 is reported, not warned of
        voxels = np.asarray(voxels, dtype=dtype or stored.dtype.newbyteorder("="))
    return voxels if stored.channels is None else np.moveaxis(voxels, stored.channels, -1)


def placed(voxels: NDArray[Any], affine: NDArray[np.float64], unplaced: str | None) -> Volume:
    """Returns voxels in their place, with what is odd about it; ``unplaced`` says why it is none in a patient."""
    odd = [] if unplaced is None else [f"{unplaced}: its axes are taken to lead left, back and top, as ITK does"]
    if np.isfinite(affine).all() and (voxel_sizes(affine) > 0).all() and not is_right(affine):
        odd.append("has axes that are not at right angles: ITK's programs refuse a NIfTI label that lies on it")
    return Volume(voxels, affine, tuple(odd))


def last_bytes(data: memoryview, stored: Stored) -> memoryview:
    """Returns the end of a file, where its voxels lie behind something that is not told of."""
    return data if stored.packing else data[max(0, len(data) - stored.num_bytes) :]


def read_beside(header: Path, name: str) -> bytes:
    """Reads the file of voxels that a header of its own names: one in, or below, the folder of the header.

    Raises:
        ValueError: The header names several, or one elsewhere.
        OSError: It cannot be read.
    """
    if name.split()[0:1] == ["LIST"] or "%" in name:
        raise ValueError(f"its voxels lie in several files, {shown(name)}: save it as one")
    if path_fault(name, allow_outside=False):
        raise ValueError(f"it names its voxels by {shown(name)}, which is no path below its own folder")
    try:
        return read_whole(header.parent / name, max_bytes=available_memory())
    except FileNotFoundError as error:
        raise ValueError(f"its voxels, {shown(name)}, are missing") from error


def lines_of(content: bytes) -> list[str]:
    """Splits a header of text into lines."""
    return [line.rstrip("\r") for line in content.decode("utf-8", "replace").split("\n")]


def numbers(field: str, text: str, *, count: int) -> list[float]:
    """Reads so many numbers that a field holds.

    Raises:
        ValueError: It holds others.

    >>> numbers("spacings", "0.5 1 nan", count=3)
    [0.5, 1.0, nan]
    """
    try:
        found = [float(word) for word in text.split()]
    except ValueError:
        found = []
    if len(found) != count:
        raise ValueError(f"its {field!r} are {shown(text)} but {count} numbers")
    return found


def whole_numbers(field: str, text: str, *, low: int, high: int, count: int | None = None) -> tuple[int, ...]:
    """Reads the whole numbers that a field holds, each within bounds; so many, or any number.

    Raises:
        ValueError: It holds others.
    """
    words = text.split()
    is_whole = all(word.isascii() and word.removeprefix("-").isdigit() and len(word) < 20 for word in words)
    found = tuple(map(int, words)) if is_whole else ()
    if not found or len(found) != (count or len(found)) or not all(low <= number <= high for number in found):
        what = f"{count or 'some'} whole number(s) from {low} to {high}"
        raise ValueError(f"its {field!r} is {shown(text)} but {what}")
    return found


def within_space(steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the steps (3, 3) along the axes of space, a column each, of as many axes or of one more.

    Raises:
        ValueError: The fourth axis leads through space.
    """
    if len(steps) == 4 and (steps[3, :3].any() or steps[:3, 3].any()):
        raise ValueError("its fourth axis leads through space: save one file per time")
    return steps[:3, :3]


def affine_of(steps: NDArray[np.float64], origin: ArrayLike, to_ras: NDArray[np.float64]) -> NDArray[np.float64]:
    """Makes an affine of the steps (3, 3) along each axis, a column each, and the place of the first voxel."""
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = to_ras[:, None] * steps, to_ras * np.asarray(origin)
    return affine
