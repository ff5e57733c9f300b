"""Scans to arrays, and labels to NIfTI files: every defect found, every number kept.

Files of NIfTI are read here, those of other formats by what :mod:`~dstlib.zoo.e2enet.data.scans.formats` finds.

A file's (x, y, z[, channel]) becomes (channel, D, H, W) = (channel, z, y, x), and nothing else changes: that is
the stored order. Shapes: C channels, D, H, W as stored.
"""

import gzip
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import nibabel
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import DTypeLike, NDArray

from dstlib.bounds import available_memory
from dstlib.errors import DataError, number_of
from dstlib.files import read_whole, write_whole
from dstlib.report import on_one_line
from dstlib.zoo.e2enet.data.cases import Spacing, three
from dstlib.zoo.e2enet.data.layouts.labels import MAX_VALUE, Labels
from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles, Geometry
from dstlib.zoo.e2enet.data.scans.defects import affine_defects, as_label, image_defects, mismatches, voxel_defects
from dstlib.zoo.e2enet.data.scans.formats import other_reader
from dstlib.zoo.e2enet.data.scans.geometry import Volume
from dstlib.zoo.e2enet.data.scans.header import Header, header_at, label_header, read_header
from dstlib.zoo.e2enet.data.scans.places import place_doubts
from dstlib.zoo.e2enet.data.scans.unpacking import first_unpacked, refuse_memory, refuse_ratio, unpacked

# What nibabel, gzip and numpy raise on a file that is foreign, empty, truncated or of no number type.
_UNREADABLE = (OSError, EOFError, zlib.error, ImageFileError, HeaderDataError, ValueError, TypeError, OverflowError)

_HEADER = 540  # bytes of the longer one, that of NIfTI-2
_ANY, _MASK = Labels.consecutive(MAX_VALUE), Labels.consecutive(1)


@dataclass(frozen=True, eq=False)
class Scan:
    """One scan as stored: image (C, D, H, W), label (D, H, W) if asked for.

    ``affine`` takes the file's (x, y, z) voxels to millimetres, towards right, front and top (RAS+); ``header`` is all
    that the image says of its place, if it is NIfTI.
    """

    name: str
    image: NDArray[np.float32]
    label: NDArray[np.uint8] | None
    affine: NDArray[np.float64]
    header: Header | None = None

    @property
    def spacing(self) -> Spacing:
        """Millimetres from voxel to voxel along (D, H, W)."""
        return three(voxel_sizes(self.affine)[::-1].tolist())

    @property
    def place(self) -> Header:
        """What a file of its label is to say of its place: what the image's says."""
        return self.header or header_at(self.affine, three(self.image.shape[:0:-1]))


class Fault(NamedTuple):
    """One file, and what is wrong with it or odd about it."""

    file: Path
    text: str

    def __str__(self) -> str:
        """Returns both on one line, whatever the file is called and its header says."""
        return on_one_line(f"{self.file} {self.text}")


class Examined(NamedTuple):
    """A scan, or the defects that forbid its use; the warnings tell what is legal but odd."""

    scan: Scan | None
    defects: tuple[Fault, ...]
    warnings: tuple[Fault, ...]


def read_scan(files: CaseFiles, *, num_channels: int, labels: Labels | None) -> Scan:
    """Reads one case, and verifies it: checksums to the end, finite voxels, whole and known labels, one place.

    ``labels`` says what the values of its label file mean; with None the image is read alone.

    Raises:
        DataError: The message lists every defect of the case.
    """
    examined = examine_scan(files, num_channels=num_channels, labels=labels)
    if examined.scan is None:
        _refuse(f"case {files.name!r}", examined.defects)
    return examined.scan


def examine_scan(files: CaseFiles, *, num_channels: int, labels: Labels | None) -> Examined:
    """Reads and verifies one case as :func:`read_scan` does, but returns its defects, and warnings too."""
    volumes = {file: _read_volume(file, np.float32, files.geometry) for file in files.images}
    images = {file: volume for file, volume in volumes.items() if isinstance(volume, Volume)}
    faults = [Fault(file, text) for file, text in volumes.items() if isinstance(text, str)]
    if not faults:  # the number of the channels is judged only if all files could be opened
        texts = image_defects([images[file].voxels for file in files.images], num_channels)
        faults = [Fault(files.images[0], text) for text in texts]
    first = next(iter(images.items()), None)
    for file, volume in images.items():
        texts = voxel_defects(volume.voxels) + affine_defects(volume.affine)
        if first is not None and file != first[0]:
            texts += mismatches(volume, first[1], f"its first channel {first[0].name}")
        faults += [Fault(file, text) for text in texts]
    found = _Label(None) if labels is None else _examine_labels(files, first and first[1], labels)
    if faults or found.faults or first is None:
        return Examined(None, (*faults, *found.faults), ())
    image = _stack([images[file].voxels for file in files.images])
    voxels = None if found.volume is None else np.ascontiguousarray(found.volume.voxels.T)
    scan = Scan(files.name, image, voxels, first[1].affine, first[1].header)
    placed = images if found.volume is None else {**images, files.label_files[0]: found.volume}
    return Examined(scan, (), (*_oddities(files, scan, placed, labels), *found.overlaps))


def read_label(path: Path, labels: Labels = _ANY, *, geometry: Geometry = "itk") -> Volume:
    """Reads a label, as bytes (x, y, z); by default the values may be 0 to 255.

    Raises:
        DataError: The file cannot be used.
    """
    volume = _read_volume(path, None, geometry)
    texts = [volume] if isinstance(volume, str) else affine_defects(volume.affine)
    if isinstance(volume, Volume):
        voxels = _without_channel(volume.voxels)
        label = as_label(voxels, labels) if voxels.ndim == 3 else f"has shape {voxels.shape}, not (x, y, z)"
        if not texts and not isinstance(label, str):
            return volume._replace(voxels=label)
        texts += [label] if isinstance(label, str) else []
    _refuse("label", [Fault(path, text) for text in texts])


def read_case_label(files: CaseFiles, labels: Labels) -> Volume:
    """Reads the label of a case, from one file or from a mask per class, as bytes (x, y, z).

    Raises:
        DataError: It has none, or one that cannot be used.
    """
    if files.label is not None and not files.masks:
        return read_label(files.label, labels, geometry=files.geometry)
    found = _examine_labels(files, None, labels)
    if found.volume is None or found.faults:
        _refuse(f"label of case {files.name!r}", found.faults)
    return found.volume


def write_label(path: Path, label: NDArray[np.uint8], place: Header) -> None:
    """Writes a label (D, H, W), in stored order, as .nii.gz: whole or not at all, the same bytes each time.

    ``place`` is that of its image, of which every number is kept, so that every program puts one on the other.

    Raises:
        DataError: The name or the label cannot be written so.
        StateError: The disk is full, say.
    """
    fits = label.dtype == np.uint8 and label.size > 0 and label.shape[::-1] == place.shape
    texts = [] if fits else [f"got {label.dtype} {label.shape} in the place of {place.shape[::-1]}"]
    if not path.name.endswith(".nii.gz"):
        texts.append("has another ending than .nii.gz")
    if texts:
        allowed = "a uint8 label (D, H, W), the place of as many voxels and a .nii.gz"
        remedy = "Pass the label of a prediction, or of a file, and the place that came with its image."
        raise DataError.of("label", str(path), allowed=allowed, given="; ".join(texts), remedy=remedy)
    content = label_header(place) + np.ascontiguousarray(label).tobytes()
    write_whole(path, gzip.compress(content, compresslevel=6, mtime=0))


def _refuse(where: str, faults: Sequence[Fault]) -> NoReturn:
    listed = "".join(f"\n  {fault}" for fault in faults)
    allowed, given = "files that can be read and fit each other", number_of(len(faults), "defect")
    remedy = f"Repair or restore these, or leave the case out:{listed}"
    raise DataError.of("files", where, allowed=allowed, given=given, remedy=remedy)


def _read_volume(file: Path, dtype: DTypeLike | None, geometry: Geometry) -> Volume | str:
    """Reads the volume of a file, or says why there is none."""
    try:
        if reader := other_reader(file):
            return reader(file, dtype)
        content = read_whole(file, max_bytes=available_memory())
        is_packed = file.suffix.lower() == ".gz"
        promised = _promise(first_unpacked(content, _HEADER) if is_packed else content)
        if promised.wrong:
            return promised.wrong
        if is_packed:
            refuse_ratio(content, promised.num_bytes)
        refuse_memory(promised.memory)
        if is_packed:  # to the very end, of which nibabel stops short
            content = unpacked(content, "gzip", promised.num_bytes)
        if len(content) < promised.num_bytes:
            return f"cannot be read: it ends after {len(content)} of {promised.num_bytes} bytes"
        header = read_header(promised.header)
        if header.sform_code <= 0 and not header.is_rotation:
            return f"has a quaternion {header.quaternion} in its qform, which is longer than 1 and no rotation"
        nifti = promised.kind.from_bytes(content)
        with np.errstate(over="ignore"):  # beyond float32 is reported, not warned of
            voxels = np.asanyarray(nifti.dataobj, dtype=dtype)
        return Volume(voxels, header.affine(geometry), header=header)
    except FileNotFoundError:
        return "is missing" + (": variables of the environment stay as they are written" if "$" in str(file) else "")
    except _UNREADABLE as error:
        return f"cannot be read: {error}"


class _Promise(NamedTuple):
    """What the header of a file says that is in it, or what is wrong with that."""

    wrong: str | None = None
    kind: Any = None
    header: Any = None  # of nibabel, as it is stored
    num_bytes: int = 0
    memory: int = 0  # for these bytes, and the voxels made of them


def _promise(content: bytes) -> _Promise:
    """Reads the header that a file, or its beginning, begins with."""
    kinds = (nibabel.Nifti1Image, nibabel.Nifti2Image)
    kind = next((kind for kind in kinds if kind.header_class.may_contain_header(content)), None)
    if kind is None:
        return _Promise(f"cannot be read: its {len(content)} bytes do not begin as NIfTI does")
    header = kind.header_class(content[: kind.header_class.template_dtype.itemsize], check=False)
    try:
        stored, shape = header.get_data_dtype(), header.get_data_shape()
    except KeyError as error:
        return _Promise(f"has voxels of an unknown type, {error}")
    if stored.kind not in "buif":
        return _Promise(f"has voxels of type {stored}, not numbers")
    if any(size < 0 for size in shape):
        return _Promise(f"has shape {shape}")
    num_voxels = math.prod(shape)
    num_bytes = num_voxels * stored.itemsize + header.get_data_offset()
    return _Promise(None, kind, header, num_bytes, num_bytes + num_voxels * max(stored.itemsize, 4))


class _Label(NamedTuple):
    """The label of a case, what is wrong with its files, and where masks overlap."""

    volume: Volume | None
    faults: tuple[Fault, ...] = ()
    overlaps: tuple[Fault, ...] = ()


def _examine_labels(files: CaseFiles, image: Volume | None, labels: Labels) -> _Label:
    """Reads the label of a case, which may be a mask per class; ``image`` is None where it cannot be read."""
    if files.masks:
        return _join_masks(files, image)
    if files.label is None:
        return _Label(None, (Fault(files.images[0], "has no label"),))
    found = _examine_label(files.label, image, labels, files.geometry)
    if isinstance(found, list):
        return _Label(None, tuple(Fault(files.label, text) for text in found))
    return _Label(found)


def _join_masks(files: CaseFiles, image: Volume | None) -> _Label:
    """Joins masks to one label, later classes on top of earlier ones, and counts the voxels that two of them claim."""
    joined: Volume | None = None
    faults, overlaps = [], []
    for number, file in enumerate(files.masks, start=1):
        found = _examine_label(file, image or joined, _MASK, files.geometry)
        if isinstance(found, list):
            faults += [Fault(file, text) for text in found]
        elif joined is None:
            joined = found._replace(voxels=found.voxels * np.uint8(number))
        elif joined.voxels.shape == found.voxels.shape:  # else said already
            inside = found.voxels != 0
            for below, count in zip(*np.unique(joined.voxels[inside], return_counts=True), strict=True):
                if below:
                    told = (
                        f"overlaps {files.masks[below - 1].name}: its {count} voxel(s) there are taken for this class"
                    )
                    overlaps.append(Fault(file, told))
            joined.voxels[inside] = number
    return _Label(joined, tuple(faults), tuple(overlaps))


def _examine_label(file: Path, image: Volume | None, labels: Labels, geometry: Geometry) -> Volume | list[str]:
    """Reads a label, or says what is wrong with it; ``image`` is None if it cannot be read."""
    volume = _read_volume(file, None, geometry)
    if isinstance(volume, str):
        return [volume]
    volume = volume._replace(voxels=_without_channel(volume.voxels))
    label = as_label(volume.voxels, labels)
    texts = [label] if isinstance(label, str) else []
    if volume.voxels.ndim != 3:
        texts.append(f"has shape {volume.voxels.shape}, but a label is (x, y, z)")
    elif image is not None:
        texts += mismatches(volume, image, "its image")
    return texts if texts or isinstance(label, str) else volume._replace(voxels=label)


def _without_channel(voxels: NDArray[Any]) -> NDArray[Any]:
    """Returns (x, y, z) of a label that some program stored as (x, y, z, 1)."""
    return voxels[..., 0] if voxels.ndim == 4 and voxels.shape[3] == 1 else voxels


def _stack(channels: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Joins files (x, y, z[, channel]) to one image (C, D, H, W); a single file, stored x first, is not copied."""
    stored = [voxels.T if voxels.ndim == 4 else voxels.T[None] for voxels in channels]
    return np.ascontiguousarray(stored[0] if len(stored) == 1 else np.concatenate(stored))


def _oddities(files: CaseFiles, scan: Scan, volumes: Mapping[Path, Volume], labels: Labels | None) -> list[Fault]:
    """Lists what is legal, but seldom meant; ``volumes`` are those of the images, and of the label if there is one."""
    odd: list[Fault] = []
    for file, volume in volumes.items():
        doubts = [*volume.odd, *(place_doubts(volume.header, files.geometry) if volume.header else ())]
        told = {fault.text for fault in odd}  # of the image already, that its label lies on
        odd += [Fault(file, text) for text in doubts if text not in told]
    for i, channel in enumerate(scan.image):
        if channel.min() == channel.max():
            odd.append(Fault(files.images[0], f"is constant in channel {i}: every voxel is {channel.flat[0]:g}"))
    for file in dict.fromkeys(files.images):
        if (times := files.images.count(file)) > 1:
            odd.append(Fault(file, f"is {times} of the channels"))
    if scan.label is not None and files.label is not None and labels is not None:
        is_ignored = scan.label == (labels.ignored_number or 0)  # with none, the background
        if is_ignored.all() and labels.ignored is not None:
            odd.append(Fault(files.label, f"is ignored everywhere: each voxel is {labels.ignored}"))
        elif (is_ignored | (scan.label == 0)).all():
            odd.append(Fault(files.label, "has no foreground"))
    return odd
