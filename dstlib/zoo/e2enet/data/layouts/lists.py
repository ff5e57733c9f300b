"""Lists of cases, as the Decathlon's dataset.json and MONAI's data lists hold them, and how their cases are named.

An entry is a file to predict, or {"image": FILE, "label": FILE}; MONAI's may hold a list of images, one per channel,
and the fold in which the case is held out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from dstlib.errors import shown
from dstlib.zoo.e2enet.data.layouts.files import case_channel, case_name, path_fault

COUNTS = {"numTraining": "training", "numValidation": "validation", "numTest": "test"}  # what is promised of the lists
_SEPARATORS = "_-. "  # in names of files


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The files of one case as a list names them, and the fold that holds it out, if the list says so."""

    images: tuple[str, ...]
    label: str | None = None
    fold: int | None = None


def read_lists(content: Mapping[str, Any], *, allow_outside: bool) -> tuple[dict[str, list[Entry]], list[str]]:
    """Reads the lists training, validation and test, and says what is wrong with them; wrong entries are left out."""
    parts: dict[str, list[Entry]] = {part: [] for part in COUNTS.values()}
    wrong = []
    if not content.get("training"):
        wrong.append(f"'training' is {shown(content.get('training'))} but lists at least one case")
    for part, entries in parts.items():
        listed = content.get(part) or []
        if not isinstance(listed, list):
            wrong.append(f"{part!r} is {shown(listed)} but a list of files")
            continue
        for i, given, entry in _parsed(part, listed):
            if isinstance(entry, str):
                wrong.append(f"entry {i} of {part!r} is {shown(given)} but {entry}")
                continue
            entries.append(entry)
            wrong += [
                f"entry {i} of {part!r} names {shown(file)}, which {fault}"
                for file in (*entry.images, entry.label)
                if file and (fault := path_fault(file, allow_outside=allow_outside))
            ]
    folds = {entry.fold for entry in parts["training"]} - {None}
    if folds != set(range(len(folds))):
        wrong.append(f"'fold' is one of {shown(folds)} but counts folds from 0, without gaps")
    return parts, wrong


def listed_entries(content: Mapping[str, Any]) -> list[Entry]:
    """Returns the entries of all lists, to tell a layout by; what is none is passed over, and no path is judged."""
    lists = [(part, content.get(part)) for part in COUNTS.values()]
    parsed = [entry for part, listed in lists if isinstance(listed, list) for _, _, entry in _parsed(part, listed)]
    return [entry for entry in parsed if isinstance(entry, Entry)]


def listed_images(content: Mapping[str, Any]) -> list[str]:
    """Returns the first image of each case that the lists name; what is no entry is passed over here."""
    return [entry.images[0] for entry in listed_entries(content)]


def is_data_list(content: Mapping[str, Any]) -> bool:
    """Says whether lists hold what MONAI's do and the Decathlon's do not: several images to a case, or folds."""
    return any(len(entry.images) > 1 or entry.fold is not None for entry in listed_entries(content))


def names_of(cases: Sequence[Sequence[str]]) -> list[str]:
    """Names cases by their image files or, where these are called alike, by the folders that tell them apart.

    >>> names_of([["imagesTr/a.nii.gz"], ["imagesTr/b.nii.gz"]]), names_of([["s1/ct.nii.gz"], ["s2/ct.nii.gz"]])
    (['a', 'b'], ['s1', 's2'])
    >>> names_of([["x/BraTS_0_flair.nii.gz", "x/BraTS_0_t1.nii.gz"]])
    ['BraTS_0']
    """
    folders = [[*reversed(PurePath(images[0]).parent.parts)] for images in cases]
    choices = [[_common_name(images) for images in cases]]
    choices += [
        [parts[i] if i < len(parts) else "" for parts in folders] for i in range(max(map(len, folders), default=0))
    ]
    return max(choices, key=lambda names: len(set(names)))  # of equals the first


def _common_name(images: Sequence[str]) -> str:
    """Returns what the names of the images of one case begin with; of one image its name."""
    names = [case_name(image) for image in images]
    if len(set(names)) == 1:
        return names[0]
    numbered = [case_channel(image) for image in images]
    if len(stems := {found[0] for found in numbered if found}) == 1 and all(numbered):
        return stems.pop()
    first, last = min(names), max(names)  # what these two begin with, all do
    shared = first[: next((i for i, c in enumerate(first) if last[i : i + 1] != c), len(first))]
    end = max(shared.rfind(separator) for separator in _SEPARATORS)
    return shared[:end].rstrip(_SEPARATORS) if end > 0 else PurePath(images[0]).parent.name


def _parsed(part: str, listed: Sequence[object]) -> Iterator[tuple[int, object, Entry | str]]:
    """Yields what a list holds: its number, as it is given, and the entry that it is, or what it should be."""
    for i, given in enumerate(listed):
        yield i, given, _entry(given, needs_label=part == "training")


def _entry(given: object, *, needs_label: bool) -> Entry | str:
    """Returns an entry, or what it should be."""
    table = given if isinstance(given, dict) else {"image": given}
    images, label, fold = table.get("image"), table.get("label") or None, table.get("fold")
    images = images if isinstance(images, list) else [images]
    if not images or not all(isinstance(image, str) and image for image in images) or (needs_label and label is None):
        return "names an 'image' and a 'label'" if needs_label else "names an 'image'"
    if not (label is None or isinstance(label, str)):
        return "names a 'label' as text"
    if not (fold is None or (type(fold) is int and fold >= 0)):
        return "gives its 'fold' as a number from 0 up"
    return Entry(images=tuple(images), label=label, fold=fold)
