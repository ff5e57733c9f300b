"""The layout of the Medical Segmentation Decathlon, and of AMOS22, which adds a validation list to it.

dataset.json holds modality, labels and the lists training, test and (AMOS22) validation of files. Only listed
files make the set; what else lies in its folders is left out, and a note says so.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dstlib.errors import shown
from dstlib.zoo.e2enet.data.layouts.files import channel_file, numbered, refuse_json, wrong_name
from dstlib.zoo.e2enet.data.layouts.label_table import valued
from dstlib.zoo.e2enet.data.layouts.labels import Labels
from dstlib.zoo.e2enet.data.layouts.left_out import PARTS, left_out, listed, promised
from dstlib.zoo.e2enet.data.layouts.lists import COUNTS, Entry, is_data_list, listed_images, names_of, read_lists
from dstlib.zoo.e2enet.data.layouts.manifest import MAX_CLASSES, CaseFiles, Manifest
from dstlib.zoo.e2enet.data.layouts.source import LIST, Source

TUMOUR_CHANNELS = ("FLAIR", "T1w", "T1gd", "T2w")  # of Task01_BrainTumour
TUMOUR_CLASSES = ("edema", "non-enhancing tumour", "enhancing tumour")

Place = Callable[[Path, tuple[str, ...], int], tuple[Path, ...]]


def decathlon_evidence(source: Source) -> str | None:
    """Says by what a set has the Decathlon's layout: its entries, and files of the names that its lists give.

    Where nnU-Net's entries are there too, labels that are numbered; where no listed file is there at all, the entries.
    """
    keys = decathlon_keys(source)
    if keys is None:
        return None
    images = listed_images(source.content)
    found = next((image for image in images if (source.folder / image).exists()), None)
    if found is None and any(channel_file(source.folder / image, 0).exists() for image in images):
        return None  # nnU-Net v1's files
    return keys + (f", which lists {found}" if found else "")


def decathlon_keys(source: Source) -> str | None:
    """Names the Decathlon's entries that a dataset.json has; None with none, nnU-Net v2's labels, or MONAI's lists."""
    content = source.content
    keys = [key for key in ("modality", "labels", "training") if key in content]
    of_nnunet = "channel_names" in content or "file_ending" in content
    if not {"modality", "training"} & {*keys} or (of_nnunet and numbered(content.get("labels")) is None):
        return None
    if source.list_name != LIST or is_data_list(content):
        return None
    return f"{', '.join(map(repr, keys))} in {source.list_name}"


def as_listed(folder: Path, images: tuple[str, ...], _: int) -> tuple[Path, ...]:
    """Returns the files that a list names."""
    return tuple(folder / image for image in images)


def read_decathlon(source: Source, *, layout: str, place: Place = as_listed) -> Manifest:
    """Reads which files a set of the Decathlon, or AMOS22, consists of: those that dataset.json lists.

    A validation case without a label (as AMOS22 gave them out during the challenge) counts as a test case, and a note
    says so. Labels may have gaps between their values. ``place`` finds the files of the images that an entry names, of
    so many channels.

    Raises:
        DataError: The message says all that dataset.json lacks.

    Reference: Antonelli et al., *The Medical Segmentation Decathlon* (Nature Communications 2022); Ji et al.,
    *AMOS* (NeurIPS 2022).
    """
    folder, content = source.folder, source.content
    channels, classes = numbered(content.get("modality")), valued(content.get("labels"))
    parts, wrong = read_lists(content, allow_outside=source.allow_outside)
    wrong = [*wrong_name(content), *_wrong_tables(content), *wrong]
    if channels is None or classes is None or wrong:
        refuse_json(folder / source.list_name, allowed="the Decathlon's entries", wrong=wrong)
    names = iter(names_of([entry.images for entries in parts.values() for entry in entries]))
    named = {part: [(next(names), entry) for entry in entries] for part, entries in parts.items()}
    cases = {
        part: _sorted(
            [_case(source, name, entry, place(folder, entry.images, len(channels))) for name, entry in entries]
        )
        for part, entries in named.items()
    }
    bare = tuple(case for case in cases["validation"] if case.label is None)
    notes = promised(content, {key: len(cases[part]) for key, part in COUNTS.items()}, where=source.list_name)
    if bare:
        told = f"{len(bare)} of the {len(cases['validation'])} validation cases have no label, so they are test cases"
        notes.append(f"{told}: {listed([case.name for case in bare])}")
    manifest = Manifest(
        name=content.get("name") or folder.resolve().name,
        folder=folder,
        layout=layout,
        channels=channels,
        classes=tuple(classes.values()),
        labels=Labels(values=tuple(classes)),
        train=cases["training"],
        validation=tuple(case for case in cases["validation"] if case.label is not None),
        test=_sorted([*cases["test"], *bare]),
        folds=_folds(named["training"]),
    )
    notes += left_out(manifest, [folder / part for part in PARTS], why=f"{source.list_name} does not list them")
    return replace(manifest, notes=tuple(notes))


def _case(source: Source, name: str, entry: Entry, images: tuple[Path, ...]) -> CaseFiles:
    return CaseFiles(name=name, images=images, label=source.folder / entry.label if entry.label else None)


def _sorted(cases: list[CaseFiles]) -> tuple[CaseFiles, ...]:
    return tuple(sorted(cases, key=lambda case: case.name))


def _folds(training: list[tuple[str, Entry]]) -> tuple[tuple[str, ...], ...]:
    numbers = sorted({entry.fold for _, entry in training if entry.fold is not None})
    return tuple(tuple(sorted(name for name, entry in training if entry.fold == number)) for number in numbers)


def _wrong_tables(content: Mapping[str, Any]) -> list[str]:
    """Says what the tables of channels and of labels lack."""
    wrong, (modality, labels) = [], (content.get("modality"), content.get("labels"))
    if numbered(modality) is None:
        wrong.append(f'\'modality\' is {shown(modality)} but numbers its names from 0, as in {{"0": "CT"}}')
    if isinstance(labels, dict) and len(labels) > MAX_CLASSES + 1:
        wrong.append(f"'labels' has {len(labels)} entries, but a label is a byte: {MAX_CLASSES + 1} at most")
    elif valued(labels) is None:
        example = '{"0": "background", "1": "liver"}'
        wrong.append(f"'labels' is {shown(labels)} but names the values of label files, from 0 up, as in {example}")
    return wrong
