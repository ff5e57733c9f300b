"""What reads a scan that is not NIfTI: chosen by its ending, or as it is a folder."""

from collections.abc import Callable
from pathlib import Path

from numpy.typing import DTypeLike

from dstlib.zoo.e2enet.data.layouts.files import is_scan_name
from dstlib.zoo.e2enet.data.scans.dicom import read_series
from dstlib.zoo.e2enet.data.scans.geometry import Volume
from dstlib.zoo.e2enet.data.scans.metaimage import read_metaimage
from dstlib.zoo.e2enet.data.scans.nrrd import read_nrrd

Reader = Callable[[Path, DTypeLike | None], Volume]

_BY_ENDING: tuple[tuple[tuple[str, ...], Reader], ...] = (
    ((".nrrd", ".nhdr"), read_nrrd),
    ((".mha", ".mhd"), read_metaimage),
)


def other_reader(file: Path) -> Reader | None:
    """Finds what reads a scan that is not NIfTI; None for what is, or seems to be."""
    if not is_scan_name(file.name) and file.is_dir():
        return read_series
    return next((reader for endings, reader in _BY_ENDING if file.name.lower().endswith(endings)), None)
