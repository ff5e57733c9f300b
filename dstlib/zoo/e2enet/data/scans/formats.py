"""What reads a scan that is not NIfTI: chosen by its ending, or as it is a folder."""

from collections.abc import Callable
from pathlib import Path

from numpy.typing import DTypeLike

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
    return next((reader for endings, reader in _BY_ENDING if file.name.lower().endswith(endings)), None)
