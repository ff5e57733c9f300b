"""NRRD files, ``.nrrd`` and ``.nhdr``, to arrays: what ITK reads of them, and in words what it reads wrongly.

A header names its space. ITK turns RAS and LAS into its own LPS, and takes every other one for LPS, which holds of none
of them for sure; it does not look at units. Reference: `the definition of NRRD
<https://teem.sourceforge.net/nrrd/format.html>`_.
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
    MAX_AXES,
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
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    **dict.fromkeys(
        ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"), "i8"
    ),
    **dict.fromkeys(("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"), "u8"),
    "float": "f4",
    "double": "f8",
}
_ENCODINGS = {"raw": None, "gz": "gzip", "gzip": "gzip"}
_TO_RAS = {
    **dict.fromkeys(("ras", "right-anterior-superior"), np.ones(3)),
    **dict.fromkeys(("las", "left-anterior-superior"), np.array([-1.0, 1.0, 1.0])),
    **dict.fromkeys(("lps", "left-posterior-superior"), LPS_TO_RAS),
}
_UNPLACED = ("scanner-xyz", "3d-right-handed")  # which ITK takes for LPS
_SPATIAL = ("domain", "space")  # kinds of axes


def read_nrrd(file: Path, dtype: DTypeLike | None) -> Volume:
    """Reads a file, or a header and the file of voxels that it names.

    Raises:
        ValueError: The content is not what it should be.
        OSError: A file cannot be read.
    """
    content = read_whole(file, max_bytes=available_memory())
    if not content.startswith(b"NRRD000"):
        raise ValueError(f"its {len(content)} bytes do not begin as NRRD does")
    fields, keys, data = _header(content)
    sizes = whole_numbers("sizes", fields.get("sizes", ""), low=0, high=2**40)
    if len(sizes) > MAX_AXES or fields.get("dimension") != str(len(sizes)):
        raise ValueError(f"its 'dimension' is {shown(fields.get('dimension'))} but that of {len(sizes)} sizes")
    channels = _channel_axis(fields, len(sizes))
    if channels is not None and any(key.startswith("Segment0_") for key in keys):
        text = f"it is a segmentation of {sizes[channels]} layers that overlap"
        raise ValueError(f"{text}: export it as a label map, in which a voxel has one value")
    beside = fields.get("datafile")
    if beside is not None:
        data = memoryview(read_beside(file, beside))
    stored = Stored(dtype=_dtype(fields), sizes=sizes, packing=_packing(fields), channels=channels)
    voxels = read_stored(_skipped(data, fields, stored), stored, dtype)
    if len(sizes) - (channels is not None) != 3:
        return Volume(voxels, np.eye(4))  # refused by its shape
    volume = placed(voxels, *_place(fields, channels))
    return volume._replace(odd=(*volume.odd, *_segments(keys)))


def _header(content: bytes) -> tuple[Mapping[str, str], Mapping[str, str], memoryview]:
    """Splits a file into its fields, by names without capitals and blanks, what else it keeps, and its data."""
    ends = [(content.find(blank, 0, MAX_HEADER), len(blank)) for blank in (b"\n\n", b"\r\n\r\n")]
    end, length = min((found for found in ends if found[0] >= 0), default=(len(content), 0))
    fields: dict[str, str] = {}
    keys: dict[str, str] = {}
    for line in lines_of(content[: min(end, MAX_HEADER)])[1:]:
        key, is_key, value = line.partition(":=")
        name, is_field, text = line.partition(": ")
        if line.startswith("#") or not line.strip():
            continue
        if is_field and (not is_key or len(name) < len(key)):
            name = name.replace(" ", "").lower()
            if name in fields:
                raise ValueError(f"its header has {name!r} twice")
            fields[name] = text.strip()
        elif is_key:
            keys[key] = value
        elif not line.rstrip().endswith(":"):  # a field without a value
            raise ValueError(f"its header has a line {shown(line)}")
    return fields, keys, memoryview(content)[end + length :]


def _segments(keys: Mapping[str, str]) -> list[str]:
    """Says what 3D Slicer calls the values of a segmentation: it counts them in each file for itself."""
    values = {name.removesuffix("_LabelValue"): value for name, value in keys.items() if name.endswith("_LabelValue")}
    named = [f"{shown(keys.get(f'{segment}_Name', ''))} {value}" for segment, value in values.items()]
    return [f"calls its values {', '.join(named)}, by itself: do other files count so too?"] if named else []


def _dtype(fields: Mapping[str, str]) -> np.dtype[Any]:
    name, endian = fields.get("type"), fields.get("endian")
    if name is None or name.lower() not in _TYPES:
        raise ValueError(f"its voxels are of type {shown(name)}, not numbers")
    dtype = np.dtype(_TYPES[name.lower()])
    if dtype.itemsize > 1 and endian not in ("little", "big"):
        raise ValueError(f"its 'endian' is {shown(endian)} but little or big")
    return dtype.newbyteorder(">" if endian == "big" else "<")


def _packing(fields: Mapping[str, str]) -> Any:
    encoding = fields.get("encoding", "").lower()
    if encoding not in _ENCODINGS:
        raise ValueError(f"its encoding is {shown(encoding)}: save it as raw or gzip")
    return _ENCODINGS[encoding]


def _skipped(data: memoryview, fields: Mapping[str, str], stored: Stored) -> memoryview:
    """Returns the data without what is before the voxels, where the header says that something is."""
    if fields.get("lineskip", "0") != "0":
        raise ValueError("lines are to be skipped before its voxels: save it without")
    (skip,) = whole_numbers("byte skip", fields.get("byteskip", "0"), low=-1, high=2**40)
    if skip and stored.packing:
        raise ValueError("bytes are to be skipped before its packed voxels: save it without")
    return data[skip:] if skip >= 0 else last_bytes(data, stored)


def _channel_axis(fields: Mapping[str, str], num_axes: int) -> int | None:
    """Returns the axis that is none of space: by its lack of a direction, by its kind, or the last of four."""
    steps = _vectors(fields.get("spacedirections"))
    kinds = fields.get("kinds", "").split()
    if steps:
        channels = [axis for axis, step in enumerate(steps) if step is None]
    elif len(kinds) == num_axes:
        channels = [axis for axis, kind in enumerate(kinds) if kind.lower() not in _SPATIAL and kind != "???"]
    else:
        channels = []
    if len(channels) > 1:
        raise ValueError(f"it has {len(channels)} axes beside those of space: save one file each")
    return channels[0] if channels else 3 if num_axes == 4 else None


def _place(fields: Mapping[str, str], channels: int | None) -> tuple[NDArray[np.float64], str | None]:
    """Returns the affine, and why it is no place in a patient, if it is none."""
    space = fields.get("space")
    _refuse_units(fields)
    if space is None and "spacedimension" not in fields:
        if {"axismins", "axismaxs"} & set(fields):
            raise ValueError("its 'axis mins' and 'axis maxs' place it in no space: save it with 'space directions'")
        count = 3 if channels is None else 4
        sizes = numbers("spacings", fields["spacings"], count=count) if "spacings" in fields else [1.0] * count
        steps = np.diag([size for axis, size in enumerate(sizes) if axis != channels])
        return affine_of(steps, (0, 0, 0), LPS_TO_RAS), "states no space"
    if space is not None and space.lower() not in (*_TO_RAS, *_UNPLACED):
        raise ValueError(
            f"its space is {shown(space)}, in which nothing has a place in a patient: save it in LPS or RAS"
        )
    vectors = [step for step in _vectors(fields.get("spacedirections")) or () if step is not None]
    origin = (_vectors(fields["spaceorigin"]) or [None])[0] if "spaceorigin" in fields else [0.0] * len(vectors)
    num = len(vectors)
    if num not in (3, 4) or origin is None or any(len(vector) != num for vector in (*vectors, origin)):
        given = f"{shown(fields.get('spacedirections'))} from {shown(fields.get('spaceorigin'))}"
        raise ValueError(f"its 'space directions' and 'space origin' are {given} but three vectors, and a place")
    steps = within_space(np.array(vectors).T)
    to_ras = _TO_RAS.get((space or "").lower())
    if to_ras is None:
        named = f"is in the space {shown(space)}" if space else "states no space by name"
        return affine_of(steps, origin[:3], LPS_TO_RAS), f"{named}, which is none of a patient"
    return affine_of(steps, origin[:3], to_ras), None if "spaceorigin" in fields else "states no origin"


def _refuse_units(fields: Mapping[str, str]) -> None:
    """Refuses units that ITK's programs do not look at: they would take centimetres for millimetres."""
    for field in ("spaceunits", "units"):
        named = set(fields.get(field, "").replace('"', " ").split()) - {
            "mm",
            "millimeter",
            "millimeters",
            "none",
            "???",
        }
        if named:
            raise ValueError(f"it is measured in {', '.join(sorted(named))}, which programs take for mm: save it in mm")


def _vectors(text: str | None) -> list[list[float] | None] | None:
    """Reads vectors, as in "(1,0,0) none (0,1,0)"; None where there is no text, or it is something else."""
    if text is None:
        return None
    words = text.replace(", ", ",").replace("( ", "(").replace(" )", ")").split()
    found: list[list[float] | None] = []
    for word in words:
        if word.lower() == "none":
            found.append(None)
            continue
        try:
            found.append([float(number) for number in word.removeprefix("(").removesuffix(")").split(",")])
        except ValueError:
            return None
    return found
