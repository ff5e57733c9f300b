"""Which files make a data set: what every layout is read into, before any voxel is."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class CaseFiles:
    """The files of one case: one image file per channel or a single one with all of them, and the label if any."""

    name: str
    images: tuple[Path, ...]
    label: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A data set on disk: its cases, what its channels show, its foreground classes (class i has label i + 1).

    ``train`` holds the labelled cases that folds are drawn over, ``validation`` the labelled ones that the data
    set's authors set apart, ``test`` those without labels.
    """

    name: str
    folder: Path
    layout: str
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    train: tuple[CaseFiles, ...]
    validation: tuple[CaseFiles, ...] = ()
    test: tuple[CaseFiles, ...] = ()
