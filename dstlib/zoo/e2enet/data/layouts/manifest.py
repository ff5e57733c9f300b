"""Which files make a data set: what every layout is read into, before any voxel is."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dstlib.errors import DataError, require

MAX_CLASSES = 255  # a label is a byte, and 0 is the background


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

    @property
    def cases(self) -> tuple[CaseFiles, ...]:
        """All cases, with and without labels."""
        return self.train + self.validation + self.test


def refuse_copies(folder: Path, cases: Iterable[CaseFiles]) -> None:
    """Refuses a set in which two cases share a name.

    Raises:
        DataError: The message lists every such name.
    """
    numbers = Counter(case.name for case in cases)
    given = ", ".join(f"{name} {n} times" for name, n in sorted(numbers.items()) if n > 1)
    allowed = "one case per name, over training, validation and test"
    remedy = "Rename or remove the copies (.nii beside .nii.gz, say): folds are drawn over names."
    where = f"data set {folder}"
    require(not given, "case names", where, allowed=allowed, given=given, remedy=remedy, error=DataError)
