"""What reads a scan that is not NIfTI, by its ending or as it is a folder, and of which files a scan consists."""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from numpy.typing import DTypeLike

from dstlib.files import open_file
from dstlib.zoo.e2enet.data.layouts.files import files_below, is_scan_name, path_fault
from dstlib.zoo.e2enet.data.scans.dicom import read_series
from dstlib.zoo.e2enet.data.scans.geometry import Volume
from dstlib.zoo.e2enet.data.scans.metaimage import read_metaimage
from dstlib.zoo.e2enet.data.scans.nrrd import read_nrrd

Reader = Callable[[Path, DTypeLike | None], Volume]

_BY_ENDING: tuple[tuple[tuple[str, ...], Reader], ...] = (
    ((".nrrd", ".nhdr"), read_nrrd),
    ((".mha", ".mhd"), read_metaimage),
)

_HEADER = 2**16  # bytes, in which a header that names a file is whole
_BESIDE = re.compile(rb"^(?:data ?file:|ElementDataFile *=) *(.*?)\r?$", re.IGNORECASE | re.MULTILINE)


def other_reader(file: Path) -> Reader | None:
    """Finds what reads a scan that is not NIfTI; None for what is, or seems to be."""
    if not is_scan_name(file.name) and file.is_dir():
        return read_series
    return next((reader for endings, reader in _BY_ENDING if file.name.lower().endswith(endings)), None)


def parts(scan: Path) -> list[Path]:
    """Lists the files of which a scan consists: itself, or all below a folder, or a header and what voxels it names.

    If one of them changes, it is another scan.
    """
    if scan.is_dir():
        return sorted(files_below(scan))
    beside = None
    if other_reader(scan):
        with suppress(OSError), open_file(scan) as file:
            beside = _BESIDE.search(file.read(_HEADER))
    name = "LOCAL" if beside is None else os.fsdecode(beside[1])
    is_beside = name not in ("", "LOCAL") and path_fault(name, allow_outside=False) is None  # or it is never opened
    return [scan, scan.parent / name] if is_beside else [scan]
