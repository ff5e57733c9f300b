"""What the readers of layouts share: names of cases, the scans of a folder, and dataset.json."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

from dstlib import typed_json
from dstlib.errors import DataError, shown
from dstlib.report import abridge, on_one_line

MAX_PATH_BYTES, MAX_PART_BYTES = 4000, 255  # what Linux takes is the least of all

# NIfTI; NRRD, with 3D Slicer's segmentations and headers that lie beside their voxels; MetaImage.
ENDINGS = (".nii.gz", ".nii", ".seg.nrrd", ".nrrd", ".nhdr", ".mha", ".mhd")

_ENDING = re.compile("(" + "|".join(map(re.escape, ENDINGS)) + ")$", re.IGNORECASE)
DICOM_ENDINGS = (".dcm", ".dicom", ".ima")

_PERHAPS_DICOM = re.compile(r"(^[^.]+|\.\d+)$")  # many have no ending, or that of a UID
PREAMBLE = 128  # bytes before the letters that begin a DICOM file
_REMEDY = "Restore the file from the data set's archive, or correct it by hand."
_CHANNEL = re.compile(r"(.+)_(\d{4})$")


def case_name(file: str | Path) -> str:
    """Returns the name of a scan without folder and ending.

    >>> case_name("./imagesTr/amos_0001.nii.gz"), case_name("scan.v2.NRRD"), case_name("liver.seg.nrrd")
    ('amos_0001', 'scan.v2', 'liver')
    """
    return _ENDING.sub("", Path(file).name)


def is_scan_name(name: str) -> bool:
    """Says whether a name ends as files of scans do.

    >>> is_scan_name("._amos_0001.nii.gz"), is_scan_name("notes.txt")
    (True, False)
    """
    return _ENDING.search(name) is not None


def case_channel(file: str | Path) -> tuple[str, int] | None:
    """Returns the case and the channel that a file name of nnU-Net's form tells; None for another form.

    >>> case_channel("BRATS_001_0003.nii.gz"), case_channel("BRATS_001.nii.gz")
    (('BRATS_001', 3), None)
    """
    match = _CHANNEL.match(case_name(file))
    return (match[1], int(match[2])) if match else None


def subfolders(folder: Path) -> list[Path]:
    """Lists the folders in a folder, sorted, but for hidden ones; none without a folder."""
    if not folder.is_dir():
        return []
    return sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))


def channel_file(file: Path, channel: int) -> Path:
    """Returns the file beside this one that holds a channel, as nnU-Net names it.

    >>> channel_file(Path("imagesTr/BRATS_001.nii.gz"), 3).as_posix()
    'imagesTr/BRATS_001_0003.nii.gz'
    """
    name = case_name(file)
    return file.parent / f"{name}_{channel:04d}{file.name[len(name) :]}"  # a file of no name, too: none has read it yet


def scan_files(folder: Path) -> tuple[Path, ...]:
    """Lists the scans of a folder, sorted: files by their ending, and folders of DICOM slices; none without a folder.

    A folder that holds slices itself is one scan, with all that lies below it. Hidden files are left out: macOS puts a
    "._scan.nii.gz", which is no image, beside every "scan.nii.gz".
    """
    if not folder.is_dir():
        return ()
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    found = [entry for entry in entries if _ENDING.search(entry.name) and entry.is_file()]
    if any(_is_slice(entry) for entry in entries):
        folder = folder.resolve() if folder.name in ("", "..") else folder  # as it names the scan
        return tuple(sorted([folder, *found]))
    return tuple(sorted([*found, *(entry for entry in entries if entry.is_dir() and holds_dicom(entry))]))


def begins_as_dicom(file: Path) -> bool:
    """Says whether the first bytes of a file are DICOM's."""
    with file.open("rb") as opened:
        return opened.read(PREAMBLE + 4)[PREAMBLE:] == b"DICM"


def holds_dicom(folder: Path) -> bool:
    """Says whether DICOM files lie in a folder, or below it."""
    return any(map(_is_slice, files_below(folder)))


def files_below(folder: Path) -> Iterator[Path]:
    """Yields the files that may be slices in a folder, or below it, as series lie in folders of studies and patients.

    Hidden files are left out: whoever looks into a folder on macOS leaves a .DS_Store there.
    """
    return (Path(at, name) for at, _, names in os.walk(folder) for name in names if not name.startswith("."))


def _is_slice(file: Path) -> bool:
    """Says whether a file is DICOM's by its ending, whatever is in it, or by what is in it, where it has none."""
    if file.suffix.lower() in DICOM_ENDINGS:
        return file.is_file()
    return _PERHAPS_DICOM.search(file.name) is not None and file.is_file() and begins_as_dicom(file)


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Words what the system says of a folder that it does not let this process look into.

    Raises:
        DataError: It says so.
    """
    try:
        yield
    except OSError as error:
        allowed, remedy = "a folder that can be read", "Check the path, and who may read there."
        raise DataError.of("data set", str(folder), allowed=allowed, given=error.strerror, remedy=remedy) from error


def by_case(folder: Path, *, prefix: str = "") -> dict[str, list[Path]]:
    """Lists the scans of a folder by their names, from which a prefix is taken.

    There are two of a name where a .nii lies beside a .nii.gz: two cases of one name, which are refused later.
    """
    found: dict[str, list[Path]] = {}
    for file in scan_files(folder):
        found.setdefault(case_name(file).removeprefix(prefix), []).append(file)
    return found


def path_fault(text: str, *, allow_outside: bool) -> str | None:
    """Says why a list may not name a file by this text; None if it may.

    >>> path_fault("./imagesTr/a.nii.gz", allow_outside=False)
    >>> path_fault("imagesTr/../../a.nii.gz", allow_outside=True)
    """
    parts = re.split(r"[/\\]", text)
    if not text.isprintable():
        return "has characters that cannot be printed"
    if len(text.encode()) > MAX_PATH_BYTES or any(len(part.encode()) > MAX_PART_BYTES for part in parts):
        return "is longer than paths can be"
    is_absolute = bool(PurePosixPath(text).anchor or PureWindowsPath(text).anchor)
    if allow_outside or not (is_absolute or ".." in parts):
        return None
    way = "is an absolute path" if is_absolute else "leads up by '..'"
    return f"{way}, and so may leave the folder of the set: allow that (--allow-outside) of a list that you trust"


def read_json(file: Path) -> dict[str, Any]:
    """Reads a dataset.json.

    Raises:
        DataError: It cannot be read, or is no JSON object.
    """
    return typed_json.read_json(file, dict[str, Any], remedy=_REMEDY, foreign=True, error=DataError)


def refuse_json(file: Path, *, allowed: str, wrong: Sequence[str]) -> NoReturn:
    """Refuses a dataset.json, with what is wrong with it.

    Raises:
        DataError: Always.
    """
    if len(wrong) == 1:
        raise DataError.of("content", str(file), allowed=allowed, given=wrong[0], remedy=_REMEDY)
    listed = "".join(f"\n  {on_one_line(line)}" for line in abridge(wrong))
    given, remedy = f"{len(wrong)} faults", f"{_REMEDY}{listed}"
    raise DataError.of("content", str(file), allowed=allowed, given=given, remedy=remedy)


def wrong_name(content: Mapping[str, Any]) -> list[str]:
    """Says whether the name that dataset.json gives a set is none; a set may lack it."""
    name = content.get("name")
    return [] if name is None or isinstance(name, str) else [f"'name' is {shown(name)} but text"]


def numbered(table: object) -> tuple[str, ...] | None:
    """Returns the names of a table that numbers them from 0, in that order; None if it does not.

    >>> numbered({"1": "T1w", "0": "FLAIR"})
    ('FLAIR', 'T1w')
    >>> numbered({"1": "T1w"})
    """
    if not isinstance(table, dict) or not table or set(table) != {str(i) for i in range(len(table))}:
        return None
    names = tuple(table[str(i)] for i in range(len(table)))
    return names if all(isinstance(name, str) for name in names) else None
