"""Reading a data set in the layout of the Medical Segmentation Decathlon.

A folder holds dataset.json (modality, labels, training list) and the NIfTI files that it lists. Only listed
files are opened, so whatever else lies there (macOS "._" files, say) does no harm.
"""

import gzip
import json
import zlib
from collections import Counter
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import nibabel
import numpy as np
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray
from tqdm import tqdm

from dstlib.errors import DataError, explain
from dstlib.zoo.e2enet.data.cases import Case, Cases

# What nibabel, gzip and numpy raise on a file that is foreign, empty, truncated or of no number type.
UNREADABLE = (OSError, EOFError, zlib.error, ImageFileError, HeaderDataError, ValueError, TypeError)

# Headers written by different programs differ by rounding. Under a tenth of a voxel that moves no label to
# another voxel; a real mismatch (another origin, a flip, another spacing) is a whole voxel at some corner.
MAX_SHIFT = 0.1  # voxels


class Defect(NamedTuple):
    """What is wrong with one case."""

    case: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The part of dataset.json that reading needs: its files are (case name, image, label)."""

    name: str
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    files: tuple[tuple[str, Path, Path], ...]


@dataclass(frozen=True)
class Volume:
    """One NIfTI file: voxels in its own (x, y, z[, channel]) order, and the affine to millimetres."""

    voxels: NDArray[Any]
    affine: NDArray[np.float64]


def read_decathlon(path: str | Path, *, progress: bool = True) -> Cases:
    """Reads every case of the training list into memory, as float32 images and uint8 labels.

    NIfTI's (x, y, z[, channel]) becomes (channel, D, H, W) = (channel, z, y, x), the spacing with it. Labels
    stored as floats are cast where they are whole numbers; a label without foreground is legal. The whole
    set is checked before anything is returned, and all its defects are reported in one error.

    Raises:
        DataError: dataset.json or any case cannot be used; the message lists every defect.

    Reference: Antonelli et al., *The Medical Segmentation Decathlon* (Nature Communications 2022).

    >>> read_decathlon("no/such/folder")
    Traceback (most recent call last):
    dstlib.errors.DataError: data set of no/such/folder: expected a folder with a dataset.json, got ...
    """
    folder = Path(path)
    manifest = _read_manifest(folder)
    copies = Counter(name for name, _, _ in manifest.files)
    defects = [Defect(name, f"listed {n} times under 'training'") for name, n in copies.items() if n > 1]
    cases = []
    for name, image, label in tqdm(manifest.files, f"reading {manifest.name}", unit="case", disable=not progress):
        case, found = _read_case(name, image, label, manifest)
        defects += found
        if case is not None:
            cases.append(case)
    if defects:
        _refuse(folder, defects, num_cases=len(manifest.files))
    return Cases(manifest.name, manifest.channels, manifest.classes, tuple(cases))


def _refuse(folder: Path, defects: list[Defect], *, num_cases: int) -> NoReturn:
    width = max(len(d.case) for d in defects)
    table = "\n".join(f"  {d.case:<{width}}  {d.text}" for d in defects)
    num_bad = len({d.case for d in defects})
    message = explain(
        "data set",
        str(folder),
        allowed="cases whose image and label are readable and fit each other",
        given=f"{len(defects)} defect(s) in {num_bad} of {num_cases} cases",
        remedy="Repair or restore these files, or remove the cases from 'training' in dataset.json:",
    )
    raise DataError(f"{message}\n{table}")


def _read_manifest(folder: Path) -> Manifest:
    file = folder / "dataset.json"
    if not file.is_file():
        raise DataError(
            explain(
                "data set",
                str(folder),
                allowed="a folder with a dataset.json",
                given="no dataset.json in it" if folder.is_dir() else "a file" if folder.exists() else "no such folder",
                remedy="Pass the folder that holds dataset.json, imagesTr and labelsTr.",
            )
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        _refuse_manifest(file, allowed="valid JSON", given=str(error))
    if wrong := _wrong_entries(content):
        _refuse_manifest(file, allowed="the Decathlon's entries", given="; ".join(wrong))
    files = tuple((_case_name(e["image"]), folder / e["image"], folder / e["label"]) for e in content["training"])
    modality, labels = content["modality"], content["labels"]
    return Manifest(
        name=str(content.get("name", folder.name)),
        channels=tuple(str(modality[key]) for key in sorted(modality, key=int)),
        classes=tuple(str(labels[str(i)]) for i in range(1, len(labels))),
        files=files,
    )


def _refuse_manifest(file: Path, *, allowed: str, given: str) -> NoReturn:
    remedy = "Restore the file from the data set's archive, or correct it by hand."
    raise DataError(explain("content", str(file), allowed=allowed, given=given, remedy=remedy))


def _wrong_entries(content: object) -> list[str]:
    """What dataset.json lacks, in words."""
    if not isinstance(content, dict):
        return [f"a JSON {type(content).__name__} where an object belongs"]
    wrong = []
    for key, example in (("modality", '{"0": "CT"}'), ("labels", '{"0": "background", "1": "liver"}')):
        table = content.get(key)
        numbers = [str(i) for i in range(len(table))] if isinstance(table, dict) else []
        if not isinstance(table, dict) or not table or set(table) != set(numbers):
            wrong.append(f"{key!r} is {table!r} but numbers its names from 0, as in {example}")
        elif len(table) > 256:
            wrong.append(f"{key!r} has {len(table)} entries, but a label is a byte: 256 at most")
    training = content.get("training")
    if not isinstance(training, list) or not training:
        wrong.append(f"'training' is {training!r} but lists at least one case")
        return wrong
    for i, entry in enumerate(training):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("image", "label")):
            wrong.append(f"entry {i} of 'training' is {entry!r} but names an 'image' and a 'label'")
    return wrong


def _case_name(image: str) -> str:
    return Path(image).name.removesuffix(".gz").removesuffix(".nii")


def _read_case(name: str, image: Path, label: Path, manifest: Manifest) -> tuple[Case | None, list[Defect]]:
    """The case, or else what is wrong with it."""
    picture, mask = _read_volume(image), _read_volume(label)
    if isinstance(picture, str) or isinstance(mask, str):
        opened = ((image, picture), (label, mask))
        return None, [Defect(name, f"{file} {reason}") for file, reason in opened if isinstance(reason, str)]
    texts = [f"{image} {t}" for t in _image_defects(picture, len(manifest.channels))]
    texts += [f"{label} {t}" for t in _label_defects(mask, len(manifest.classes))]
    texts += [f"{label} {t}" for t in _mismatches(picture, mask)]
    if texts:
        return None, [Defect(name, text) for text in texts]
    voxels = picture.voxels if picture.voxels.ndim == 4 else picture.voxels[..., None]
    sizes = voxel_sizes(picture.affine)
    case = Case(
        name,
        image=np.ascontiguousarray(voxels.T, dtype=np.float32),
        label=np.ascontiguousarray(mask.voxels.T.astype(np.uint8)),
        spacing=(float(sizes[2]), float(sizes[1]), float(sizes[0])),
        orientation="".join(nibabel.aff2axcodes(picture.affine))[::-1],
    )
    return case, []


def _read_volume(file: Path) -> Volume | str:
    """The volume, or else why there is none."""
    try:
        if file.suffix == ".gz":
            with gzip.open(file) as stream:  # to the very end, where the checksum is: nibabel stops short of it
                while stream.read(1 << 20):
                    pass
        nifti = nibabel.load(file)
        voxels = np.asanyarray(nifti.dataobj)
    except FileNotFoundError:
        return "is missing"
    except UNREADABLE as error:
        return f"cannot be read: {error}"
    if not isinstance(nifti, nibabel.Nifti1Image):
        return f"is a {type(nifti).__name__}, not a NIfTI file"
    if voxels.dtype.kind not in "buif":
        return f"has voxels of type {voxels.dtype}, not numbers"
    return Volume(voxels, nifti.affine)


def _image_defects(image: Volume, num_channels: int) -> list[str]:
    texts = []
    given = image.voxels.shape[3] if image.voxels.ndim == 4 else 1
    if image.voxels.ndim not in (3, 4):
        texts.append(f"has shape {image.voxels.shape}, but an image is (x, y, z) or (x, y, z, channel)")
    elif given != num_channels:
        texts.append(f"has {given} channel(s), but dataset.json names {num_channels} under 'modality'")
    with np.errstate(over="ignore"):  # beyond float32 is reported here, not warned of
        num_bad = int(np.count_nonzero(~np.isfinite(image.voxels.astype(np.float32))))
    if num_bad:
        texts.append(f"has {num_bad} voxel(s) that are NaN, infinite or beyond float32")
    sizes = voxel_sizes(image.affine)
    if not (np.isfinite(image.affine).all() and (sizes > 0).all()):
        texts.append(f"has voxels of {sizes.tolist()} mm, but sizes are positive and finite")
    return texts


def _label_defects(label: Volume, num_classes: int) -> list[str]:
    values = np.unique(label.voxels)
    fractions = values[values != np.floor(values)]  # NaN differs from itself, so it counts
    if len(fractions):
        return [f"has values that are not whole numbers: {_listed(fractions)}"]
    foreign = values[(values < 0) | (values > num_classes)]
    if len(foreign):
        return [f"has values {_listed(foreign)}, but dataset.json numbers its classes 0 to {num_classes}"]
    return []


def _listed(values: NDArray[Any]) -> str:
    return ", ".join(f"{v:g}" for v in values[:5]) + (", ..." if len(values) > 5 else "")


def _mismatches(image: Volume, label: Volume) -> list[str]:
    shape = image.voxels.shape[:3]
    if label.voxels.shape != shape:
        return [f"has shape {label.voxels.shape}, but its image has {shape}"]
    if len(shape) != 3:
        return []  # reported of the image already
    corners = np.array(list(product(*((0, n - 1) for n in shape))))
    moved = np.linalg.norm(apply_affine(image.affine, corners) - apply_affine(label.affine, corners), axis=1)
    if not moved.max() <= MAX_SHIFT * voxel_sizes(image.affine).min():  # so written, NaN is refused too
        return [f"lies {moved.max():.3g} mm away from its image: the affines differ by more than rounding"]
    return []
