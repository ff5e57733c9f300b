"""A folder of DICOM slices to one volume: ordered by place, and refused where slices do not make a grid.

Names and numbers of files tell nothing of the order, and programs that place a series by its first and last file alone
get another spacing where one is missing, and another place where the gantry was tilted. So the places of all slices
are compared. Source: DICOM PS3.3, section C.7.6.2 (image plane); lengths are in mm, directions lead left, back and top.
"""

import math
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dstlib.bounds import available_memory
from dstlib.errors import shown
from dstlib.files import open_file, read_whole
from dstlib.zoo.e2enet.data.layouts.files import DICOM_ENDINGS, PREAMBLE, begins_as_dicom, files_below
from dstlib.zoo.e2enet.data.scans.gdcm import MEMORY, PER_PIXEL, decoder
from dstlib.zoo.e2enet.data.scans.geometry import Volume
from dstlib.zoo.e2enet.data.scans.places import MAX_SHIFT
from dstlib.zoo.e2enet.data.scans.stored import LPS_TO_RAS, affine_of
from dstlib.zoo.e2enet.data.scans.unpacking import refuse_memory

_CLASS, _SYNTAX = 2, 16  # elements of what a file says first
_STORAGE = "1.2.840.10008.5.1.4.1.1."
_SLICES = tuple(_STORAGE + kind for kind in ("2", "4", "128"))  # CT, MRI, PET
_CAPTURE = _STORAGE + "7"  # as what programs write slices that they have made
_FRAMES = tuple(_STORAGE + kind for kind in ("2.1", "2.2", "4.1", "4.4", "20", "128.1", "130"))
_KNOWN = "1.2.840.10008."  # what all classes begin with
_OTHERS = {  # by the beginnings of their classes
    "1.2.840.10008.1.3.10": "DICOMDIR",
    _STORAGE + "66.": "segmentation",
    _STORAGE + "481.": "radiotherapy object",
    _STORAGE + "88.": "report",
    _STORAGE + "11.": "presentation state",
    _CAPTURE: "secondary capture",
}
_UNPACKED = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1")  # transfer syntaxes of little endian
_PIXELS = b"\xe0\x7f\x10\0"  # the tag that they lie behind
_LONG = (b"OB", b"OW", b"UN", b"UT", b"SQ")  # elements whose lengths take four bytes
_TAGS = {
    "type": "0008|0008",
    "modality": "0008|0060",
    "thickness": "0018|0050",
    "series": "0020|000e",
    "number": "0020|0011",
    "position": "0020|0032",
    "orientation": "0020|0037",
    "samples": "0028|0002",
    "colours": "0028|0004",
    "frames": "0028|0008",
    "rows": "0028|0010",
    "columns": "0028|0011",
    "bits": "0028|0100",
    "spacing": "0028|0030",
}
# How many numbers a slice needs of each.
_COUNTS = {"position": 3, "orientation": 6, "spacing": 2, "rows": 1, "columns": 1, "bits": 1}
_ONLY = {"samples": "1", "colours": "MONOCHROME2", "frames": "1"}  # that a slice may say
_ROUNDED = 1e-3  # by which directions may miss the length of 1 or a right angle: some are written in few digits
_EQUAL = 1e-4  # by which those of two slices may differ: 0.05 mm at the far side of 500


@dataclass(frozen=True, kw_only=True, eq=False)
class Slice:
    """What the header of one file says: whose series it is, and where its picture lies.

    - ``shape``: rows, columns, which take ``num_bytes`` unless packed; ``spacing``: between rows, between columns.
    - ``position``: of the first pixel; ``along``, ``down``: the directions in which columns and rows are counted.
    - ``thickness``: None where nothing is said of it.
    """

    file: Path
    series: str
    told: str
    shape: tuple[int, int]
    num_bytes: int
    spacing: tuple[float, float]
    position: NDArray[np.float64]
    along: NDArray[np.float64]
    down: NDArray[np.float64]
    thickness: float | None = None


def read_series(folder: Path, dtype: DTypeLike | None) -> Volume:
    """Reads the one series of slices that lies in a folder, or below it; as float32, whatever ``dtype`` is.

    Raises:
        ValueError: There is none, or there are several, or its slices do not make a grid.
        OSError: A file cannot be read.
    """
    files, left_out = _files(folder)
    with decoder() as process:
        tags = {file: process.tags(file, _TAGS) for file in files}
        scouts = [file for file in files if "LOCALIZER" in tags[file].get("type", "")]
        left_out["localizer"] = len(scouts)
        slices = [_slice(file, tags[file]) for file in files if file not in scouts]
        _refuse_several(slices, left_out)
        ordered, affine = place(slices)
        rows, columns = slices[0].shape
        refuse_memory(MEMORY + rows * columns * (PER_PIXEL + 4 * len(slices)))
        voxels = np.empty((len(slices), rows, columns), np.float32)
        for at, each in enumerate(ordered):
            _refuse_length(each)
            voxels[at] = process.pixels(each.file, each.shape)
    listed = _listed(left_out)
    return Volume(voxels.T, affine, (f"leaves out what is no slice of it: {listed}",) if listed else ())


def place(slices: Sequence[Slice]) -> tuple[list[Slice], NDArray[np.float64]]:
    """Orders slices along their normal, and finds the affine, to RAS+, of the grid that they make.

    Raises:
        ValueError: They differ in size or direction, two lie at one place, one is missing, or they lie on a slant.
    """
    first = slices[0]
    for other in slices:
        axes = np.abs([other.along - first.along, other.down - first.down]).max() <= _EQUAL
        pixels = other.shape == first.shape and np.allclose(other.spacing, first.spacing, rtol=_EQUAL, atol=0)
        if not (axes and pixels):
            what = "pixels" if axes else "directions"
            raise ValueError(f"its slices {first.file.name} and {other.file.name} are of different {what}")
    along, down = first.along, first.down
    lengths = [float(np.linalg.norm(along)), float(np.linalg.norm(down))]
    if max(float(abs(along @ down)), abs(lengths[0] - 1), abs(lengths[1] - 1)) > _ROUNDED:
        raise ValueError(f"{first.file.name} has directions that are not of length 1, at a right angle")
    along, down = along / lengths[0], down / lengths[1]
    normal = np.cross(along, down)
    ordered = [slices[i] for i in np.argsort([each.position @ normal for each in slices], kind="stable")]
    moves = np.array([each.position - ordered[0].position for each in ordered])
    heights = moves @ normal
    step = _step(ordered, heights)
    slant = np.linalg.norm(moves - heights[:, None] * normal, axis=1)
    if slant.max() > MAX_SHIFT * min(first.spacing):
        angle = np.degrees(np.arctan2(slant[-1], heights[-1]))
        text = f"its slices lie on a slant of {angle:.3g}°, the last one {slant[-1]:.3g} mm beside the first"
        raise ValueError(f"{text} (tilted gantry): convert it by dcm2niix, and take the file named _Tilt_1")
    steps = np.stack([along * first.spacing[1], down * first.spacing[0], normal * step], axis=1)
    return ordered, affine_of(steps, ordered[0].position, LPS_TO_RAS)


def _step(ordered: Sequence[Slice], heights: NDArray[np.float64]) -> float:
    """Returns the distance from slice to slice, if it is the same from first to last."""
    if len(ordered) == 1:
        if not ordered[0].thickness:
            raise ValueError("it is one slice, of no thickness")
        return ordered[0].thickness
    steps = np.diff(heights)
    step, at = float(heights[-1]) / len(steps), int(np.argmax(steps))
    if not steps.min() > MAX_SHIFT * steps.max():  # so written, nothing but equal places is refused too
        twice = steps <= MAX_SHIFT * steps.max()
        names = " and ".join(each.file.name for each in ordered[int(np.argmax(twice)) :][:2])
        text = f"it has {int(twice.sum())} slice(s) at the place of another one ({names}, say)"
        raise ValueError(f"{text}: put times, echoes or copies into folders of their own")
    if np.abs(heights - step * np.arange(len(ordered))).max() > MAX_SHIFT * step:
        between = f"{ordered[at].file.name} and {ordered[at + 1].file.name}"
        text = f"its {len(ordered)} slices are from {steps.min():.4g} to {steps.max():.4g} mm apart"
        raise ValueError(f"{text}, the farthest {between}: restore the slices that are missing")
    return step


def _files(folder: Path) -> tuple[list[Path], Counter[str]]:
    """Lists the files of slices, and counts what else there is, by what it is."""
    below = sorted(file for file in files_below(folder) if file.is_file())
    kinds = {file: _meta(file).get(_CLASS, "") for file in below if begins_as_dicom(file)}
    foreign = [file for file in below if file not in kinds and file.suffix.lower() in DICOM_ENDINGS]
    foreign += [file for file, kind in kinds.items() if not kind.startswith(_KNOWN)]
    if foreign:
        raise ValueError(f"{len(foreign)} file(s) of it do not begin as DICOM does ({foreign[0].name}, say)")
    if frames := [file for file, kind in kinds.items() if kind in _FRAMES]:
        raise ValueError(f"{frames[0].name} holds many frames: convert it by dcm2niix, or to a file per slice")
    slices = [file for file, kind in kinds.items() if kind in _SLICES]
    slices = slices or [file for file, kind in kinds.items() if kind == _CAPTURE]
    chosen = {*slices}
    others = Counter(_kind(kind) for file, kind in kinds.items() if file not in chosen)
    others["foreign file"] = len(below) - len(kinds)
    return slices, others


def _meta(file: Path) -> dict[int, str]:
    """Returns what a file says first of all, by the number of each element: 2 is the class, 16 how it is packed."""
    with open_file(file) as opened:
        content = opened.read(2**12)
    at, found = PREAMBLE + 4, {}
    while len(content) >= at + 12:
        group, element, kind, length = struct.unpack_from("<HH2sH", content, at)
        at += 8
        if group != 2:
            break
        if kind in _LONG:
            (length,) = struct.unpack_from("<I", content, at)
            at += 4
        found[element] = content[at : at + length].strip(b"\0 ").decode("ascii", "replace")
        at += length
    return found


def _kind(sop_class: str) -> str:
    return next((kind for start, kind in _OTHERS.items() if sop_class.startswith(start)), "other object")


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}(s)" for kind, count in counts.items() if count)


def _slice(file: Path, tags: Mapping[str, str]) -> Slice:
    """Reads the header of a slice."""
    if "MOSAIC" in tags.get("type", ""):
        raise ValueError(f"{file.name} is a mosaic of several slices: convert it by dcm2niix")
    for name, only in _ONLY.items():
        if tags.get(name, only) != only:
            raise ValueError(f"{file.name} has {name} {shown(tags[name])}, but a slice has {only}")
    numbers = {name: _numbers(tags.get(name, "")) for name in (*_COUNTS, "thickness")}
    for name, count in _COUNTS.items():
        if len(numbers[name]) != count:
            raise ValueError(f"{file.name} has {name} {shown(tags.get(name))}, but a slice has {count} number(s)")
    if min(numbers["spacing"]) <= 0 or min(numbers["rows"] + numbers["columns"]) < 1:
        given = f"{tags['rows']} × {tags['columns']} of {numbers['spacing']} mm"
        raise ValueError(f"{file.name} has pixels of no size, or none: {given}")
    return Slice(
        file=file,
        series=tags.get("series", ""),
        told=f"{tags.get('modality', '?')} {tags.get('number', '?')}",
        shape=(int(numbers["rows"][0]), int(numbers["columns"][0])),
        num_bytes=math.ceil(math.prod(numbers[name][0] for name in ("rows", "columns", "bits")) / 8),
        spacing=(numbers["spacing"][0], numbers["spacing"][1]),
        position=np.array(numbers["position"]),
        along=np.array(numbers["orientation"][:3]),
        down=np.array(numbers["orientation"][3:]),
        thickness=next((size for size in numbers["thickness"] if size > 0), None),
    )


def _refuse_length(each: Slice) -> None:
    """Refuses a picture that is not packed, and of another length than its header says: GDCM would make up the rest."""
    if _meta(each.file).get(_SYNTAX) not in _UNPACKED:
        return
    content = read_whole(each.file, max_bytes=available_memory())
    lengths = {each.num_bytes, each.num_bytes + each.num_bytes % 2}  # an even one
    ends = [struct.pack("<I", length) for length in lengths if length <= len(content)]
    if not any(_PIXELS + kind + end in content for kind in (b"", b"OW\0\0", b"OB\0\0") for end in ends):
        text = f"{each.file.name} does not hold the {each.num_bytes} bytes of pixels that its header promises"
        raise ValueError(text)


def _numbers(text: str) -> list[float]:
    """Reads numbers with backslashes between; none where one of them is no finite number."""
    try:
        found = [float(word) for word in text.split("\\")]
    except ValueError:
        return []
    return found if all(map(math.isfinite, found)) else []


def _refuse_several(slices: Sequence[Slice], left_out: Mapping[str, int]) -> None:
    """Refuses what is not one series: which one is meant, only its owner knows."""
    if not slices:
        raise ValueError(f"it holds no slices of CT, MRI or PET, but {_listed(left_out) or 'nothing'}")
    counts = Counter(each.series for each in slices)
    if len(counts) > 1:
        told = {each.series: each.told for each in slices}
        listed = ", ".join(f"{told[series]} of {count} slice(s)" for series, count in counts.items())
        raise ValueError(f"it holds {len(counts)} series ({listed}): put each into a folder of its own")
