"""Which files make a data set: what every layout is read into, before any voxel is."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from dstlib.errors import DataError

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


def only(manifest: Manifest, pattern: str) -> Manifest:
    """Returns the part of a data set whose names match a glob pattern, as in ``only(manifest, "liver_1*")``.

    Raises:
        DataError: No training case is left.
    """
    return part(manifest, lambda name: fnmatchcase(name, pattern), f"match {pattern!r}")


def part(manifest: Manifest, is_chosen: Callable[[str], bool], which: str) -> Manifest:
    """Returns the part of a data set whose names are chosen; ``which`` ends the sentence "some that ...".

    Raises:
        DataError: No training case is left.
    """
    train, validation, test = (
        tuple(case for case in cases if is_chosen(case.name))
        for cases in (manifest.train, manifest.validation, manifest.test)
    )
    if not train:
        allowed = f"some that {which}"
        given = f"none of {len(manifest.train)}"
        remedy = f"Its names are like {', '.join(case.name for case in manifest.train[:3])}."
        raise DataError.of("training cases", f"data set {manifest.name!r}", allowed=allowed, given=given, remedy=remedy)
    return replace(manifest, train=train, validation=validation, test=test)


def refuse_copies(folder: Path, cases: Iterable[CaseFiles]) -> None:
    """Refuses a set in which two cases share a name.

    Raises:
        DataError: The message lists every such name.
    """
    copies = {name: n for name, n in sorted(Counter(case.name for case in cases).items()) if n > 1}
    if copies:
        raise DataError.of(
            "case names",
            f"data set {folder}",
            allowed="one case per name, over training, validation and test",
            given=", ".join(f"{name} {n} times" for name, n in copies.items()),
            remedy="Rename or remove the copies (.nii beside .nii.gz, say): folds are drawn over names.",
        )
