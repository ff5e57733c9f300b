"""What a set leaves out, and how many cases it promises: none of it may go unsaid."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstlib.errors import few, number_of
from dstlib.zoo.e2enet.data.layouts.files import case_name, is_scan_name, scan_files
from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles, Manifest

PARTS = ("imagesTr", "labelsTr", "imagesVa", "labelsVa", "imagesTs", "labelsTs")
_NAMED = 3  # of all the files that are left out


@dataclass(frozen=True)
class _Beside:
    """What lies in one folder of a set beside the files of its cases."""

    scans: list[Path]
    others: list[Path]
    hidden: list[Path]


def left_out(manifest: Manifest, folders: Sequence[Path], *, why: str) -> list[str]:
    """Says which scans, hidden files and files of other kinds lie in the folders of a set and are in none of its cases.

    Folders in these in which cases lie are looked into too. ``why`` is the reason for the scans. What goes with a file
    by its name, as x.raw with x.mhd, is no loss.
    """
    holding = {file.parent for file in _taken(manifest.cases)}
    inside = sorted(each for each in holding if {*each.parents} & {*folders})
    return _told(manifest.cases, [*folders, *inside], below=manifest.folder, why=why)


def left_out_of_images(folder: Path, cases: Sequence[CaseFiles]) -> list[str]:
    """Says which files and folders lie beside the images that are to be predicted, and are in none of these cases."""
    return _told(cases, [folder], below=folder.parent, why="no case has them")


def _told(cases: Sequence[CaseFiles], folders: Sequence[Path], *, below: Path, why: str) -> list[str]:
    taken, told, hidden = _taken(cases), [], []
    for folder in folders:
        if not folder.is_dir() or {folder, folder.resolve()} & taken:  # none, or a scan itself: a series of slices
            continue
        beside = _beside(folder, taken)
        where = folder.relative_to(below) if folder.is_relative_to(below) else folder
        if beside.scans:
            told.append(f"{number_of(len(beside.scans), 'scan')} in {where} left out, as {why}: {listed(beside.scans)}")
        if beside.others:
            others = number_of(len(beside.others), "file")
            told.append(f"{others} in {where} left out, as no scan has such a name: {listed(beside.others)}")
        hidden += beside.hidden
    if hidden:
        files = number_of(len(hidden), "hidden file")
        told.append(f"{files} left out, as macOS leaves such beside scans: {listed(hidden)}")
    return told


def _taken(cases: Sequence[CaseFiles]) -> set[Path]:
    return {file for case in cases for file in (*case.images, case.label) if file is not None}


def promised(content: Mapping[str, Any], found: Mapping[str, int], *, where: str) -> list[str]:
    """Says where a JSON promises another number of cases than there are, by its keys (numTraining, say).

    >>> promised({"numTraining": 260, "numTest": 0}, {"numTraining": 208, "numTest": 0}, where="dataset.json")
    ["dataset.json promises 260 cases under 'numTraining', but there are 208: were any dropped?"]
    """
    numbers = {key: content.get(key) for key in found}
    return [
        f"{where} promises {number} cases under {key!r}, but there are {found[key]}: "
        + ("were any dropped?" if number > found[key] else "is the number out of date?")
        for key, number in numbers.items()
        if type(number) is int and number != found[key]
    ]


def listed(files: Sequence[Path | str]) -> str:
    """Names the first few files or cases.

    >>> listed(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    return few([file if isinstance(file, str) else file.name for file in files], most=_NAMED)


def _beside(folder: Path, taken: set[Path]) -> _Beside:
    entries, scans = sorted(folder.iterdir()), {*scan_files(folder)}
    hidden = [entry for entry in entries if entry.name.startswith(".") and is_scan_name(entry.name)]
    holding = {above for each in {file.parent for file in taken} for above in (each, *each.parents)}
    known = taken | holding
    rest = [entry for entry in entries if not entry.name.startswith(".") and entry not in known]
    stems = tuple(f"{case_name(file)}." for file in taken if file.parent == folder)
    others = [entry for entry in rest if entry not in scans and not entry.name.startswith(stems)]
    return _Beside([entry for entry in rest if entry in scans], others, hidden)
