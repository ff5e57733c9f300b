"""MetaImage files, ``.mha`` and ``.mhd``, to arrays: what ITK reads of them, and in words what it reads wrongly.

Axes and origin are of ITK's space, LPS; ``AnatomicalOrientation`` and ``CenterOfRotation`` are not looked at, as ITK
does not. Reference: `the definition of MetaImage <https://itk.org/Wiki/ITK/MetaIO/Documentation>`_.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dstlib.bounds import available_memory
from dstlib.errors import shown
from dstlib.files import read_whole
from dstlib.zoo.e2enet.data.scans.geometry import Volume
from dstlib.zoo.e2enet.data.scans.stored import (
    LPS_TO_RAS,
    MAX_HEADER,
    Stored,
    affine_of,
    last_bytes,
    lines_of,
    numbers,
    placed,
    read_beside,
    read_stored,
    whole_numbers,
    within_space,
)

_TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
_MATRIX, _OFFSET = ("TransformMatrix", "Orientation", "Rotation"), ("Offset", "Position", "Origin")
_SPACING, _BIG_ENDIAN = ("ElementSpacing", "ElementSize"), ("BinaryDataByteOrderMSB", "ElementByteOrderMSB")
_LAST = "ElementDataFile"
MAX_STRETCH = 1e-3  # by which a direction may miss the length of 1: headers are written with some six digits


def read_metaimage(file: Path, dtype: DTypeLike | None) -> Volume:
    """Reads a file, or a header and the file of voxels that it names.

    Raises:
        ValueError: The content is not what it should be.
        OSError: A file cannot be read.
    """
    fields, data = _header(read_whole(file, max_bytes=available_memory()))
    (num_axes,) = whole_numbers("NDims", fields.get("NDims", ""), low=1, high=10)
    sizes = whole_numbers("DimSize", fields.get("DimSize", ""), low=0, high=2**40, count=num_axes)
    (num_channels,) = whole_numbers(
        "ElementNumberOfChannels", fields.get("ElementNumberOfChannels", "1"), low=1, high=2**16
    )
    stored = Stored(
        dtype=_dtype(fields),
        sizes=sizes if num_channels == 1 else (num_channels, *sizes),
        packing="zlib" if _flag(fields, "CompressedData") else None,
        channels=None if num_channels == 1 else 0,
    )
    _refuse_what_is_ignored(fields)
    if fields[_LAST] != "LOCAL":
        data = memoryview(read_beside(file, fields[_LAST]))
    voxels = read_stored(last_bytes(data, stored) if fields.get("HeaderSize") == "-1" else data, stored, dtype)
    if num_axes not in (3, 4):
        return Volume(voxels, np.eye(4))  # refused by its shape
    return placed(voxels, *_place(fields, num_axes))


def _header(content: bytes) -> tuple[Mapping[str, str], memoryview]:
    """Splits a file into its fields, and the data behind the last one."""
    at = content.find(_LAST.encode(), 0, MAX_HEADER)
    end = content.find(b"\n", at) if at >= 0 else -1
    end = len(content) if end < 0 else end
    fields: dict[str, str] = {}
    for line in lines_of(content[:end]) if at >= 0 else ():
        key, is_field, value = line.partition("=")
        if not is_field and line.strip():
            raise ValueError(f"its header has a line {shown(line)}")
        fields[key.strip()] = value.strip()
    if fields.get("ObjectType", "Image") != "Image" or not fields.get(_LAST):
        raise ValueError(f"its {len(content)} bytes do not begin as MetaImage does")
    return fields, memoryview(content)[end + 1 :]


def _first(fields: Mapping[str, str], names: tuple[str, ...]) -> tuple[str, str | None]:
    """Returns the first of several names of one field that a header has, and its value."""
    return next(((name, fields[name]) for name in names if name in fields), (names[0], None))


def _flag(fields: Mapping[str, str], *names: str) -> bool:
    return (_first(fields, names)[1] or "").lower() in ("true", "1")


def _dtype(fields: Mapping[str, str]) -> np.dtype[Any]:
    name = fields.get("ElementType")
    if name not in _TYPES:
        raise ValueError(f"its voxels are of type {shown(name)}, not numbers")
    return np.dtype(_TYPES[name]).newbyteorder(">" if _flag(fields, *_BIG_ENDIAN) else "<")


def _refuse_what_is_ignored(fields: Mapping[str, str]) -> None:
    """Refuses what a header may say of its voxels, and ITK does not do, or not here."""
    if "BinaryData" in fields and not _flag(fields, "BinaryData"):
        raise ValueError("its voxels are written as text: save it in binary")
    if fields.get("HeaderSize", "0") not in ("0", "-1"):
        raise ValueError("its voxels have a header of their own: save it without")
    for name, neutral in (("ElementToIntensityFunctionSlope", 1.0), ("ElementToIntensityFunctionOffset", 0.0)):
        if name in fields and numbers(name, fields[name], count=1) != [neutral]:
            raise ValueError(f"its {name!r} is {shown(fields[name])}, which programs do not look at: apply it")


def _place(fields: Mapping[str, str], num_axes: int) -> tuple[NDArray[np.float64], str | None]:
    """Returns the affine, and what the header lacks of a place."""
    (matrix_name, matrix), (offset_name, offset) = _first(fields, _MATRIX), _first(fields, _OFFSET)
    spacing_name, spacing = _first(fields, _SPACING)
    axes = np.eye(num_axes)
    if matrix is not None:
        axes = np.reshape(numbers(matrix_name, matrix, count=num_axes**2), (num_axes, num_axes)).T
    directions = within_space(axes)
    if not np.allclose(np.linalg.norm(axes, axis=0), 1, rtol=0, atol=MAX_STRETCH):
        raise ValueError(f"its {matrix_name!r} is {shown(matrix)}, whose rows are not of length 1")
    sizes = numbers(spacing_name, spacing, count=num_axes) if spacing is not None else [1.0] * num_axes
    origin = numbers(offset_name, offset, count=num_axes) if offset is not None else [0.0] * num_axes
    lacking = [name for name, value in ((matrix_name, matrix), (offset_name, offset)) if value is None]
    affine = affine_of(directions * np.array(sizes[:3]), origin[:3], LPS_TO_RAS)
    return affine, f"states no {' and no '.join(lacking)}" if lacking else None
