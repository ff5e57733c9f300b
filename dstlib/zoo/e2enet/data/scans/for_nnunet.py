"""What nnU-Net would stop at in a data set, or take otherwise than meant: told before it runs.

It opens .nii.gz, .nrrd and .mha by ITK, .nii by nibabel, and a whole set by nibabel where ITK cannot open the first
image. So do these checks, of headers and of the values of labels.

Reference: nnU-Net 2.8.1: ``verify_dataset_integrity``, ``simpleitk_reader_writer``, ``nibabel_reader_writer``,
``reader_writer_registry`` and ``label_handling``; each text was seen to hold by running it.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from numpy.typing import NDArray
from tqdm import tqdm

from dstlib.errors import StateError, few
from dstlib.zoo.e2enet.data.layouts.files import read_json
from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles, Manifest
from dstlib.zoo.e2enet.data.layouts.source import LIST
from dstlib.zoo.e2enet.data.scans.integrity import WHOLE_SET, Defect

STOPS, WARNS = "nnU-Net stops", "nnU-Net goes on"
MIN_CASES = 5  # for as many folds
_KEYS = ("labels", "channel_names", "numTraining", "file_ending")
_BY_ITK, _BY_NIBABEL = (".nii.gz", ".nrrd", ".mha", ".gipl"), (".nii.gz", ".nii")
_OTHERS = (".png", ".bmp", ".tif", ".tiff")
_CONVERTERS = {"decathlon": "nnUNetv2_convert_MSD_dataset", "nnunet-v1": "nnUNetv2_convert_old_nnUNet_dataset"}
_REFUSED = (RuntimeError, OSError, ValueError, TypeError, ImageFileError)  # of a file that cannot be opened


class _Header(NamedTuple):
    """Where a file lies, as its reader tells it; ``place`` is the origin, or nibabel's affine."""

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    place: tuple[float, ...]
    direction: tuple[float, ...]


class _Reader(NamedTuple):
    """How nnU-Net opens files: their headers, and their voxels."""

    header: Callable[[Path], _Header]
    voxels: Callable[[Path], NDArray[Any]]


def nnunet_warnings(manifest: Manifest, *, progress: bool = True) -> tuple[Defect, ...]:
    """Says what nnU-Net stops at in a set, or does not as meant; each text begins with :data:`STOPS` or :data:`WARNS`.

    It looks into the labelled cases, as nnU-Net does. Files that cannot be read here are left to
    :func:`~dstlib.zoo.e2enet.data.scans.integrity.check`.

    Raises:
        StateError: SimpleITK is not installed.
    """
    if find_spec("SimpleITK") is None:
        remedy = "pip install 'dstlib[itk]', as nnU-Net reads by it."
        raise StateError.of("SimpleITK", "this Python", allowed="one for --for-nnunet", given="none", remedy=remedy)
    file = manifest.folder / LIST
    content = read_json(file) if file.is_file() else {}
    if _is_raw(manifest):
        texts = [*_of_folder(manifest.folder, content), *_of_entries(content), *_of_labels(content)]
    else:
        converter = _CONVERTERS.get(manifest.layout)
        way = f": {converter} converts it" if converter else ", to which nothing of it converts this one"
        texts = [f"{STOPS}: it reads no layout but its own raw data sets{way}"]
    if len(manifest.train) < MIN_CASES:
        texts.append(f"{STOPS} in a training of a fold: {len(manifest.train)} cases make no {MIN_CASES} folds (-f all)")
    found = [Defect(WHOLE_SET, text) for text in texts]
    with _no_warnings_of_itk():
        found += _of_cases(manifest, content, progress=progress)
    return tuple(found)


def _is_raw(manifest: Manifest) -> bool:
    return manifest.layout == "nnunet"


def _of_folder(folder: Path, content: Mapping[str, Any]) -> Iterator[str]:
    name = folder.resolve().name
    if not re.fullmatch(r"Dataset\d{3}_.+", name):
        yield f"{STOPS}: the folder is called {name!r}, but is found by a name like Dataset001_{name}"
    if "dataset" in content or not isinstance(ending := content.get("file_ending"), str) or not ending:
        return
    images = folder / "imagesTr"
    files = [file.name for file in sorted(images.iterdir()) if file.is_file()] if images.is_dir() else []
    taken = [file for file in files if file.endswith(ending)]
    names = sorted({file[: -len(ending) - len("_0000")] for file in taken})
    number = content.get("numTraining", len(names))
    if len(names) != number:
        yield f"{STOPS}: 'numTraining' is {number}, but it finds {len(names)} cases by {ending}: {few(names)}"
    if unlabelled := [name for name in names if not (folder / "labelsTr" / f"{name}{ending}").is_file()]:
        yield f"{STOPS}: imagesTr has what it takes for cases and labelsTr not (hidden files too): {few(unlabelled)}"
    if left := [file for file in files if file not in taken]:
        yield f"{WARNS} without files of imagesTr that do not end in {ending}: {few(left)}"


def _of_entries(content: Mapping[str, Any]) -> Iterator[str]:
    if lacking := [key for key in _KEYS if key not in content]:
        yield f"{STOPS}: dataset.json lacks {', '.join(map(repr, lacking))}"
    ending = str(content.get("file_ending", ".nii.gz"))
    if ending.lower() not in (*_BY_ITK, *_BY_NIBABEL, *_OTHERS):
        known = ", ".join(dict.fromkeys((*_BY_ITK, *_BY_NIBABEL, *_OTHERS)))
        yield f"{STOPS}: 'file_ending' is {ending!r}, but what it reads is {known}"


def _of_labels(content: Mapping[str, Any]) -> Iterator[str]:
    """Says what the table of labels lacks, but for values with gaps: of these the manifest's notes tell."""
    table = content.get("labels", {})
    if "background" not in table:
        yield f"{STOPS}: 'labels' has no 'background', by this name"
    elif table["background"] not in (0, "0"):
        yield f"{STOPS}: the 'background' of 'labels' is {table['background']!r}, not 0"
    if isinstance(ignored := table.get("ignore"), str):
        yield f"{STOPS}: 'ignore' is the text {ignored!r}, but must be a number"


def _of_cases(manifest: Manifest, content: Mapping[str, Any], *, progress: bool) -> list[Defect]:
    found = []
    cases = [case for case in manifest.train if all(file.is_file() for file in _files(case))]
    reader = _reader(manifest, content, cases)
    if reader is None:
        return []
    if reader is _NIBABEL and _is_raw(manifest) and content.get("file_ending") != ".nii":
        first = cases[0].images[0].name
        told = f"{WARNS} with all files read by nibabel, as ITK cannot open the first ({first}): repair its header"
        found.append(Defect(WHOLE_SET, told))
    has_foreground = not cases
    for case in tqdm(cases, "checking for nnU-Net", unit="case", disable=not progress):
        found += [Defect(case.name, text) for text in _of_case(case, reader, is_raw=_is_raw(manifest))]
        voxels = _voxels(case, reader)
        has_foreground |= voxels is None or bool((voxels > 0).any())
        if voxels is not None:
            found += [Defect(case.name, text) for text in _of_values(voxels, manifest.labels.in_files.tolist())]
    if not has_foreground:
        found.append(Defect(WHOLE_SET, f"{STOPS}: no label has any foreground"))
    return found


def _files(case: CaseFiles) -> tuple[Path, ...]:
    return (*case.images, *(() if case.label is None else (case.label,)))


def _of_case(case: CaseFiles, reader: _Reader, *, is_raw: bool) -> Iterator[str]:
    headers: dict[Path, _Header] = {}
    for file in _files(case):
        try:
            headers[file] = reader.header(file)
        except _REFUSED as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            yield f"{STOPS}: it cannot open {file.name}: {reason}"
    if len(headers) < len(_files(case)):
        return
    first = headers[case.images[0]]
    if len(first.spacing) > 3:  # a converter makes a file of each channel
        told = f"{STOPS}: {case.images[0].name} has channels in one file: give each a file of its own"
        yield from [told] * is_raw
        return
    for file in case.images[1:]:
        yield from _differences(first, headers[file], f"{file.name} and its first channel", stops_always=True)
    if case.label is not None:
        yield from _differences(headers[case.label], first, f"{case.label.name} and its image", stops_always=False)


def _differences(a: _Header, b: _Header, names: str, *, stops_always: bool) -> Iterator[str]:
    """Says in what two files differ, which are to lie on one grid; numpy's ``allclose`` is what nnU-Net asks."""
    checks = "" if stops_always else " where it verifies the set"
    if a.shape != b.shape:
        yield f"{STOPS}: {names} have shapes {a.shape} and {b.shape}"
    elif not np.allclose(a.spacing, b.spacing):
        off = max(abs(x / y - 1) for x, y in zip(a.spacing, b.spacing, strict=True))
        yield f"{STOPS}{checks}: the spacings of {names} differ by a share of {off:.2g}, of which 1e-05 is taken"
    elif not np.allclose(a.place, b.place):
        off = float(np.abs(np.subtract(a.place, b.place)).max())
        yield f"{WARNS} with a warning: the places of {names} differ by {off:.3g} mm"
    elif not np.allclose(a.direction, b.direction):
        off = float(np.abs(np.subtract(a.direction, b.direction)).max())
        yield f"{WARNS} with a warning: the directions of {names} differ by {off:.3g}"


def _of_values(voxels: NDArray[Any], expected: Sequence[int]) -> Iterator[str]:
    known = np.zeros(voxels.shape, bool)
    for value in expected:
        known |= voxels == value
    if known.all():
        return
    odd = np.unique(voxels[~known])
    told = few([f"{value:.9g}" for value in odd.tolist()])
    cut = "; unverified it cuts fractions off" if (odd != np.floor(odd)).any() else ""
    yield f"{STOPS} where it verifies the set: the label has values {told}, of which dataset.json knows nothing{cut}"


def _voxels(case: CaseFiles, reader: _Reader) -> NDArray[Any] | None:
    try:
        return None if case.label is None else reader.voxels(case.label)
    except _REFUSED:
        return None


def _reader(manifest: Manifest, content: Mapping[str, Any], cases: Sequence[CaseFiles]) -> _Reader | None:
    """Returns how nnU-Net opens the files of a set; None where by no reader that is known here."""
    asked = content.get("overwrite_image_reader_writer", "None")
    if asked != "None":
        return {"SimpleITKIO": _ITK, "NibabelIO": _NIBABEL}.get(str(asked))
    ending = str(content.get("file_ending", ".nii.gz")).lower() if _is_raw(manifest) else ".nii.gz"
    if ending in _BY_ITK and cases:
        try:
            _ITK.header(cases[0].images[0])
        except _REFUSED:
            return _NIBABEL if ending in _BY_NIBABEL and _is_raw(manifest) else _ITK
        return _ITK
    return _NIBABEL if ending in _BY_NIBABEL else None


def _itk_header(file: Path) -> _Header:
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(file))
    reader.ReadImageInformation()
    return _Header(reader.GetSize(), reader.GetSpacing(), reader.GetOrigin(), reader.GetDirection())


def _itk_voxels(file: Path) -> NDArray[Any]:
    import SimpleITK

    voxels: NDArray[Any] = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file)))
    return voxels.astype(np.float32)


def _nibabel_header(file: Path) -> _Header:
    image: Any = nibabel.load(file)
    if image.ndim != 3:
        raise ValueError(f"it has {image.ndim} axes, of which nibabel's reader takes 3")
    affine = tuple(image.affine.ravel().tolist())
    return _Header(image.shape, tuple(map(float, image.header.get_zooms())), affine, affine)


def _nibabel_voxels(file: Path) -> NDArray[Any]:
    image: Any = nibabel.load(file)
    return np.asarray(image.get_fdata(), np.float32)


_ITK, _NIBABEL = _Reader(_itk_header, _itk_voxels), _Reader(_nibabel_header, _nibabel_voxels)


@contextmanager
def _no_warnings_of_itk() -> Iterator[None]:
    """Keeps ITK from printing what it thinks of headers: all that matters of it is told here."""
    from SimpleITK import ProcessObject

    before = ProcessObject.GetGlobalWarningDisplay()
    ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        ProcessObject.SetGlobalWarningDisplay(before)
