"""The layout of the BraTS challenges: a folder per scan, NAME/NAME_flair.nii.gz and its like, and NAME_seg.nii.gz.

Up to 2021 the sequences are flair, t1, t1ce and t2, and enhancing tumour has the value 4; from 2023 on they are t2f,
t1n, t1c and t2w behind a hyphen, and it has 3. Names then end in the numbers of the patient and of the time, as in
BraTS-GLI-00000-001.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from dstlib.errors import DataError, number_of
from dstlib.zoo.e2enet.data.layouts.decathlon import TUMOUR_CHANNELS
from dstlib.zoo.e2enet.data.layouts.files import case_name, refuse_json, scan_files, subfolders
from dstlib.zoo.e2enet.data.layouts.label_table import told_labels
from dstlib.zoo.e2enet.data.layouts.labels import Labels
from dstlib.zoo.e2enet.data.layouts.left_out import listed
from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles, Manifest
from dstlib.zoo.e2enet.data.layouts.source import Source

_TIME = re.compile(r"(BraTS-[A-Za-z]+-\d+)-\d{3}$")


@dataclass(frozen=True, kw_only=True)
class Years:
    """How files of some years are called: the sequences in the order of their channels, and the classes by value."""

    sequences: tuple[str, ...]
    classes: Mapping[int, str]


YEARS = (
    Years(
        sequences=("_flair", "_t1", "_t1ce", "_t2"),
        classes=MappingProxyType({1: "necrotic core", 2: "edema", 4: "enhancing tumour"}),
    ),
    Years(
        sequences=("-t2f", "-t1n", "-t1c", "-t2w"),
        classes=MappingProxyType({1: "necrotic core", 2: "edema", 3: "enhancing tumour"}),
    ),
)


def brats_evidence(source: Source) -> str | None:
    """Says by what a set is BraTS's: folders that are named so, and hold the sequences under their own names."""
    named = (folder for folder in subfolders(source.folder) if is_brats(folder.name))
    found = next(((folder, years) for folder in named for years in _years_of(folder)), None)
    if found is None:
        return None
    folder, years = found
    return f"{folder.name}/{folder.name}{years.sequences[0]} and its like"


def is_brats(name: str) -> bool:
    """Says whether a case is named as those of BraTS, of which it is known what their labels mean."""
    return name.casefold().startswith("brats")


def years_of_files(cases: Sequence[Sequence[str]]) -> Years | None:
    """Returns the years by whose sequences all images of a list are called, in the order of the channels.

    None of images that are not named as those of BraTS.
    """
    if not all(is_brats(case_name(image)) for images in cases for image in images):
        return None
    endings = {tuple(re.split("(?=[_-][^_-]+$)", case_name(image))[-1] for image in images) for images in cases}
    return next((years for years in YEARS if endings == {years.sequences}), None)


def read_brats(source: Source) -> Manifest:
    """Reads which files a set of BraTS consists of. A scan without a NAME_seg is a test case, and a note says so.

    Labels mean what the challenge says, or a dataset.json beside the folders, by which they may be regions too.

    Raises:
        DataError: Years are mixed, whose labels differ; or no scan has a label.

    Reference: Baid et al., *The RSNA-ASNR-MICCAI BraTS 2021 Benchmark* (arXiv:2107.02314); for 2023, syn51156910.
    """
    folders = {folder: years for folder in subfolders(source.folder) for years in _years_of(folder)}
    where = str(source.folder)
    if len({years.sequences for years in folders.values()}) != 1:
        kinds = [" ".join(years.sequences) for years in YEARS if years in folders.values()]
        allowed, given = "folders NAME with the sequences of one kind", " and ".join(kinds) or "none"
        remedy = "Part them into folders, as their labels have other values."
        raise DataError.of("sequences", where, allowed=allowed, given=given, remedy=remedy)
    years = next(iter(folders.values()))
    cases = [_case(folder, years) for folder in folders]
    train = tuple(case for case in cases if case.label is not None)
    if not train:
        allowed, given = f"{cases[0].name}_seg or its like in some folder", f"none in {number_of(len(cases), 'folder')}"
        remedy = "Pass the folder of the training data; predict reads these: --images."
        raise DataError.of("labels", where, allowed=allowed, given=given, remedy=remedy)
    told = told_labels(source.content)
    if isinstance(told, str):
        refuse_json(source.folder / source.list_name, allowed="labels", wrong=[told])
    classes, labels = told or (tuple(years.classes.values()), Labels(values=tuple(years.classes)))
    bare = [case.name for case in cases if case.label is None]
    others = [folder.name for folder in subfolders(source.folder) if folder not in folders]
    notes = [f"{number_of(len(bare), 'case')} without a label, taken for testing: {listed(bare)}"] if bare else []
    notes += [f"{number_of(len(others), 'folder')} left out, without the sequences: {listed(others)}"] if others else []
    return Manifest(
        name=source.folder.resolve().name,
        folder=source.folder,
        layout="brats",
        channels=TUMOUR_CHANNELS,
        classes=classes,
        labels=labels,
        train=train,
        test=tuple(case for case in cases if case.label is None),
        notes=tuple(notes),
    )


def brats_images(folder: Path) -> tuple[CaseFiles, ...]:
    """Returns the scans in the folders of a set of BraTS, without their labels: what can be predicted."""
    cases = [_case(each, years) for each in subfolders(folder) for years in _years_of(each)]
    return tuple(replace(case, label=None) for case in cases)


def _years_of(folder: Path) -> list[Years]:
    """Returns the years by which the files of a folder are called: none for another folder."""
    names = {case_name(file) for file in scan_files(folder)}
    return [years for years in YEARS if any(folder.name + sequence in names for sequence in years.sequences)]


def _case(folder: Path, years: Years) -> CaseFiles:
    """Returns the files of a case, those too that are not there."""
    files = {case_name(file): file for file in scan_files(folder)}
    images = tuple(
        files.get(folder.name + sequence, folder / f"{folder.name}{sequence}.nii.gz") for sequence in years.sequences
    )
    label = files.get(f"{folder.name}{years.sequences[0][0]}seg")
    time = _TIME.match(folder.name)
    return CaseFiles(name=folder.name, images=images, label=label, patient=time and time[1])
