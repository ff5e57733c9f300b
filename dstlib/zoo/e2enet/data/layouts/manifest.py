"""Which files make a data set: what every layout is read into, before any voxel is."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dstlib.errors import DataError, few, require
from dstlib.zoo.e2enet.data.layouts.labels import ORDINARY, Labels
from dstlib.zoo.e2enet.data.layouts.names import file_name_fault, name_fault, one_file, read_alike, refuse_name

MAX_CLASSES = 255  # a label is a byte, and 0 is the background

Geometry = Literal["itk", "sform", "qform"]  # the rule by which a NIfTI file is placed: see data.scans.header


@dataclass(frozen=True, kw_only=True)
class CaseFiles:
    """The files of one case: one image file per channel or a single one with all of them, and the label if any.

    ``geometry`` is the rule by which their headers are read. ``masks`` are binary files, one per class of the set, that
    make the label together, later classes on top of earlier ones; ``label`` is then the folder that holds them.
    ``patient`` is whom the scan is of, where the name tells it.

    Raises:
        DataError: No file can have its name: prepared arrays and predictions are named by it.

    >>> CaseFiles(name="../a", images=(Path("a.nii.gz"),))
    Traceback (most recent call last):
    dstlib.errors.DataError: name of the case of a.nii.gz: expected a name that a file can have everywhere, got ...
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None = None
    geometry: Geometry = "itk"
    masks: tuple[Path, ...] = ()
    patient: str | None = None

    def __post_init__(self) -> None:
        where = f"the case of {', '.join(str(image) for image in self.images[:1])}"
        refuse_name(self.name, "name", where, fault=file_name_fault)

    @property
    def label_files(self) -> tuple[Path, ...]:
        """The files of the label: one, a mask per class, or none."""
        return self.masks or (() if self.label is None else (self.label,))


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A data set on disk: its cases, what its channels show, its foreground classes, or regions.

    ``labels`` says which values of label files make each of the ``classes``; by default class i has value i + 1.

    ``train`` holds the labelled cases that folds are drawn over, ``validation`` the labelled ones that the data
    set's authors set apart, ``test`` those without labels. ``recognised`` is what its layout was recognised by; none,
    where somebody named it. ``notes`` say what is left out of it and why, and where a number of cases was promised
    that are not there. ``folds`` are the names held out in each, if the set itself says so.

    Raises:
        DataError: Its name is none that a folder can have, a class or a channel cannot be printed, two classes or two
            cases share a name, there are other classes than the labels make.
    """

    name: str
    folder: Path
    layout: str
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    train: tuple[CaseFiles, ...]
    validation: tuple[CaseFiles, ...] = ()
    test: tuple[CaseFiles, ...] = ()
    labels: Labels = ORDINARY
    recognised: str = ""
    notes: tuple[str, ...] = ()
    folds: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        where = f"data set {self.folder}"
        if self.labels == ORDINARY:
            object.__setattr__(self, "labels", Labels.consecutive(len(self.classes)))  # as it is frozen
        num_classes, named, remedy = self.labels.num_classes, len(self.classes), "Name each class, or region, once."
        fits, allowed = named == num_classes, f"{num_classes}, as many as the labels make"
        require(fits, "classes", where, allowed=allowed, given=named, remedy=remedy, error=DataError)
        refuse_name(self.name, "name", where, fault=file_name_fault)
        for what, names in (("class", self.classes), ("channel", self.channels)):
            for name in names:
                refuse_name(name, what, where, fault=name_fault)
        alike, allowed = few(read_alike(self.classes)), "each name once"
        remedy = "Rename one: scores are kept, and read, by the names of classes."
        require(not alike, "classes", where, allowed=allowed, given=alike, remedy=remedy, error=DataError)
        refuse_copies(self.folder, self.cases)

    @property
    def cases(self) -> tuple[CaseFiles, ...]:
        """All cases, with and without labels."""
        return self.train + self.validation + self.test

    @property
    def guess(self) -> tuple[str, ...]:
        """Says which layout was recognised, by what, and how another is chosen; nothing where it was named."""
        told = f"Layout {self.layout}, recognised by {self.recognised}; --layout chooses another."
        return (told,) if self.recognised else ()

    def told(self) -> tuple[str, ...]:
        """Returns the lines that whoever uses the set should read first: the guess, if there was any, and the notes."""
        return (*self.guess, *(f"Note: {note}" + "." * (not note.endswith("?")) for note in self.notes))

    def placed_by(self, geometry: Geometry) -> "Manifest":
        """Returns the same set, but that headers are read by this rule."""
        parts = (self.train, self.validation, self.test)
        train, validation, test = (tuple(replace(case, geometry=geometry) for case in part) for part in parts)
        return replace(self, train=train, validation=validation, test=test)


def refuse_copies(folder: Path, cases: Iterable[CaseFiles]) -> None:
    """Refuses a set in which two cases share a name, or would be one file where capitals are not told apart.

    Raises:
        DataError: The message lists every such name.
    """
    alike: dict[str, list[str]] = {}
    for case in cases:
        alike.setdefault(one_file(case.name), []).append(case.name)
    given = few([_told(sorted(names)) for _, names in sorted(alike.items()) if len(names) > 1])
    allowed = "one case per name, over training, validation and test"
    remedy = "Rename or remove the copies (.nii beside .nii.gz, say): folds are drawn over names, and files have them."
    where = f"data set {folder}"
    require(not given, "case names", where, allowed=allowed, given=given, remedy=remedy, error=DataError)


def _told(names: list[str]) -> str:
    return f"{names[0]} {len(names)} times" if len(set(names)) == 1 else " beside ".join(names)
